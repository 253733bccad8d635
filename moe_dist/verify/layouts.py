"""Which layouts `moe-dist verify` tries, and the small model it tries them on. Imports no torch."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from typing import Any, get_args

from pydantic import ValidationError

from moe_dist.config import Config, ModelConfig, ParallelConfig
from moe_dist.config_loading import ConfigError
from moe_dist.parallel.layout import Layout

_AUXILIARY_LOSS = {"balance.use_auxiliary_loss": True, "balance.router_aux_loss_coef": 0.01}
_OF_THE_BATCH = {**_AUXILIARY_LOSS, "balance.aux_loss_scope": "global_batch"}
BUGS: dict[str, dict[str, Any]] = {
    "expert_gradient_times_ep": {},
    "expert_gradient_averaged_over_edp": {},
    "expert_gradient_averaged_over_active_replicas": {},
    "loss_by_local_tokens": {},
    "auxiliary_loss_by_local_tokens": _AUXILIARY_LOSS,
    "auxiliary_loss_times_micro_batches": _AUXILIARY_LOSS,
    "norm_without_experts": {},
    "norm_counts_replicas": {},
    "norm_of_own_experts": {},
    "replica_misses_the_last_update": {},
    "fsdp_averages": {},
    "fsdp_averages_experts": {},
    "router_cut_from_loss": {},
    "auxiliary_loss_cut": _AUXILIARY_LOSS,
    "auxiliary_loss_cut_with_capacity": {**_AUXILIARY_LOSS, "balance.capacity_factor": 0.8},
    "global_load_is_local": _OF_THE_BATCH,
    "load_of_the_whole_batch_unknown": _OF_THE_BATCH,
    "bias_from_counts_after_drop": {"balance.bias_update_rate": 0.01},
    "bias_from_local_counts": {"balance.bias_update_rate": 0.01},
    "seeds_by_local_expert": {},
    "capacity_of_the_whole_group": {"balance.capacity_factor": 0.8},
    "gradients_scaled_by_the_schedule": {},
    "auxiliary_loss_scaled_by_the_schedule": _AUXILIARY_LOSS,
    "gradients_of_a_stage_reduced_twice": {},
    "norm_of_the_last_stage": {},
    "loss_of_one_stage": {},
    "seeds_by_local_layer": {},
    "noise_by_rank": {"balance.router_jitter": 0.1},
    "load_counted_by_a_pass_for_shapes": {"balance.bias_update_rate": 0.01},
    "deepspeed_averages": {},
    "deepspeed_averages_experts": {},
    "deepspeed_knows_no_experts": {},
    "deepspeed_divides_by_accumulation": {},
}
"""Known bugs of parallel trainers that `moe-dist verify --plant` can plant, each with the options without which it
would do nothing; they are in `plants.py`."""

SCHEDULES = get_args(ParallelConfig.model_fields["schedule"].annotation)
RECOMPUTE = ("none", "full", "selective")
_WORDS = {
    "pp_size": r"pp(\d+)",
    "schedule": f"({'|'.join(SCHEDULES)})",
    "ep_size": r"ep(\d+)",
    "zero_stage": r"zero(\d)",
    "shard_size": r"shard(\d+)",
    "accumulation": r"acc(\d+)",
    "recompute": r"(full|selective)",
    "engine": r"(deepspeed)",
    "bf16": r"(bf16)",
}


@dataclass(frozen=True)
class Case:
    """One way to spread the same training over all ranks. `name` says it in one word per axis, defaults left out.

    `bf16`: matmuls in bfloat16, held against float32 with a tolerance of its own.
    """

    pp_size: int = 1
    schedule: str = "1f1b"
    ep_size: int = 1
    zero_stage: int = 0
    shard_size: int | None = None
    accumulation: int = 1
    recompute: str = "none"
    engine: str = "torch"
    bf16: bool = False

    @property
    def name(self) -> str:
        parts = [f"pp{self.pp_size}", self.schedule] if self.pp_size > 1 else []
        parts += [f"ep{self.ep_size}", f"zero{self.zero_stage}"]
        parts += [f"shard{self.shard_size}"] if self.shard_size is not None else []
        parts += [f"acc{self.accumulation}"] if self.accumulation > 1 else []
        parts += [word for word in (self.recompute, self.engine) if word not in ("none", "torch")]
        return "-".join([*parts, *(["bf16"] if self.bf16 else [])])

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
            found[axis] = int(value) if value.isdigit() else True if axis == "bf16" else value
        return Case(**found)

    def applied(self, config: Config, world_size: int) -> Config:
        """`config` in this layout. Raises ConfigError with the reason `moe-dist check` would give when it cannot be."""
        tree = config.model_dump()
        tree["parallel"] |= {
            "pp_size": self.pp_size,
            "schedule": self.schedule,
            "ep_size": self.ep_size,
            "zero_stage": self.zero_stage,
            "shard_size": self.shard_size,
            "engine": self.engine,
        }
        tree["train"] |= {
            "gradient_accumulation_steps": self.accumulation,
            "gradient_checkpointing": self.recompute,
            "bf16": self.bf16,
        }
        try:
            changed = Config.model_validate(tree)
            Layout.of(changed, world_size)
        except ValidationError as error:
            raise ConfigError(f"--layouts {self.name}: {_reason(error)}") from None
        except ConfigError as error:
            raise ConfigError(f"--layouts {self.name}: {error}") from None
        return changed

    def is_feasible(self, config: Config, world_size: int) -> bool:
        """Whether the configuration's own rules allow it."""
        try:
            self.applied(config, world_size)
        except ConfigError:
            return False
        return True

    @property
    def features(self) -> set[tuple[Any, ...]]:
        """What `quick` wants to see at least once: every value of every axis, and pairs that have code of their own."""
        values: set[tuple[Any, ...]] = {(field.name, getattr(self, field.name)) for field in fields(self)}
        return values | {
            ("pp, schedule", self.pp_size, self.schedule),
            ("ep, zero", self.ep_size, self.zero_stage),
            ("pipeline, recompute", self.pp_size > 1, self.recompute),
            ("engine, zero, accumulated", self.engine, self.zero_stage, self.accumulation > self.pp_size),
        }


