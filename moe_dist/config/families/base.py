"""What is known of one Hugging Face architecture: its config.json, and how its files call our weights.

Shape suffixes: E experts, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe_dist.config.sections.model import ModelConfig

Refuse = Callable[[str, Any, str], Exception]
"""(key, value, what is taken instead) -> the error that says so."""


def same(keys: str) -> dict[str, str]:
    """Keys, by spaces apart, that are called the same on both sides."""
    return {key: key for key in keys.split()}


SIZES = same(
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
    "max_position_embeddings rms_norm_eps attention_dropout tie_word_embeddings initializer_range"
)
"""Keys that are called the same everywhere."""
EXPERTS = same("num_experts num_experts_per_tok norm_topk_prob")


class ExpertNames(NamedTuple):
    """How a layer's experts are called; {e} is the number of one.

    `matrices`: gate (F, D), up (F, D), down (D, F) of one expert; None where files always have stacks. A stack is
    (E, 2F, D) and (E, D, F), or with `is_transposed` false (E, D, 2F) and (E, F, D) as ours, with gate and up in turn
    where `is_interleaved`. The biases of a stack are (E, 2F) and (E, D).
    """

    matrices: tuple[str, str, str] | None = (
        "mlp.experts.{e}.gate_proj.weight",
        "mlp.experts.{e}.up_proj.weight",
        "mlp.experts.{e}.down_proj.weight",
    )
    gate_up_stack: str = "mlp.experts.gate_up_proj"
    down_stack: str = "mlp.experts.down_proj"
    is_transposed: bool = True
    is_interleaved: bool = False


_EXPERT_NAMES = ExpertNames()
COMMON_NAMES = {
    "input_norm.": "input_layernorm.",
    "post_attention_norm.": "post_attention_layernorm.",
    "attention.": "self_attn.",
    "mlp.": "mlp.",
    "moe.router.weight": "mlp.gate.weight",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture. A subclass overrides `read` and `write` for what the tables cannot say."""

    model_type: str
    """Of config.json."""
    architecture: str
    """The class of `transformers`."""
    keys: Mapping[str, str]
    """Their key -> ours, of the same meaning."""
    always: Mapping[str, Any]
    """Our keys that have one value in every model of it."""
    defaults: Mapping[str, Any]
    """Our key -> what it is where a config.json leaves it out, if not what it is here."""
    needed: tuple[str, ...] = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rope_theta")
    """Our keys without which a config.json says too little."""
    only: Mapping[str, tuple[Any, ...]]
    """Their key -> values that are understood."""
    ignored: tuple[str, ...] = ()
    """Their keys that say nothing about the arithmetic."""
    names: Mapping[str, str]
    """Beginnings of our names within a block -> theirs, as files have them."""
    names_in_memory: Mapping[str, str] | None = None
    """The same for a loaded model of `transformers`; None: as in files."""
    experts: ExpertNames = _EXPERT_NAMES
    predicts_further: bool = False
    """Files may have layers past the last, which predict tokens further on, and of which training has no use here."""
    exact: tuple[str, ...] = ()
    """Ends of their names that stay float32 whatever the rest is saved in."""

    def read(self, rest: dict[str, Any], model: dict[str, Any], refuse: Refuse) -> None:
        """Take keys out of `rest` and set ours in `model`. Raises what `refuse` makes."""

    def write(self, config: ModelConfig, values: dict[str, Any]) -> None:
        """Set theirs in `values`, for a configuration that may have more than this family can say."""

    def name(self, ours: str, in_memory: bool = False) -> str | None:
        """Their name of one of our tensors outside experts; None where they have no such tensor."""
        head, layer, within = _split(ours)
        if layer is None:
            return head if head.startswith("lm_head.") else f"model.{head}"
        names = self.names_in_memory if in_memory and self.names_in_memory is not None else self.names
        matching = [start for start in names if within.startswith(start)]
        if not matching:
            return None
        start = max(matching, key=len)
        return f"model.layers.{layer}.{names[start]}{within[len(start) :]}"


def _split(ours: str) -> tuple[str, int | None, str]:
    """`layers.3.moe.router.weight` is ("layers", 3, "moe.router.weight"); any other name itself, and no layer."""
    parts = ours.split(".", 2)
    return ("layers", int(parts[1]), parts[2]) if parts[0] == "layers" else (ours, None, "")


def read_window(
    rest: dict[str, Any], model: dict[str, Any], refuse: Refuse, *, has_switch: bool, has_types: bool
) -> None:
    """`sliding_window`, with `use_sliding_window` in front of it where the family has that switch, and `layer_types`
    where layers may differ."""
    switch, window = rest.pop("use_sliding_window", None), rest.pop("sliding_window", None)
    layers = rest.pop("layer_types", None)
    if has_switch and not switch:
        window = None
    elif not has_switch and switch is False and window is not None:
        raise refuse("use_sliding_window", switch, "this family has no such switch, and sliding_window is set")
    if layers and (not isinstance(layers, list) or any(kind not in _KINDS for kind in layers)):
        raise refuse("layer_types", layers, f"a list of {' and '.join(_KINDS)}")
    if layers and not has_types and set(layers) != {_KINDS[window is not None]}:
        raise refuse("layer_types", layers, f"only {_KINDS[window is not None]}: all layers of this family are alike")
    if layers and set(layers) == {_KINDS[0]}:
        window = None
    if layers and has_types and window is not None:
        model["layer_types"] = layers
    model["sliding_window"] = window


_KINDS = ("full_attention", "sliding_attention")


def write_window(config: ModelConfig, values: dict[str, Any], *, has_switch: bool, has_types: bool) -> None:
    windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
    values["sliding_window"] = config.sliding_window if any(windows) else None
    if has_types or len(set(windows)) > 1:
        values["layer_types"] = [_KINDS[window is not None] for window in windows]
    if has_switch:
        values["use_sliding_window"] = any(windows)
        values["max_window_layers"] = 0 if any(windows) else config.num_hidden_layers


def read_first_dense(rest: dict[str, Any], model: dict[str, Any], refuse: Refuse, default: int) -> None:
    """`first_k_dense_replace`: so many layers at the bottom have no experts."""
    model["mlp_only_layers"] = list(range(_whole(rest, "first_k_dense_replace", default, refuse)))


def write_first_dense(config: ModelConfig, values: dict[str, Any]) -> None:
    values["first_k_dense_replace"] = config.num_hidden_layers - len(config.moe_layers)


def read_shared_experts(rest: dict[str, Any], model: dict[str, Any], refuse: Refuse) -> None:
    """`n_shared_experts` of the width of routed ones are one of so many times that width."""
    count, width = _whole(rest, "n_shared_experts", 1, refuse), model.get("moe_intermediate_size")
    if not count:
        raise refuse("n_shared_experts", count, "at least 1")
    if isinstance(width, int):  # else it is that key which is wrong, or missing
        model["shared_expert_intermediate_size"] = count * width


def write_shared_experts(config: ModelConfig, values: dict[str, Any]) -> None:
    values["n_shared_experts"] = config.shared_expert_intermediate_size // config.moe_intermediate_size


def _whole(rest: dict[str, Any], key: str, default: int, refuse: Refuse) -> int:
    value = rest.pop(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10000:
        raise refuse(key, value, "a whole number")
    return value
