"""The language model. Parallelism is applied to it from outside (`parallel/parallelize.py`).

Shape suffixes: B batch, S sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from moe_dist.config import BalanceConfig, LoraConfig, ModelConfig
from moe_dist.config.trained_weights import TrainedWeights
from moe_dist.models.adapter_shapes import adapter_shapes
from moe_dist.models.attention_mask import Mask, masks_of
from moe_dist.models.block import Block
from moe_dist.models.cache import Cache
from moe_dist.models.context import ALONE, RoutingContext
from moe_dist.models.experts import ExpertList, Experts
from moe_dist.models.freezing import freeze_weights
from moe_dist.models.grouped import StackedLowRank
from moe_dist.models.initial_weights import seed_of, set_initial_weights, set_normal
from moe_dist.models.layers import Linear, RMSNorm
from moe_dist.models.lora import add_adapters
from moe_dist.models.moe import MoE
from moe_dist.models.noise import seed_noise
from moe_dist.models.rotary import rotary_table
from moe_dist.models.router import Router
from moe_dist.models.shapes import Shapes, decays

HeadFunction = Callable[[Tensor, Tensor], Tensor]
"""(hidden states (B, S, D) after the last norm, weight of the head (V, D)) -> what the model gives."""


class Head(Linear):
    """Logits (B, S, V) of hidden states, or what `function` makes of these and the weight: a loss that never holds
    all logits.
    """

    def forward(self, x: Tensor, function: HeadFunction | None = None) -> Tensor:
        if function is None:
            return super().forward(x)
        if self.lora is None:
            return function(x, self.weight)
        # One map: what A makes of the hidden states beside them, B beside the weight.
        wide_BSX = torch.cat((x, self.lora.narrow(x) * self.lora.scale), dim=-1)
        return function(wide_BSX, self.lora.widen(self.weight))


class Stage(nn.Module):
    """Consecutive blocks: hidden states (B, S, D) to hidden states.

    With the embedding in front it takes token ids (B, S) int64; with the head behind it gives logits (B, S, V), or what
    a `HeadFunction` makes.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: nn.ModuleDict,
        embed_tokens: nn.Embedding | None,
        norm: RMSNorm | None,
        lm_head: Head | None,
    ) -> None:
        super().__init__()
        self.config, self.embed_tokens, self.layers, self.norm, self.lm_head = (
            config,
            embed_tokens,
            layers,
            norm,
            lm_head,
        )

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        context: RoutingContext = ALONE,
        noise: int | None = None,
        cache: Cache | None = None,
        head_function: HeadFunction | None = None,
    ) -> Tensor:
        """`position_ids` (B, S) int, None for 0..S-1. `document_ids` (B, S) int: attention stays inside runs of
        equal ids; None for one document per row. `context`: padding and what else experts' layers need. `noise`: seed
        of everything random in this pass, by layer number, so that it is the same whatever layers are here; None
        leaves torch's random state alone. `cache`: what earlier tokens of these rows have left, to which these are
        added; it knows who sees whom, and `position_ids` are needed. `head_function`: instead of logits, where the
        head is.
        """
        length = x.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"sequence of {length} tokens: at most max_position_embeddings={self.config.max_position_embeddings}"
            )
        if position_ids is None:
            position_ids = torch.arange(length, device=x.device)[None]
        cos, sin = rotary_table(position_ids, self.config)
        rotary = (cos[:, None], sin[:, None])
        masks = self._masks(length, document_ids, x.device) if cache is None else {}
        x_BSD = x if self.embed_tokens is None else self.embed_tokens(x)
        for layer, block in self.layers.items():
            if noise is not None:
                seed_noise(noise + int(layer), x.device)
            window = self.config.window(int(layer))
            if cache is None:
                x_BSD = block(x_BSD, rotary, masks[window], context)
            else:
                x_BSD = block(x_BSD, rotary, cache.mask(window), context, cache.of_layer(int(layer)))
        if self.lm_head is None or self.norm is None:
            return x_BSD
        return self.lm_head(self.norm(x_BSD), head_function)

    def _masks(self, length: int, document_ids: Tensor | None, device: torch.device) -> dict[int | None, Mask]:
        """Window of a layer -> its mask."""
        windows = (self.config.window(int(layer)) for layer in self.layers)
        # A compiled block would be compiled again for each new row of lengths, and kernels on a GPU want few calls.
        is_compiled = any(cast(Block, block).is_compiled for block in self.layers.values())
        splits = device.type == "cpu" and self.config.attn_implementation != "eager" and not is_compiled
        return masks_of(windows, length, document_ids, device, splits)


