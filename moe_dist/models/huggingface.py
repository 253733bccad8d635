"""Names and layouts to and from Hugging Face: Qwen3-MoE and Mixtral.

Two layouts of the same weights are read, in any mixture: the public one of checkpoint files (one matrix per
expert, `mlp.experts.3.gate_proj.weight`, Mixtral `block_sparse_moe.experts.3.w1.weight`), and the fused one
transformers 5 holds in memory (`mlp.experts.gate_up_proj` (E, 2F, D), `mlp.experts.down_proj` (E, D, F)).

Shape suffixes: E experts, D hidden, F intermediate.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_dist.config import ModelConfig

State = Mapping[str, Tensor]

_MIXTRAL_TO_QWEN = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_QWEN_TO_MIXTRAL = {ours: theirs for theirs, ours in _MIXTRAL_TO_QWEN.items()}
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_BUFFER = re.compile(r".*\.rotary_emb\.inv_freq")


def family(config: ModelConfig) -> str:
    """`qwen3_moe` or `mixtral`: the Hugging Face model that computes the same as this configuration.

    Raises ValueError naming every key that neither can express.
    """
    neither = {
        "scoring_func": "softmax",
        "n_group": 1,
        "routed_scaling_factor": 1.0,
        "shared_expert_intermediate_size": 0,
        "router": "topk",
    }
    wrong = [f"{key}={getattr(config, key)}" for key, value in neither.items() if getattr(config, key) != value]
    if config.expert not in ("swiglu", "swiglu_loop"):
        wrong.append(f"expert={config.expert}")
    if not config.qk_norm:
        if config.attention_bias:
            wrong.append("attention_bias=true (with qk_norm=false)")
        if not config.norm_topk_prob:
            wrong.append("norm_topk_prob=false (with qk_norm=false)")
        if len(config.moe_layers) != config.num_hidden_layers:
            wrong.append("dense layers (with qk_norm=false)")
    if wrong:
        raise ValueError(f"neither Qwen3-MoE nor Mixtral of Hugging Face has: {', '.join(wrong)}")
    return "qwen3_moe" if config.qk_norm else "mixtral"


def huggingface_config(config: ModelConfig) -> dict[str, Any]:
    """The contents of Hugging Face's `config.json`."""
    kind = family(config)
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_experts_per_tok "
        "max_position_embeddings rms_norm_eps attention_dropout tie_word_embeddings initializer_range "
        "hidden_act"
    )
    values: dict[str, Any] = {key: getattr(config, key) for key in same.split()}
    values |= {"model_type": kind, "num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
    # The second is what transformers 4 and vLLM look for: without it they take their own default, silently.
    values |= {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    values |= {"rope_theta": config.rope_theta, "sliding_window": None}
    if kind == "mixtral":
        mixtral = {"num_local_experts": config.num_experts, "intermediate_size": config.moe_intermediate_size}
        return values | mixtral | {"architectures": ["MixtralForCausalLM"]}
    qwen = (
        "num_experts moe_intermediate_size intermediate_size norm_topk_prob decoder_sparse_step "
        "mlp_only_layers attention_bias"
    )
    values |= {key: getattr(config, key) for key in qwen.split()}
    return values | {"architectures": ["Qwen3MoeForCausalLM"]}


class Part(NamedTuple):
    """Which box of which weight of ours one Hugging Face tensor is.

    `shape`: of their tensor. `offset`, `size`: of the box, with the dimension of experts where ours is a stack.
    """

    ours: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    transposed: bool

    def to_theirs(self, box: Tensor) -> Tensor:
        """Our box (`size`) as their tensor (`shape`), contiguous."""
        turned = box.transpose(-1, -2) if self.transposed else box
        return turned.reshape(self.shape).contiguous()

    def to_ours(self, theirs: Tensor) -> Tensor:
        """Their tensor (`shape`) as a view of our box (`size`)."""
        if not self.transposed:
            return theirs.reshape(self.size)
        *stack, rows, columns = self.size
        return theirs.reshape(*stack, columns, rows).transpose(-1, -2)

    def of_experts(self, first: int, count: int) -> tuple[Part, int] | None:
        """The part of it that lies in experts [first, first + count) of a stack, and where in their tensor that begins.

        None when it has none of them. A tensor that holds one expert is taken whole.
        """
        start, end = max(first, self.offset[0]), min(first + count, self.offset[0] + self.size[0])
        if start >= end:
            return None
        cut = self._replace(offset=(start, *self.offset[1:]), size=(end - start, *self.size[1:]))
        if len(self.shape) == len(self.size):
            cut = cut._replace(shape=(end - start, *self.shape[1:]))
        return cut, start - self.offset[0]


def parts(config: ModelConfig, fused_layers: Collection[int] = ()) -> dict[str, Part]:
    """Every tensor of a Hugging Face model of this configuration, by its name in Qwen3-MoE's words, in file order.

    `fused_layers`: whose experts are two stacks instead of three matrices each. Of tied embeddings `lm_head.weight` is
    there too. The selection bias is not: Hugging Face has none. Raises ValueError where no family fits.
    """
    family(config)
    found = {
        theirs: Part(ours, shape, (0,) * len(shape), shape, False)
        for ours, (theirs, shape) in _plain_names(config).items()
    }
    experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    for layer in config.moe_layers:
        theirs, ours = experts_of(layer), f"layers.{layer}.moe.experts"
        gate_up, down = f"{ours}.w_gate_up", f"{ours}.w_down"
        if layer in fused_layers:
            start = (0, 0, 0)
            size, shape = (experts, hidden, 2 * width), (experts, 2 * width, hidden)
            found[f"{theirs}.gate_up_proj"] = Part(gate_up, shape, start, size, True)
            found[f"{theirs}.down_proj"] = Part(down, (experts, hidden, width), start, (experts, width, hidden), True)
            continue
        for expert in range(experts):
            name = f"{theirs}.{expert}"
            for place, kind in ((0, "gate_proj"), (width, "up_proj")):
                found[f"{name}.{kind}.weight"] = Part(
                    gate_up, (width, hidden), (expert, 0, place), (1, hidden, width), True
                )
            found[f"{name}.down_proj.weight"] = Part(down, (hidden, width), (expert, 0, 0), (1, width, hidden), True)
    return found


def fused_layers_of(names: Collection[str], config: ModelConfig) -> set[int]:
    """Layers whose experts stand in a state (names in Qwen3-MoE's words) as two stacks."""
    return {layer for layer in config.moe_layers if f"{experts_of(layer)}.gate_up_proj" in names}


def selection_biases(config: ModelConfig) -> list[str]:
    """Our weights for which Hugging Face's models have no place, so that they must be zero."""
    return [f"layers.{layer}.moe.router.bias_E" for layer in config.moe_layers]


def optional_names(config: ModelConfig) -> set[str]:
    """Tensors, of the same name on both sides, that a state may lack."""
    return {"lm_head.weight"} if config.tie_word_embeddings else set()


def to_huggingface(model_or_state: nn.Module | State, config: ModelConfig, *, fused: bool = False) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names; `fused`: as `transformers` 5 holds them in memory.

    Raises ValueError naming all missing, unexpected and ill-shaped weights, or a selection bias that is in
    use, for which these models have no place.
    """
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    optional, biases = optional_names(config), selection_biases(config)
    _check(state, _our_shapes(config), optional | set(biases), "the model's state")
    for name in biases:
        if name in state and not state[name].is_meta and state[name].count_nonzero() > 0:
            raise ValueError(nonzero_bias(name, config))
    found = {}
    for theirs, part in parts(config, config.moe_layers if fused else ()).items():
        if theirs not in optional:
            box = state[part.ours].detach()
            box = box[tuple(slice(o, o + n) for o, n in zip(part.offset, part.size, strict=True))]
            found[theirs if fused else public_name(theirs, config)] = part.to_theirs(box)
    return found


def from_huggingface(state_dict: State, config: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face's weights, in either layout, under our names: what `Transformer.load_state_dict` takes.

    dtypes stay. Raises ValueError naming all missing, unexpected and ill-shaped weights.
    """
    theirs = {one_name(name): tensor for name, tensor in state_dict.items() if not is_no_weight(name)}
    wanted = parts(config, fused_layers_of(theirs, config))
    shapes = {name: part.shape for name, part in wanted.items()}
    _check(theirs, shapes, optional_names(config), "the Hugging Face state")
    if config.tie_word_embeddings:
        embedding = theirs["model.embed_tokens.weight"]
        head = theirs.setdefault("lm_head.weight", embedding)
        if head is not embedding and not head.is_meta and not torch.equal(head, embedding):
            raise ValueError(untied_head())
    ours: dict[str, Tensor] = {}
    our_shapes = _our_shapes(config)
    for name, part in wanted.items():
        values = part.to_ours(theirs[name])
        if part.size == our_shapes[part.ours]:
            ours[part.ours] = values.contiguous()
            continue
        if part.ours not in ours:
            ours[part.ours] = values.new_empty(our_shapes[part.ours])
        ours[part.ours][tuple(slice(o, o + n) for o, n in zip(part.offset, part.size, strict=True))] = values
    for name in selection_biases(config):
        ours[name] = torch.zeros(config.num_experts, device=theirs["model.embed_tokens.weight"].device)
    return ours


def is_no_weight(name: str) -> bool:
    """Whether it is a buffer that old files hold, and that follows from the configuration."""
    return _BUFFER.fullmatch(name) is not None


def nonzero_bias(name: str, config: ModelConfig) -> str:
    """Words about a selection bias that is in use."""
    return f"{name}: not zero, and Hugging Face's {family(config)} has no selection bias"


def untied_head() -> str:
    """Words about a head of its own in a model that says that it has none."""
    return "lm_head.weight: differs from the embedding, but tie_word_embeddings=true"


def _plain_names(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our name -> Hugging Face's (in Qwen3-MoE's words) and the shape, for all but experts and biases."""
    hidden, size = config.hidden_size, config.head_size
    queries, keys = config.num_attention_heads * size, config.kv_heads * size
    names: dict[str, tuple[str, tuple[int, ...]]] = {
        "embed_tokens.weight": ("model.embed_tokens.weight", (config.vocab_size, hidden)),
        "norm.weight": ("model.norm.weight", (hidden,)),
        "lm_head.weight": ("lm_head.weight", (config.vocab_size, hidden)),
    }
    projections = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        names[f"{ours}input_norm.weight"] = f"{theirs}input_layernorm.weight", (hidden,)
        names[f"{ours}post_attention_norm.weight"] = f"{theirs}post_attention_layernorm.weight", (hidden,)
        for letter, shape in projections.items():
            tail = f"{letter}_proj"
            names[f"{ours}attention.{tail}.weight"] = f"{theirs}self_attn.{tail}.weight", shape
            if config.attention_bias:
                names[f"{ours}attention.{tail}.bias"] = f"{theirs}self_attn.{tail}.bias", shape[:1]
        if config.qk_norm:
            for tail in ("q_norm.weight", "k_norm.weight"):
                names[f"{ours}attention.{tail}"] = f"{theirs}self_attn.{tail}", (size,)
        if config.has_experts(layer):
            names[f"{ours}moe.router.weight"] = f"{theirs}mlp.gate.weight", (config.num_experts, hidden)
        else:
            width = config.intermediate_size
            for tail, shape in (
                ("gate", (width, hidden)),
                ("up", (width, hidden)),
                ("down", (hidden, width)),
            ):
                names[f"{ours}mlp.{tail}_proj.weight"] = f"{theirs}mlp.{tail}_proj.weight", shape
    return names


def _our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    shapes = {ours: shape for ours, (_, shape) in _plain_names(config).items()}
    for layer in config.moe_layers:
        shapes[f"layers.{layer}.moe.experts.w_gate_up"] = (experts, hidden, 2 * width)
        shapes[f"layers.{layer}.moe.experts.w_down"] = (experts, width, hidden)
    return shapes


def experts_of(layer: int) -> str:
    """Under which name the experts of a layer stand, in Qwen3-MoE's words."""
    return f"model.layers.{layer}.mlp.experts"


def one_name(name: str) -> str:
    """Mixtral's public name in Qwen3-MoE's words; any other name as it is."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    head, _, tail = name.removesuffix(".weight").rpartition(".")
    if ".mlp.experts." in name and tail in _MIXTRAL_TO_QWEN:
        return f"{head}.{_MIXTRAL_TO_QWEN[tail]}.weight"
    return name


def public_name(name: str, config: ModelConfig) -> str:
    """A name in Qwen3-MoE's words as the files of this family have it, one matrix per expert."""
    if family(config) != "mixtral":
        return name
    match = _EXPERT.fullmatch(name)
    if match:
        prefix, expert, kind = match.groups()
        name = f"{prefix}.{expert}.{_QWEN_TO_MIXTRAL[kind]}.weight"
    return name.replace(".mlp.", ".block_sparse_moe.")


def _check(state: State, shapes: dict[str, tuple[int, ...]], optional: set[str], what: str) -> None:
    """One ValueError that names everything that does not fit."""
    missing = [name for name in shapes if name not in state and name not in optional]
    unexpected = [name for name in state if name not in shapes and name not in optional]
    ill_shaped = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("ill-shaped", ill_shaped))
        if names
    ]
    if problems:
        raise ValueError(f"{what} does not fit the configuration; " + "; ".join(problems))