def cases(config: Config, world_size: int, which: str = "all") -> list[Case]:
    """Layouts of `world_size` ranks that the configuration's own validation allows.

    `all`: every feasible placement (pp x schedule x ep x zero_stage x shard_size x engine), each with accumulation and
    recomputation: without pipeline, hybrid sharding and DeepSpeed every combination of 1 or 2 micro-batches with none
    or full recomputation, otherwise two combinations of micro-batches (as many as stages or twice that) and none, full
    or selective recomputation, others for the next placement. In one process also bfloat16.
    `quick`: few of them, in which every value of every axis comes, and every pair (pp, schedule) and (ep, zero_stage).
    Otherwise a comma-separated list of names. DeepSpeed is left out of `all` and `quick` where it is not installed.
    Raises ConfigError for a name that is not feasible, with the reason.
    """
    if which not in ("all", "quick"):
        named = [Case.named(name) for name in which.split(",")]
        for case in named:
            case.applied(config, world_size)
        return named
    every = list(_every(config, world_size))
    return every if which == "all" else _covering(every)


def _every(config: Config, world_size: int) -> Iterator[Case]:
    number = 0
    for place in _placements(world_size):
        counts = (place.pp_size, 2 * place.pp_size)
        plain = place == Case(ep_size=place.ep_size, zero_stage=place.zero_stage)
        options = itertools.product(counts, RECOMPUTE[:2]) if plain else zip(counts * 3, RECOMPUTE * 2, strict=True)
        combinations = [replace(place, accumulation=count, recompute=kind) for count, kind in options]
        feasible = [case for case in combinations if case.is_feasible(config, world_size)]
        if not plain and feasible:
            feasible = [feasible[(2 * number + step) % len(feasible)] for step in range(2)]
            number += 1
        yield from feasible
        if plain and world_size == 1:
            yield from (replace(case, bf16=True) for case in feasible)


def _placements(world_size: int) -> Iterator[Case]:
    """Every placement worth asking about: no two the same, none that only names what is not there."""
    sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
    engines = ["torch", "deepspeed"] if find_spec("deepspeed") else ["torch"]
    for pp_size in (n for n in sizes if n <= world_size):
        schedules = SCHEDULES if pp_size > 1 else ("1f1b",)
        stages = (0, 1, 2, 3) if world_size > 1 else (0,)
        hybrids = [n for n in sizes if 1 < n < world_size // pp_size]
        for engine, shard_size, schedule in itertools.product(engines, (None, *hybrids), schedules):
            for ep_size, zero_stage in itertools.product(sizes, stages):
                yield Case(pp_size, schedule, ep_size, zero_stage, shard_size, engine=engine)


def _covering(every: Iterable[Case]) -> list[Case]:
    """Few cases with all features of all, in their order: always the next one that shows most that is new."""
    left = list(every)
    wanted = set().union(*(case.features for case in left))
    chosen = []
    while wanted:
        best = max(left, key=lambda case: len(case.features & wanted))
        wanted -= best.features
        chosen.append(best)
    return sorted(chosen, key=left.index)


def shrunken(config: Config, world_size: int, plant: str | None = None, num_stages: int | None = None) -> Config:
    """The same kind of model, small enough to train in milliseconds: layers, widths and experts shrink; routing,
    balance, optimizer and the pattern of dense and expert layers stay. Initial weights are large, so that routing is
    unbalanced and every loss has gradients worth comparing.

    There are four layers, or as many as `num_stages`: unless given, two for each rank, but no more than 8. A model of
    fewer repeats its pattern. `plant`: a bug that will be planted; options without which it would do nothing are set.
    """
    model = config.model
    num_layers = max(4, min(2 * world_size, 8) if num_stages is None else num_stages)
    num_experts = _few_experts(model, world_size) if model.moe_layers else 0
    dense = [layer for layer in range(num_layers) if not model.has_experts(layer % model.num_hidden_layers)]
    if num_experts:
        # Where experts come only in later layers, they come in the second half.
        dense = dense if len(dense) < num_layers else dense[: num_layers // 2]
    small: dict[str, Any] = {
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
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    tree = config.model_dump()
    tree["model"] |= small
    tree["data"]["max_seq_length"] = 16
    tree["train"] |= {"bf16": False, "pure_bf16": False, "torch_compile": False}
    tree["parallel"] = ParallelConfig().model_dump()
    tree["balance"]["act"] = "off"  # nothing is logged here, so nothing acts
    # AdamW divides by the gradient's own size: entries near zero would show rounding as a full step.
    tree["optimizer"] |= {"adam_epsilon": max(1e-6, config.optimizer.adam_epsilon)}
    for key, value in BUGS.get(plant or "", {}).items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"the small model to verify: {_reason(error)}") from None


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


def _reason(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ")
