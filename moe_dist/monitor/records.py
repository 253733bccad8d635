"""What sinks get: frozen records of plain Python values, ready for JSON.

Those that are numbers through and through are declared in `moe_dist/monitor/metrics.py`, the table of metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from moe_dist.monitor.metric import Record
from moe_dist.monitor.metrics import (
    CheckpointRecord,
    EvalRecord,
    LayerRecord,
    RanksRecord,
    RunSummary,
    TrainRecord,
)

__all__ = [
    "ActionRecord",
    "CheckpointRecord",
    "EvalRecord",
    "FailureRecord",
    "LayerRecord",
    "RanksRecord",
    "Record",
    "RunInfo",
    "RunSummary",
    "TrainRecord",
]


@dataclass(frozen=True)
class ActionRecord(Record):
    """One automatic change of how a layer is balanced (`balance.act`), in effect from the step after."""

    kind: ClassVar[str] = "action"

    step: int
    """Optimizer steps finished when it was decided."""
    layer: int
    """Global number of the block."""
    key: str
    """Configuration key whose value changes for this layer."""
    before: float
    now: float
    reason: str
    """In words."""
    applied: bool = True
    """False: only what would have been done (`balance.act: log`)."""

    @property
    def words(self) -> str:
        """The sentence for people."""
        verb = "raised" if self.now > self.before else "lowered"
        verb = f"is {verb}" if self.applied else f"would be {verb}"
        return f"layer {self.layer}: {self.key} {verb} from {self.before:g} to {self.now:g}: {self.reason}"


@dataclass(frozen=True)
class FailureRecord(Record):
    """A start of the run that did not end by itself, in the words of what had started it."""

    kind: ClassVar[str] = "failure"

    reason: str
    """Which rank, how, in which step and phase."""


@dataclass(frozen=True)
class RunInfo(Record):
    """What is about to run."""

    kind: ClassVar[str] = "run"

    sentence: str
    """The run in one plain sentence."""
    layout: list[str]
    """Lines of a small grid: which rank does what."""
    trainable_params: int
    """Parameters with a gradient, whole model."""
    total_params: int
    """Parameters, whole model."""
    active_params: int
    """Parameters one token passes through."""
    config_text: str
    """The resolved configuration as YAML."""
    output_dir: str
    """Run folder."""
    world_size: int
    """Number of ranks."""
    device: str
    """`cpu`, `cuda`, or a longer name."""
    device_name: str = ""
    """As its driver calls it; empty on a CPU."""
    memory_before: int = 0
    """Bytes of the reporting rank's peak memory before it made the model: Python and libraries."""
    hosts: list[str] = field(default_factory=list)
    """Host of each rank."""
    stage_of_rank: list[int] = field(default_factory=list)
    """Pipeline stage of each rank (its `pp` coordinate, when it has several); all 0 without a pipeline."""
    stage_of_layer: list[int] = field(default_factory=list)
    """The same of each block."""
    domains: list[str] = field(default_factory=list)
    """Names of the sources of the training data; empty unless there are several."""
    run_id: str = ""
    """Of the run, over all its starts; drawn by chance."""
    pretrained: dict[str, Any] = field(default_factory=dict)
    """Where the weights of step 0 come from: `folder`, `revision` where it is known, and `files`, name to SHA-256."""
    start_step: int = 0
    """Optimizer steps finished when this start began: those of the checkpoint it goes on from."""
    start_tokens: int = 0
    """Tokens consumed by then."""
    start_skipped_steps: int = 0
    """Steps skipped by then."""

    @property
    def label(self) -> str:
        """The run's name wherever runs meet (Prometheus, TensorBoard): two that are called alike differ."""
        name = Path(self.output_dir).resolve().name
        return f"{name}-{self.run_id[:8]}" if self.run_id else name