class Transformer(Stage):
    """Token ids (B, S) to logits (B, S, V).

    Build under `torch.device("meta")` for a model without memory, then `initialize`. With `layers` only those are
    here, the embedding with the first of all layers and the head with the last; `stages` are the parts that run
    by themselves.
    """

    def __init__(
        self, config: ModelConfig, balance: BalanceConfig | None = None, layers: Iterable[int] | None = None
    ) -> None:
        numbers = list(range(config.num_hidden_layers) if layers is None else layers)
        is_first, is_last = 0 in numbers, config.num_hidden_layers - 1 in numbers
        super().__init__(
            config,
            # Keyed by global layer number, so names stay the same when a pipeline stage holds only some layers.
            nn.ModuleDict({str(i): Block(config, balance or BalanceConfig(), i) for i in numbers}),
            _embedding(config) if is_first else None,
            RMSNorm(config.hidden_size, config.rms_norm_eps) if is_last else None,
            Head(config.hidden_size, config.vocab_size, bias=False) if is_last else None,
        )
        if config.tie_word_embeddings:
            self.tie()
        self.lora: LoraConfig | None = None
        """Of its adapters; None: it has none, and all of it is trained."""
        self.trained_in_part: dict[str, frozenset[int]] = {}
        """Parameters of which only single experts are trained, by name: the global ids of these."""
        self.saves_adapters_alone = False
        """Whether the frozen weights lie in a folder that a checkpoint can name, and need not be in it."""
        self.masters: dict[str, Tensor] = {}
        """Of parameters of lower precision by name: the weights in full precision, which the optimizer moves, and
        which checkpoints hold as the weights. Parameters follow them."""

    @property
    def stages(self) -> list[Stage]:
        """The parts of this model that run by themselves: here the whole."""
        return [self]

    def add_adapters(self, lora: LoraConfig) -> None:
        """Freeze all weights, and train the adapters of `lora` beside them; nothing with `lora.r` 0."""
        if lora.r:
            add_adapters(self, self.config, lora)
            self.lora = lora

    def freeze(self, trained: TrainedWeights) -> None:
        """Hold still what is not trained. Raises ConfigError for names that the whole model does not have."""
        if trained.are_all:
            return
        whole = dict(self._whole().named_parameters())
        trained.check(whole, (name for name, parameter in whole.items() if parameter.requires_grad))
        self.trained_in_part = freeze_weights(self, trained)

    def tie(self) -> None:
        """Where the head is the embedding: let both be one weight."""
        if self.embed_tokens is not None and self.lm_head is not None:
            self.lm_head.weight = self.embed_tokens.weight

    def blocks(self) -> Iterator[Block]:
        """Blocks held here, in order."""
        for block in self.layers.values():
            yield cast(Block, block)

    def moe_layers(self) -> Iterator[MoE]:
        """Mixture-of-experts layers held here, in order; `MoE.layer` is the global number."""
        for block in self.blocks():
            if block.moe is not None:
                yield block.moe

    def expert_parameter_names(self) -> set[str]:
        """Names of parameters that belong to single experts, other ones on every rank of an `ep` group."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, (Experts, ExpertList))
            for name, _ in module.named_parameters()
        }

    def stacked_names(self) -> set[str]:
        """Names of parameters whose dimension 0 counts experts, of which each `ep` rank holds a block."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, (Experts, StackedLowRank))
            for name, _ in module.named_parameters(recurse=False)
        }

    @cached_property
    def logical_shapes(self) -> Shapes:
        """Name -> shape of every parameter and buffer of the whole model, of which this may be a part. Made from the
        configuration, as a model without memory.
        """
        return {name: tuple(tensor.shape) for name, tensor in self._whole().state_dict().items()}

    def _whole(self) -> Transformer:
        with torch.device("meta"):
            whole = Transformer(self.config)
            if self.lora is not None:
                whole.add_adapters(self.lora)
        return whole

    @property
    def saved_shapes(self) -> Shapes:
        """Those of `logical_shapes` that a checkpoint holds."""
        if self.lora is None or not self.saves_adapters_alone:
            return self.logical_shapes
        return adapter_shapes(self.config, self.lora)

    def decayed_names(self) -> set[str]:
        """Names of parameters that weight decay shrinks, decided by what they are, whatever module holds them."""
        return {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.named_modules()
            if "norm" not in type(module).__name__.lower()
            for name, parameter in module.named_parameters(recurse=False)
            if decays(f"{prefix}.{name}", parameter.ndim - isinstance(module, (Experts, StackedLowRank)))
        }

    def round_weights(self, dtype: torch.dtype) -> None:
        """Compute in `dtype`, with what the weights are now as `masters`, of those that are trained. Routers keep full
        precision."""
        self.round_frozen(dtype)
        exact = self._of_routers()
        for name, parameter in self.named_parameters():
            if parameter not in exact and parameter.requires_grad:
                self.masters[name] = parameter.data
                parameter.data = parameter.data.to(dtype)

    def round_frozen(self, dtype: torch.dtype) -> None:
        """Hold in `dtype` what is frozen, without a copy in full precision; but not routers."""
        exact = self._of_routers()
        for parameter in self.parameters():
            if parameter not in exact and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    def _of_routers(self) -> set[nn.Parameter]:
        return {
            parameter for module in self.modules() if isinstance(module, Router) for parameter in module.parameters()
        }

    @torch.no_grad()
    def follow_masters(self) -> None:
        """Set parameters of lower precision to their masters."""
        parameters = dict(self.named_parameters()) if self.masters else {}
        for name, master in self.masters.items():
            parameters[name].copy_(master)

    def gradient_checkpointing_enable(self, mode: str = "full") -> None:
        """Recompute activations in backward: `full` blocks, `selective` (attention only), or `none`."""
        for block in self.blocks():
            block.recompute = mode

    @torch.no_grad()
    def initialize(self, seed: int, device: torch.device | str = "cpu") -> None:
        """Allocate on `device` and set initial weights: seeded by logical names, so equal in every layout."""
        set_initial_weights(self, self.config, self.lora, seed, device)
        if self.config.tie_word_embeddings:
            self.tie()
            if self.embed_tokens is not None:  # which the head's have gone over
                set_normal(self.embed_tokens.weight, self.config.initializer_range, seed_of(seed, "embed_tokens"))


def _embedding(config: ModelConfig) -> nn.Embedding:
    """Without values yet: to draw some on the device meta torch would load its compiler."""
    return nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
