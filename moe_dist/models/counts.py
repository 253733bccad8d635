"""How many parameters and how much arithmetic a model is, from its configuration alone: no torch, no memory.

Convention for `active`, the one behind the names: every weight one token passes through, with the embedding
and the output head counted whole, the router counted, and K of E experts per layer. So counted, the published
models come out at their published figures: Qwen3-30B-A3B 30.53B / 3.35B, Qwen3-235B-A22B 235.09B / 22.19B,
Qwen3-Coder-480B-A35B 480.15B / 35.47B, Mixtral-8x7B 46.70B / 12.88B (total / active).

They are sums over `shapes.py`. Counts are of the built-in router and experts; a class of your own may have more.
Letters: V vocab_size, D hidden_size, H query heads, G key-value heads, C head width, E experts, K experts per
token, F moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

from moe_dist.config import ModelConfig
from moe_dist.models.shapes import SELECTION_BIAS, STACKED, Shapes, block_shapes


class Split(Protocol):
    """How a model is divided: what `per_rank` needs of a `parallel.layout.Layout`, which is a floor above."""

    @property
    def pp_size(self) -> int: ...

    @property
    def ep_size(self) -> int: ...


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, by part. The parts add up to `total`."""

    embedding: int
    """embed_tokens, V x D."""
    head: int
    """lm_head, V x D; 0 when it shares the embedding's weights."""
    attention: int
    """q, k, v and o projections of all layers, with biases if there are any; without their norms."""
    experts: int
    """All routed experts of all layers."""
    shared_experts: int
    """Experts that every token passes through."""
    router: int
    """Router weights of all layers, E x D each."""
    dense_mlp: int
    """SwiGLU of the layers without experts."""
    norms: int
    """Block norms, query and key norms, final norm."""
    per_expert: int
    """One routed expert of one layer, 3 x D x F."""
    active_experts: int
    """Routed experts of all layers that one token goes to."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.experts

    @property
    def active(self) -> int:
        """Parameters one token uses; the convention is in the module's docstring."""
        return self.dense + self.active_experts

    @property
    def dense(self) -> int:
        """Everything but the routed experts: what expert parallelism does not split."""
        parts = (self.embedding, self.head, self.attention, self.shared_experts, self.router)
        return sum(parts) + self.dense_mlp + self.norms


@dataclass(frozen=True)
class RankCounts:
    """Parameters on each of the ranks with one `pp` coordinate; all of them hold equally many.

    `stage` is that coordinate, `layers` the global numbers of its layers.
    """

    stage: int
    layers: tuple[int, ...]
    dense: int
    experts: int
    routers: int = 0
    """Of `dense`: what keeps full precision whatever the rest computes in."""

    @property
    def total(self) -> int:
        """All parameters of one rank."""
        return self.dense + self.experts


@dataclass(frozen=True)
class BlockCounts:
    """Parameters of one block by part, and `multiplying`: of its matrices other than those of routed experts."""

    attention: int = 0
    experts: int = 0
    shared: int = 0
    router: int = 0
    dense_mlp: int = 0
    norms: int = 0
    multiplying: int = 0

    @property
    def total(self) -> int:
        return self.attention + self.experts + self.shared + self.router + self.dense_mlp + self.norms


_PARTS = (
    ("moe.experts.", "experts"),
    ("moe.shared_expert", "shared"),
    ("moe.router.", "router"),
    ("mlp.", "dense_mlp"),
    ("attention.", "attention"),
)


def blocks(model: ModelConfig, layers: Sequence[int] | range) -> list[BlockCounts]:
    """Parameters of these blocks, by part."""
    if model.router != "topk" or model.expert not in STACKED:
        model = model.model_copy(update={"router": "topk", "expert": "swiglu"})
    kinds = {experts: _block(block_shapes(model, experts)) for experts in {model.has_experts(i) for i in layers}}
    return [kinds[model.has_experts(layer)] for layer in layers]


