"""A checkpoint with the busiest experts alone: which they are by the run's own log, and their weights renumbered."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_dist.checkpoint.reading import CheckpointRef
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import Manifest
from moe_dist.config import ConfigError, ModelConfig
from moe_dist.monitor.run_log import read_run
from moe_dist.pretrained.saved_weights import SavedWeights

NUM_RECORDS = 20
"""Newest records of load that count: the router of long ago was another."""
_OF_EXPERTS = re.compile(r"layers\.(\d+)\.moe\.(?:experts|router)\.")
"""Our tensors whose first dimension counts experts."""


@dataclass(frozen=True)
class Kept:
    """The experts that stay. `experts`: of each layer, ascending; `share`: of all (token, expert) pairs they had.

    `steps`: first and last record that was counted.
    """

    experts: dict[int, list[int]]
    share: float
    steps: tuple[int, int]

    @property
    def number(self) -> int:
        """Of each layer."""
        return len(next(iter(self.experts.values())))


def busiest(run: Path, step: int, model: ModelConfig, number: int) -> Kept:
    """The `number` experts of each layer with the most tokens in the last records of `run` up to `step`.

    Raises ConfigError where no load was recorded, and for a number that the model cannot have.
    """
    said = f"--drop-experts {number}"
    if not model.moe_layers:
        raise ConfigError(f"{said}: the model has no experts")
    if number >= model.num_experts:
        raise ConfigError(f"{said}: not fewer than the {model.num_experts} there are; it says how many stay")
    if number < model.num_experts_per_tok:
        raise ConfigError(f"{said}: a token goes to {model.num_experts_per_tok} experts; keep at least so many")
    if model.n_group > 1:
        raise ConfigError(f"{said}: experts stand in {model.n_group} groups, which would be others")
    try:
        loads, steps = recorded_load(run, step, model)
    except ConfigError as error:
        raise ConfigError(f"{said}: {error}") from error
    kept = {
        layer: sorted(sorted(range(len(load)), key=lambda e, load=load: -load[e])[:number])  # type: ignore[misc]
        for layer, load in loads.items()
    }
    had = sum(loads[layer][e] for layer, experts in kept.items() for e in experts)
    return Kept(kept, had / sum(map(sum, loads.values())), steps)


def recorded_load(run: Path, step: int, model: ModelConfig) -> tuple[dict[int, list[int]], tuple[int, int]]:
    """Layer to (token, expert) pairs of each expert in the last records of `run` up to `step`, with the first and last
    step of these. Raises ConfigError where no load was recorded."""
    none = f"{run} has no load of experts up to step {step}"
    try:
        log = read_run(run)
    except ConfigError as error:
        raise ConfigError(f"{none}: {error}") from error
    rows = (row for row in log.rows if row["kind"] == "train" and row["layers"] and row["step"] <= step)
    records = deque(((row["step"], log.layers(row)) for row in rows), maxlen=NUM_RECORDS)
    loads = {layer: [0] * model.num_experts for layer in model.moe_layers}
    for at, layers in records:
        for record in layers:
            mine, counts = loads.get(record.layer), record.tokens_per_expert
            if mine is None or len(mine) != len(counts):
                raise ConfigError(f"{none}: that of step {at} is of another model")
            loads[record.layer] = [sum(pair) for pair in zip(mine, counts, strict=True)]
    idle = [layer for layer, load in loads.items() if not sum(load)]
    if idle:
        raise ConfigError(f"{none}{f', layer {idle[0]}' if records else ''}")
    return loads, (records[0][0], records[-1][0])


class FewerExperts(SavedWeights):
    """The weights of a checkpoint without some experts: the others in their order, with their rows of the router."""

    def __init__(
        self,
        found: CheckpointRef,
        manifest: Manifest,
        keys: Keys,
        config: ModelConfig,
        dtype: torch.dtype | None,
        kept: Kept,
    ) -> None:
        """`config`: of the checkpoint. Raises as `SavedWeights` does."""
        self.kept, self.whole = kept, SavedWeights(found, manifest, keys, config, dtype)
        fewer = config.model_copy(update={"num_experts": kept.number})
        super().__init__(found, manifest, keys, fewer, dtype)

    def close(self) -> None:
        """Let go of the open files."""
        self.whole.close()
        super().close()

    def _box(self, ours: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        match = _OF_EXPERTS.match(ours)
        if match is None:
            return super()._box(ours, offset, size)
        experts = self.kept.experts[int(match[1])][offset[0] : offset[0] + size[0]]
        return torch.cat([super(FewerExperts, self)._box(ours, (e, *offset[1:]), (1, *size[1:])) for e in experts])
