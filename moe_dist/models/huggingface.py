"""Names and layouts to and from Hugging Face: Qwen3-MoE and Mixtral.

Two layouts of the same weights are read, in any mixture: the public one of checkpoint files (one matrix per
expert, `mlp.experts.3.gate_proj.weight`, Mixtral `block_sparse_moe.experts.3.w1.weight`), and the fused one
transformers 5 holds in memory (`mlp.experts.gate_up_proj` (E, 2F, D), `mlp.experts.down_proj` (E, D, F)).

Shape suffixes: E experts, D hidden, F intermediate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

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
    values |= {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    if kind == "mixtral":
        mixtral = {"num_local_experts": config.num_experts, "intermediate_size": config.moe_intermediate_size}
        return values | mixtral | {"architectures": ["MixtralForCausalLM"]}
    qwen = (
        "num_experts moe_intermediate_size intermediate_size norm_topk_prob decoder_sparse_step "
        "mlp_only_layers attention_bias"
    )
    values |= {key: getattr(config, key) for key in qwen.split()}
    return values | {"architectures": ["Qwen3MoeForCausalLM"]}


def to_huggingface(model_or_state: nn.Module | State, config: ModelConfig, *, fused: bool = False) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names; `fused`: as `transformers` 5 holds them in memory.

    Raises ValueError naming all missing, unexpected and ill-shaped weights, or a selection bias that is in
    use, for which these models have no place.
    """
    return dict(iterate_huggingface(model_or_state, config, fused=fused))


def iterate_huggingface(
    model_or_state: nn.Module | State, config: ModelConfig, *, fused: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """As `to_huggingface`, one contiguous tensor at a time: a big model never exists twice."""
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    mixtral = family(config) == "mixtral"
    plain, stacked, biases = _plain_names(config), _stacked_shapes(config), _bias_names(config)
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {ours: shape for ours, (_, shape) in plain.items()} | stacked
    _check(state, shapes, optional | set(biases), "the model's state")
    for name in biases:
        if name in state and not state[name].is_meta and state[name].count_nonzero() > 0:
            raise ValueError(f"{name}: not zero, and Hugging Face's {family(config)} has no selection bias")
    for ours, (theirs, _) in plain.items():
        if ours not in optional:
            yield (
                (theirs if fused or not mixtral else _mixtral_name(theirs)),
                state[ours].detach().contiguous(),
            )
    for layer in config.moe_layers:
        gate_up = state[f"layers.{layer}.moe.experts.w_gate_up"].detach().transpose(1, 2)
        down = state[f"layers.{layer}.moe.experts.w_down"].detach().transpose(1, 2)
        prefix = f"model.layers.{layer}.mlp.experts"
        if fused:
            yield f"{prefix}.gate_up_proj", gate_up.contiguous()
            yield f"{prefix}.down_proj", down.contiguous()
            continue
        for expert in range(config.num_experts):
            gate, up = gate_up[expert].chunk(2)
            for kind, matrix in (("gate_proj", gate), ("up_proj", up), ("down_proj", down[expert])):
                name = f"{prefix}.{expert}.{kind}.weight"
                yield (_mixtral_name(name) if mixtral else name), matrix.contiguous()


def from_huggingface(state_dict: State, config: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face's weights, in either layout, under our names: what `Transformer.load_state_dict` takes.

    dtypes stay. Raises ValueError naming all missing, unexpected and ill-shaped weights.
    """
    family(config)
    theirs = {_qwen_name(name): tensor for name, tensor in state_dict.items() if not _BUFFER.fullmatch(name)}
    plain = _plain_names(config)
    shapes = dict(plain.values())
    fused_layers = {layer for layer in config.moe_layers if f"{_experts_of(layer)}.gate_up_proj" in theirs}
    shapes |= _expert_shapes(config, fused_layers)
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    _check(theirs, shapes, optional, "the Hugging Face state")
    if config.tie_word_embeddings:
        embedding = theirs["model.embed_tokens.weight"]
        head = theirs.setdefault("lm_head.weight", embedding)
        if head is not embedding and not head.is_meta and not torch.equal(head, embedding):
            raise ValueError("lm_head.weight: differs from the embedding, but tie_word_embeddings=true")
    ours = {name: theirs[source] for name, (source, _) in plain.items()}
    for layer in config.moe_layers:
        prefix = _experts_of(layer)
        if layer in fused_layers:
            gate_up, down = theirs[f"{prefix}.gate_up_proj"], theirs[f"{prefix}.down_proj"]
            gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        else:
            gate_up, down = _stack_experts(theirs, prefix, config.num_experts)
        ours[f"layers.{layer}.moe.experts.w_gate_up"] = gate_up
        ours[f"layers.{layer}.moe.experts.w_down"] = down
        ours[f"layers.{layer}.moe.router.bias_E"] = torch.zeros(config.num_experts, device=gate_up.device)
    return ours


def _stack_experts(theirs: dict[str, Tensor], prefix: str, num_experts: int) -> tuple[Tensor, Tensor]:
    """Per-expert matrices of one layer to (E, D, 2F) and (E, F, D), filled in place."""
    width, hidden = theirs[f"{prefix}.0.gate_proj.weight"].shape
    like = theirs[f"{prefix}.0.gate_proj.weight"]
    w_gate_up, w_down = (
        like.new_empty(num_experts, hidden, 2 * width),
        like.new_empty(num_experts, width, hidden),
    )
    for expert in range(num_experts):
        w_gate_up[expert, :, :width] = theirs[f"{prefix}.{expert}.gate_proj.weight"].T
        w_gate_up[expert, :, width:] = theirs[f"{prefix}.{expert}.up_proj.weight"].T
        w_down[expert] = theirs[f"{prefix}.{expert}.down_proj.weight"].T
    return w_gate_up, w_down


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


def _stacked_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in config.moe_layers:
        shapes[f"layers.{layer}.moe.experts.w_gate_up"] = (experts, hidden, 2 * width)
        shapes[f"layers.{layer}.moe.experts.w_down"] = (experts, width, hidden)
    return shapes


def _expert_shapes(config: ModelConfig, fused_layers: set[int]) -> dict[str, tuple[int, ...]]:
    experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in config.moe_layers:
        prefix = _experts_of(layer)
        if layer in fused_layers:
            shapes[f"{prefix}.gate_up_proj"] = (experts, 2 * width, hidden)
            shapes[f"{prefix}.down_proj"] = (experts, hidden, width)
            continue
        for expert in range(experts):
            shapes[f"{prefix}.{expert}.gate_proj.weight"] = (width, hidden)
            shapes[f"{prefix}.{expert}.up_proj.weight"] = (width, hidden)
            shapes[f"{prefix}.{expert}.down_proj.weight"] = (hidden, width)
    return shapes


def _bias_names(config: ModelConfig) -> list[str]:
    return [f"layers.{layer}.moe.router.bias_E" for layer in config.moe_layers]


def _experts_of(layer: int) -> str:
    return f"model.layers.{layer}.mlp.experts"


def _qwen_name(name: str) -> str:
    """Mixtral's public name in Qwen3-MoE's words; any other name as it is."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    head, _, tail = name.removesuffix(".weight").rpartition(".")
    if ".mlp.experts." in name and tail in _MIXTRAL_TO_QWEN:
        return f"{head}.{_MIXTRAL_TO_QWEN[tail]}.weight"
    return name


def _mixtral_name(name: str) -> str:
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
