"""Which layouts `moe-dist verify` tries, and the small model it tries them on. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moe_dist.config import Config
from moe_dist.config_loading import ConfigError

BUGS = (
    "expert_gradient_times_ep",
    "expert_gradient_averaged_over_edp",
    "expert_gradient_averaged_over_active_replicas",
    "loss_by_local_tokens",
    "auxiliary_loss_by_local_tokens",
    "auxiliary_loss_times_micro_batches",
    "norm_without_experts",
    "norm_counts_replicas",
    "router_cut_from_loss",
    "auxiliary_loss_cut",
    "global_load_is_local",
    "load_of_the_whole_batch_unknown",
    "bias_from_counts_after_drop",
    "bias_from_local_counts",
    "seeds_by_local_expert",
    "capacity_of_the_whole_group",
)
"""Known bugs of parallel trainers that `moe-dist verify --plant` can plant; they are in `plants.py`."""


@dataclass(frozen=True)
class Case:
    """One way to spread the same training over all ranks. `name` says it in one word per axis."""

    ep_size: int
    zero_stage: int
    accumulation: int
    recompute: str

    @property
    def name(self) -> str:
        parts = [f"ep{self.ep_size}", f"zero{self.zero_stage}"]
        parts += [f"acc{self.accumulation}"] if self.accumulation > 1 else []
        parts += [self.recompute] if self.recompute != "none" else []
        return "-".join(parts)

    def applied(self, config: Config) -> Config:
        """`config` in this layout."""
        changed = config.model_copy(deep=True)
        changed.parallel.ep_size, changed.parallel.zero_stage = self.ep_size, self.zero_stage  # type: ignore[assignment]
        changed.train.gradient_checkpointing = self.recompute  # type: ignore[assignment]
        return changed


def cases(config: Config, world_size: int, which: str = "all") -> list[Case]:
    """Every feasible layout of `world_size` ranks, or those of a comma-separated list of names or `quick`.

    `quick` covers every value of every axis at least once. Raises ConfigError for a name that is not feasible.
    """
    ep_sizes = [n for n in range(1, world_size + 1) if world_size % n == 0 and config.model.num_experts % n == 0]
    if not config.model.moe_layers:
        ep_sizes = [1]
    stages = (0, 1, 2, 3) if world_size > 1 and config.optimizer.optim != "adafactor" else (0,)
    every = [Case(*values) for values in itertools.product(ep_sizes, stages, (1, 2), ("none", "full"))]
    if which == "all":
        return every
    if which == "quick":
        return list(_covering(every))
    by_name = {case.name: case for case in every}
    for name in which.split(","):
        if name not in by_name:
            raise ConfigError(f"--layouts {name}: not feasible here; allowed: all, quick, {', '.join(by_name)}")
    return [by_name[name] for name in which.split(",")]


def _covering(every: list[Case]) -> Iterator[Case]:
    """Cases such that every pair (ep_size, zero_stage) comes, with the other axes alternating."""
    for number, (_, group) in enumerate(itertools.groupby(every, key=lambda case: (case.ep_size, case.zero_stage))):
        yield list(group)[number % 4]


def shrunken(config: Config, world_size: int) -> Config:
    """The same kind of model, small enough to train in milliseconds: layers, widths and experts shrink; routing,
    balance, optimizer and the pattern of dense and expert layers stay. Initial weights are large, so that routing is
    unbalanced and every loss has gradients worth comparing.
    """
    model = config.model
    num_layers = min(model.num_hidden_layers, 4)
    num_experts = 0
    if model.moe_layers:
        num_experts = min(model.num_experts, max(8, 2 * world_size))
        num_experts -= num_experts % model.n_group
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
        "num_experts_per_tok": max(1, min(model.num_experts_per_tok, num_experts // 2)),
        "mlp_only_layers": [layer for layer in model.mlp_only_layers if layer < num_layers],
        "shared_expert_intermediate_size": 16 if model.shared_expert_intermediate_size else 0,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    tree = config.model_dump()
    tree["model"] |= small
    tree["data"]["max_seq_length"] = 16
    tree["train"] |= {"bf16": False, "pure_bf16": False, "torch_compile": False}
    tree["parallel"] |= {
        "ep_size": 1,
        "pp_size": 1,
        "stages": None,
        "zero_stage": 0,
        "shard_size": None,
        "cpu_offload": False,
    }
    # AdamW divides by the gradient's own size: entries near zero would show rounding as a full step.
    tree["optimizer"] |= {"adam_epsilon": max(1e-6, config.optimizer.adam_epsilon)}
    return Config.model_validate(tree)
