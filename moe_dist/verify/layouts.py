"""Which layouts `moe-dist verify` tries, and the small model it tries them on. Imports no torch."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, get_args

from pydantic import ValidationError

from moe_dist.config import Config, ConfigError, ModelConfig, ParallelConfig

SCHEDULES = get_args(ParallelConfig.model_fields["schedule"].annotation)
RECOMPUTE = ("none", "full", "selective")
_PLAIN = ("none", "torch", "")
_WORDS = {
    "pp_size": r"pp(\d+)",
    "schedule": f"({'|'.join(SCHEDULES)})",
    "ep_size": r"ep(\d+)",
    "zero_stage": r"zero(\d)",
    "shard_size": r"shard(\d+)",
    "accumulation": r"acc(\d+)",
    "recompute": r"(full|selective)",
    "engine": r"(deepspeed)",
    "dtype": r"(float32|bf16)",
}


@dataclass(frozen=True)
class Case:
    """One way to spread the same training over all ranks. `name` says it in one word per axis, defaults left out.

    `dtype`: what it is computed in where that is not float64 (`float32`, `bf16`), as on the device it runs on later.
    """

    pp_size: int = 1
    schedule: str = "1f1b"
    ep_size: int = 1
    zero_stage: int = 0
    shard_size: int | None = None
    accumulation: int = 1
    recompute: str = "none"
    engine: str = "torch"
    dtype: str = ""

    @property
    def name(self) -> str:
        parts = [f"pp{self.pp_size}", self.schedule] if self.pp_size > 1 else []
        parts += [f"ep{self.ep_size}", f"zero{self.zero_stage}"]
        parts += [f"shard{self.shard_size}"] if self.shard_size is not None else []
        parts += [f"acc{self.accumulation}"] if self.accumulation > 1 else []
        return "-".join([*parts, *(word for word in (self.recompute, self.engine, self.dtype) if word not in _PLAIN)])

    @staticmethod
    def named(name: str) -> Case:
        """The case with this name; raises ConfigError for a word that is no axis, or two of one axis."""
        found: dict[str, Any] = {}
        for word in name.split("-"):
            axis, match = next(
                ((axis, match) for axis, text in _WORDS.items() if (match := re.fullmatch(text, word))), (None, None)
            )
            if axis is None or match is None or axis in found:
                raise ConfigError(
                    f"--layouts {name}: {word!r} is not understood; a layout is named like ep2-zero3-acc2-full or "
                    "pp2-1f1b-ep2-zero1-acc4, and all and quick choose by themselves"
                )
            value = match[1]
            found[axis] = int(value) if value.isdigit() else value
        return Case(**found)

    @property
    def parallel_settings(self) -> dict[str, Any]:
        """Keys of the section `parallel`."""
        keys = ("pp_size", "schedule", "ep_size", "zero_stage", "shard_size", "engine")
        return {key: getattr(self, key) for key in keys}

    @property
    def train_settings(self) -> dict[str, Any]:
        """Keys of the section `train`."""
        return {
            "gradient_accumulation_steps": self.accumulation,
            "gradient_checkpointing": self.recompute,
            "bf16": self.dtype == "bf16",
        }

    @property
    def axes(self) -> dict[str, str]:
        """What has code of its own, by axis: the covering design pairs these values with those of features."""
        engine = self.engine if self.shard_size is None else "hybrid"
        pipeline = "-pp" if self.pp_size > 1 else ""
        return {
            "pipeline": f"pp{self.pp_size}-{self.schedule}" if self.pp_size > 1 else "no pipeline",
            "expert parallelism": f"ep{self.ep_size}",
            "sharding": f"{engine} zero{self.zero_stage}{pipeline}",
            "accumulation": "accumulated" if self.accumulation > self.pp_size else "once",
            "recomputation": self.recompute,
        }


def layouts(config: Config, world_size: int) -> list[Case]:
    """Every layout of `world_size` ranks: each placement (pp x schedule x ep x zero_stage x shard_size x engine) with
    as many micro-batches as stages or twice that, and none, full or selective recomputation. DeepSpeed is left out
    where it is not installed. The rules of a configuration are not asked.
    """
    return [
        replace(layout, accumulation=count, recompute=kind)
        for layout in _placements(world_size)
        for count in (layout.pp_size, 2 * layout.pp_size)
        for kind in RECOMPUTE
    ]


def _placements(world_size: int) -> Iterator[Case]:
    """Every placement worth asking about: no two the same, none that only names what is not there."""
    sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
    engines = ["torch", "deepspeed"] if find_spec("deepspeed") else ["torch"]
    for pp_size in sizes:
        schedules = SCHEDULES if pp_size > 1 else ("1f1b",)
        stages = (0, 1, 2, 3) if world_size > 1 else (0,)
        hybrids = [n for n in sizes if 1 < n < world_size // pp_size]
        for engine, shard_size, schedule in itertools.product(engines, (None, *hybrids), schedules):
            for ep_size, zero_stage in itertools.product(sizes, stages):
                yield Case(pp_size, schedule, ep_size, zero_stage, shard_size, engine=engine)


def shrunken(config: Config, world_size: int, num_stages: int | None = None) -> Config:
    """The same kind of model, small enough to train in milliseconds: layers, widths and experts shrink; routing,
    balance, optimizer and the pattern of dense and expert layers stay. Initial weights are large, so that routing is
    unbalanced and every loss has gradients worth comparing.

    There are four layers, or as many as `num_stages`: unless given, two for each rank, but no more than 8. A model of
    fewer repeats its pattern.
    """
    model = config.model
    num_layers = max(4, min(2 * world_size, 8) if num_stages is None else num_stages)
    num_experts = _few_experts(model, world_size) if model.moe_layers else 0
    dense = [layer for layer in range(num_layers) if not model.has_experts(layer % model.num_hidden_layers)]
    if num_experts:
        # Where experts come only in later layers, they come in the second half.
        dense = dense if len(dense) < num_layers else dense[: num_layers // 2]
    small: dict[str, Any] = {
        "from_pretrained": None,
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if model.kv_heads == model.num_attention_heads else 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": num_experts,
        "num_experts_per_tok": _few_chosen(model, num_experts),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense if num_experts else [],
        "shared_expert_intermediate_size": 16 if model.shared_expert_intermediate_size else 0,
        **_small_attention(model, num_layers),
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    tree = config.model_dump()
    tree["model"] |= small
    tree["data"]["max_seq_length"] = 16
    tree["train"] |= {"bf16": False, "pure_bf16": False, "expert_precision": "compute", "torch_compile": False}
    tree["parallel"] = ParallelConfig().model_dump()
    # The model's own adapters, narrower, and with values in B: as zeros they would leave A without a gradient.
    tree["lora"] |= {"r": min(config.lora.r, 4), "init": "random", "from_adapter": None, "quantize": None}
    tree["balance"]["act"] = "off"  # nothing is logged here, so nothing acts
    # AdamW divides by the gradient's own size: entries near zero would show rounding as a full step.
    tree["optimizer"] |= {"adam_epsilon": max(1e-6, config.optimizer.adam_epsilon)}
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"the small model to verify: {reason(error)}") from None


def _small_attention(model: ModelConfig, num_layers: int) -> dict[str, Any]:
    """Windows shorter than a sequence, in the pattern of the model; positions stretched from half a sequence; heads of
    8, or latents of that width."""
    types, scaling = model.layer_types, model.rope_scaling
    small: dict[str, Any] = {
        "sliding_window": None if model.sliding_window is None else 5,
        "layer_types": [types[layer % len(types)] for layer in range(num_layers)] if types else [],
        "partial_rotary_factor": 1.0 if model.partial_rotary_factor == 1 else 0.5,
    }
    if model.kv_lora_rank is not None:
        small |= {"kv_lora_rank": 8, "q_lora_rank": None if model.q_lora_rank is None else 10, "head_dim": None}
        small |= {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6}
    if scaling is not None:
        pairs = 2 if model.kv_lora_rank is not None or small["partial_rotary_factor"] < 1 else 4
        lists = {key: value[:pairs] for key, value in scaling.items() if isinstance(value, list)}
        lengths = {key: 8 for key in scaling if key == "original_max_position_embeddings"}
        small["rope_scaling"] = scaling | lists | lengths
    return small


def _few_experts(model: ModelConfig, world_size: int) -> int:
    """About two for each rank, two for each group, in a number that groups divide, and ranks where it can be."""
    wanted = max(8, 2 * world_size, 2 * model.n_group)
    for step in (math.lcm(model.n_group, world_size), model.n_group):
        num_experts = -(-wanted // step) * step
        if num_experts <= model.num_experts:
            return num_experts
    return model.num_experts


def _few_chosen(model: ModelConfig, num_experts: int) -> int:
    """Experts per token of the small model: at most half of them, if two are left, and what groups allow."""
    reachable = model.topk_group * num_experts // model.n_group
    return max(1, min(model.num_experts_per_tok, max(2, num_experts // 2), reachable))


def reason(error: Exception) -> str:
    """What a refusal says, without pydantic's words around it."""
    text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return text.removeprefix("Value error, ")