def _block(shapes: Shapes) -> BlockCounts:
    sums: dict[str, int] = {}
    for name, shape in shapes.items():
        if name == SELECTION_BIAS:  # a buffer
            continue
        part = next((part for start, part in _PARTS if name.startswith(start) and "norm" not in name), "norms")
        sums[part] = sums.get(part, 0) + prod(shape)
        if len(shape) == 2 and part != "experts":
            sums["multiplying"] = sums.get("multiplying", 0) + prod(shape)
    return BlockCounts(**sums)


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Parameters of the whole model, by part."""
    V, D = model.vocab_size, model.hidden_size
    parts = blocks(model, range(model.num_hidden_layers))
    experts = sum(block.experts for block in parts)
    per_expert = experts // (len(model.moe_layers) * model.num_experts) if model.moe_layers else 0
    return ParameterCounts(
        embedding=V * D,
        head=0 if model.tie_word_embeddings else V * D,
        attention=sum(block.attention for block in parts),
        experts=experts,
        shared_experts=sum(block.shared for block in parts),
        router=sum(block.router for block in parts),
        dense_mlp=sum(block.dense_mlp for block in parts),
        norms=sum(block.norms for block in parts) + D,
        per_expert=per_expert,
        active_experts=len(model.moe_layers) * model.num_experts_per_tok * per_expert,
    )


def per_rank(model: ModelConfig, layout: Split, layers_of: Sequence[Sequence[range]] | None = None) -> list[RankCounts]:
    """What each rank holds, one entry per `pp` coordinate: experts split over ep, the rest replicated.

    `layers_of`: the layers of each, as one or several stages; default: one stage each, as `split_layers`
    has it. The embedding is on the first stage, final norm and head on the last (tied weights: on both).
    Raises ValueError when there are more stages than layers or ep_size does not divide the experts.
    """
    layers_of = layers_of or [[layers] for layers in split_layers(model, layout.pp_size)]
    if model.moe_layers and model.num_experts % layout.ep_size:
        raise ValueError(f"ep_size={layout.ep_size}: must divide num_experts={model.num_experts}")
    V, D = model.vocab_size, model.hidden_size
    counts = []
    for pp_rank, stages in enumerate(layers_of):
        layers = tuple(layer for stage in stages for layer in stage)
        parts = blocks(model, layers)
        experts = sum(block.experts for block in parts)
        dense = sum(block.total for block in parts) - experts
        first, last = 0 in layers, model.num_hidden_layers - 1 in layers
        tied_here = model.tie_word_embeddings and first and last
        dense += V * D * (first + last - tied_here) + D * last
        routers = sum(block.router for block in parts)
        counts.append(RankCounts(pp_rank, layers, dense, experts // layout.ep_size, routers))
    return counts


def split_layers(model: ModelConfig, num_stages: int) -> list[range]:
    """Consecutive layers of each pipeline stage, such that the slowest stage is as fast as can be.

    Time is counted in weights that multiply one token: attention, K of E experts, router, shared experts or the
    dense SwiGLU, and on the last stage the head. Among equally fast splits the largest stage is as small as
    can be, in parameters: there the embedding counts as well. Raises ValueError for more stages than layers.
    """
    num_layers = model.num_hidden_layers
    if num_stages > num_layers:
        raise ValueError(f"pp_size={num_stages}: at most num_hidden_layers={num_layers}")
    V, D = model.vocab_size, model.hidden_size
    times, sizes = [], []
    for block in blocks(model, range(num_layers)):
        active = block.experts * model.num_experts_per_tok // model.num_experts if block.experts else 0
        times.append(block.total - block.experts - block.norms + active)
        sizes.append(block.total)
    times[-1] += V * D
    sizes[0] += V * D
    sizes[-1] += V * D
    _, slowest = fairest_split(times, times, sum(times), num_stages)
    stages, _ = fairest_split(sizes, times, slowest, num_stages)
    return stages


def fairest_split(costs: list[int], times: list[int], limit: int, num_stages: int) -> tuple[list[range], int]:
    """The split into consecutive stages whose largest sum of `costs` is smallest, with no stage's sum of `times` above
    `limit`; and that sum. There must be one.
    """
    count = len(costs)
    cost_to, time_to = ([sum(values[:end]) for end in range(count + 1)] for values in (costs, times))
    # best[end] = (largest sum, starts of the stages) for the layers before `end`, in so many stages as rounds so far
    best: list[tuple[int, tuple[int, ...]] | None] = [(0, ())] + [None] * count
    for _ in range(num_stages):
        after: list[tuple[int, tuple[int, ...]] | None] = [None] * (count + 1)
        for end in range(1, count + 1):
            for start in range(end):
                before = best[start]
                if before is None or time_to[end] - time_to[start] > limit:
                    continue
                largest = max(before[0], cost_to[end] - cost_to[start])
                if after[end] is None or largest <= after[end][0]:  # type: ignore[index]
                    after[end] = (largest, (*before[1], start))
        best = after
    found = best[count]
    assert found is not None
    ends = (*found[1][1:], count)
    return [range(start, end) for start, end in zip(found[1], ends, strict=True)], found[0]


def matmul_parameters(model: ModelConfig) -> int:
    """Active parameters that multiply a token: `active` without the embedding's look-up, norms and biases.

    The head counts whether or not it shares the embedding's weights. Biases of experts count with them.
    """
    parts = blocks(model, range(model.num_hidden_layers))
    head = model.vocab_size * model.hidden_size
    return sum(block.multiplying for block in parts) + parameter_counts(model).active_experts + head


def flops_per_token(model: ModelConfig, seq_length: int, *, causal: bool = False) -> int:
    """Floating-point operations of forward and backward for one token of a sequence of `seq_length` tokens.

        6 * N + sum over layers of 6 * H * (C + C') * S

    N = `matmul_parameters` (2 operations per weight forward, 4 backward), H heads whose keys are C and whose values are
    C' wide, S tokens, or as many as a layer's window has. The attention term is that of the PaLM paper (Chowdhery et
    al. 2022, appendix B): scores and weighted sum, 2 products of 2*H*C*S operations forward and twice that backward.
    Causality and document masks are not credited, as is usual for model FLOP utilisation, and recomputation is not
    counted. `causal`: of the scores only the half that a causal model needs, as NVIDIA and DeepSeek count.
    """
    width = 2 * model.head_size
    if model.kv_lora_rank is not None:
        width = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    seen = sum(min(seq_length, model.window(layer) or seq_length) for layer in range(model.num_hidden_layers))
    attention = 6 * model.num_attention_heads * width * seen
    return 6 * matmul_parameters(model) + (attention // 2 if causal else attention)


def dense_flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """`flops_per_token` of the dense model of equal width: each MLP as wide as all experts together, and no router."""
    router = parameter_counts(model).router
    every = model.model_copy(update={"num_experts_per_tok": model.num_experts})
    return flops_per_token(every, seq_length) - 6 * router


def expert_share(model: ModelConfig, seq_length: int) -> float:
    """Part of `flops_per_token` that routed experts do, 0..1."""
    return 6 * parameter_counts(model).active_experts / flops_per_token(model, seq_length)


_CHUNK = {"cpu": 256}
"""Tokens of a chunk of the loss by device: as few as keep its matmuls fast."""
_CHUNK_ELSEWHERE = 1024
_SMALL = 2**24
"""Logits that are one chunk whatever their tokens: 64 MiB in float32."""


def loss_chunk(setting: int | Literal["auto"], device: str, vocab_size: int) -> int:
    """Tokens whose logits the loss holds at once, for `train.loss_chunk_tokens`; 0: all of them."""
    return setting if setting != "auto" else max(_CHUNK.get(device, _CHUNK_ELSEWHERE), _SMALL // vocab_size)
