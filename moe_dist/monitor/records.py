"""What the sinks are told: frozen records of plain Python values, ready for JSON.

Units are in the field docstrings: seconds, bytes, tokens, natural logarithms (nats), shares from 0 to 1.
A loss is nats per token. `docs/metrics.md` is the page for users.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class LayerRecord:
    """One mixture-of-experts layer over one logging interval, all ranks together."""

    layer: int
    """Global number of the block, from 0."""
    tokens_per_expert: list[int]
    """(token, expert) pairs routed to each expert, before any drop."""
    load_imbalance: float
    """Largest load / mean load; 1.0: balanced, E / top_k at worst; 0.0: nothing was routed."""
    load_cv: float
    """Coefficient of variation, standard deviation / mean of the loads; 0.0: balanced."""
    load_entropy: float
    """Entropy of the loads / ln E; 1.0: uniform; 0.0 too when nothing was routed."""
    dead_experts: int
    """Experts that no token chose in the interval."""
    dropped_fraction: float
    """Pairs that found no place / (tokens * top_k), 0..1."""
    aux_loss: float
    """Load-balancing loss, mean over tokens, unweighted; 1.0: balanced."""
    z_loss: float
    """Squared log-sum-exp of the router's logits, mean over tokens, unweighted."""
    router_entropy: float
    """Entropy in nats of a token's router scores, mean over tokens."""
    router_confidence: float = 0.0
    """Largest of a token's router scores, mean over tokens, 1 / E .. 1; 0.0 in logs older than this field."""
    rank_imbalance: float = 0.0
    """Load of the busiest of the ranks that share the experts / their mean; 1.0: balanced; 0.0: nothing was routed."""
    router_logits_rms: float = 0.0
    """Root mean square of the router's logits over tokens and experts; 0.0 in logs older than this field."""
    kept_per_expert: list[int] = field(default_factory=list)
    """As `tokens_per_expert`, after the drop; empty when nothing was dropped."""
    domain_tokens: list[list[int]] = field(default_factory=list)
    """As `tokens_per_expert`, of each named source of data; empty unless there are several."""
    top_k: int = 0
    """Experts of each token; 0 in logs older than this field."""
    fallback_tokens: int = 0
    """Tokens whose router logits were not finite, and that went to `balance.fallback_expert`."""


@dataclass(frozen=True)
class RanksRecord:
    """Every rank over one logging interval: lists in order of rank. Seconds are per optimizer step."""

    own_seconds: list[float]
    """Seconds of a step in which the rank waited for no other: data, computing, weights. Median over the steps."""
    phase_seconds: dict[str, list[float]]
    """Mean seconds of a step in `data`, `computing`, `all_to_all`, `gradients`, `optimizer` and `agreeing`."""
    received_rows: list[int]
    """Rows that came for the rank's experts in the interval, 0 without expert parallelism."""
    sent_bytes: list[int]
    """Bytes sent to other ranks by all-to-all in the interval."""
    memory_bytes: list[int]
    """Peak memory: allocated on CUDA, resident set size on CPU."""
    rows_to: list[list[int]] = field(default_factory=list)
    """For each rank, rows it sent to each rank of its expert-parallel group, itself included; empty without."""
    bytes_to: list[list[int]] = field(default_factory=list)
    """For each rank, bytes it sent by all-to-all to each rank of its expert-parallel group, 0 to itself."""
    dispatch_seconds: list[float] = field(default_factory=list)
    """Mean seconds of a step in which rows went to their experts, and their gradients back; device time on CUDA."""
    combine_seconds: list[float] = field(default_factory=list)
    """Mean seconds of a step in which rows came home, and their gradients back; device time on CUDA."""


class Record:
    """A record that knows its name in `metrics.jsonl`."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The fields and `kind`; nested records become dicts. Floats stay floats, NaN and infinity too.

        Lists of numbers are the record's own, to be written and not to be changed: copying them takes longer.
        """
        return {"kind": self.kind} | _plain(self)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """The record of a row of `metrics.jsonl`; what another version wrote more is left out."""
        return known(cls, row)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, list) and value and is_dataclass(value[0]):
        return [_plain(item) for item in value]
    return value


def known(kind: type[Any], row: Mapping[str, Any]) -> Any:
    """The dataclass with those of the row's values that it has a field for."""
    names = {item.name for item in fields(kind)}
    return kind(**{key: value for key, value in row.items() if key in names})


@dataclass(frozen=True)
class TrainRecord(Record):
    """One logging interval of training."""

    kind: ClassVar[str] = "train"

    step: int
    """Optimizer steps finished."""
    max_steps: int | None
    """Optimizer steps of the whole run; None when time decides."""
    epoch: float
    """Passes over the training data, with fraction."""
    loss: float
    """Cross-entropy in nats per token, without auxiliary losses."""
    learning_rate: float
    """Learning rate of the last step."""
    grad_norm: float
    """Global norm of the gradient before clipping, last step."""
    tokens: int
    """Tokens consumed since the start of the run, all ranks."""
    tokens_per_second: float
    """Throughput of the interval, all ranks."""
    step_seconds: float
    """Seconds per optimizer step, mean over the interval."""
    all_to_all_share: float
    """Share of step time in dispatch and combine, 0..1, of the rank that waits least there."""
    data_wait_share: float
    """Share of step time spent waiting for a batch, 0..1, of the rank that waits longest."""
    skipped_steps: int
    """Optimizer steps skipped since the start of the run for a non-finite loss or gradient."""
    elapsed_seconds: float
    """Seconds of training, over all starts of the run."""
    remaining_seconds: float | None
    """Expected seconds to the end; None when unknown."""
    memory_bytes: int
    """Peak memory of the reporting rank: allocated on CUDA, resident set size on CPU."""
    layers: list[LayerRecord] = field(default_factory=list)
    """One record per mixture-of-experts layer."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of the interval in each phase, mean over ranks: those of `RanksRecord`, `logging`, `evaluation`,
    `checkpoint`."""
    flops_per_second: float = 0.0
    """Floating-point operations per second that the model needs, all ranks, by its active parameters."""
    tokens_per_second_per_device: float = 0.0
    """`tokens_per_second` / ranks."""
    loss_std: float = 0.0
    """Standard deviation of the finite losses of the interval's steps; 0.0 when there are fewer than two."""
    samples_per_second: float | None = None
    """Sequences per second, all ranks; None in logs older than this field."""
    device_utilisation: float | None = None
    """Share of the last second in which the reporting rank's GPU had work, 0..1; None when it cannot be asked."""
    mfu: float | None = None
    """`flops_per_second` / (ranks * peak of the device), 0..1; None when the peak is not known."""
    all_to_all_bytes: int = 0
    """Bytes that all ranks together sent to other ranks by all-to-all, per optimizer step."""
    all_to_all_bytes_between_hosts: int = 0
    """The part of them that went to another host; the rest stayed inside one."""
    dispatch_seconds: float = 0.0
    """Seconds of a step in which rows went to their experts, and their gradients back, mean over ranks."""
    combine_seconds: float = 0.0
    """Seconds of a step in which rows came home, and their gradients back, mean over ranks."""
    row_imbalance: float = 0.0
    """Rows received by the busiest rank / mean of the ranks; 1.0: balanced; 0.0: no expert parallelism."""
    imbalance_seconds: float = 0.0
    """The imbalance tax: estimated seconds of a step in which ranks wait for the one with most rows."""
    slowest_rank_ratio: float = 0.0
    """Own seconds of the slowest rank / median of the others like it; 0.0: nothing to compare."""
    stragglers: list[int] = field(default_factory=list)
    """Ranks that have been slow for three intervals."""
    ranks: RanksRecord | None = None
    """Every rank; None in logs older than this field."""
    steps: dict[str, list[float]] = field(default_factory=dict)
    """`loss`, `learning_rate`, `grad_norm` and `tokens_per_second` of each step of the interval, up to `step`."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        nested = {"layers": [known(LayerRecord, layer) for layer in row["layers"]]}
        if row.get("ranks") is not None:
            nested["ranks"] = known(RanksRecord, row["ranks"])
        return known(cls, {**row, **nested})


@dataclass(frozen=True)
class EvalRecord(Record):
    """One pass over the validation set."""

    kind: ClassVar[str] = "eval"

    step: int
    """Optimizer steps finished."""
    loss: float
    """Cross-entropy in nats per token."""
    perplexity: float
    """exp(loss)."""
    tokens: int
    """Tokens the loss is a mean over, all ranks."""
    seconds: float
    """Duration of the evaluation."""
    unigram_loss: float | None = None
    """Loss in nats of a model that knows token frequencies only: the baseline; None when not computed."""
    is_best: bool = False
    """Lowest validation loss so far."""


@dataclass(frozen=True)
class CheckpointRecord(Record):
    """One checkpoint, written or failed."""

    kind: ClassVar[str] = "checkpoint"

    step: int
    """Optimizer steps in it."""
    seconds: float
    """From the start of saving until it was complete, or had failed."""
    blocked_seconds: float
    """Part of `seconds` in which training waited."""
    bytes: int
    """Size on disk, all ranks; 0 when it failed."""
    path: str
    """Where it is, or was to be."""
    ok: bool = True
    """Whether it is complete and can be loaded."""
    reason: str = ""
    """Why it was saved (`save_steps`, `end`, a signal); when it failed, what went wrong."""


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
    hosts: list[str] = field(default_factory=list)
    """Host of each rank."""
    stage_of_rank: list[int] = field(default_factory=list)
    """Pipeline stage of each rank (its place in the pipeline, when it has several); all 0 without a pipeline."""
    stage_of_layer: list[int] = field(default_factory=list)
    """The same of each block."""
    domains: list[str] = field(default_factory=list)
    """Names of the sources of the training data; empty unless there are several."""
    run_id: str = ""
    """Of the run, over all its starts; drawn by chance."""
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


@dataclass(frozen=True)
class RunSummary(Record):
    """How a run ended."""

    kind: ClassVar[str] = "summary"

    steps: int
    """Optimizer steps finished."""
    seconds: float
    """Seconds of training, over all starts of the run."""
    initial_loss: float | None
    """First training loss, nats per token."""
    final_loss: float | None
    """Last training loss, nats per token."""
    best_eval_loss: float | None
    """Lowest validation loss, nats per token."""
    unigram_loss: float | None
    """Baseline for the validation loss, nats per token."""
    tokens: int
    """Tokens consumed, all ranks."""
    tokens_per_second: float
    """Mean throughput, all ranks."""
    skipped_steps: int
    """Optimizer steps skipped for a non-finite loss or gradient."""
    reason: str
    """Why it ended, in words."""
    failed: bool = False
    """It stopped itself for a reason that a person must look at."""
    paths: dict[str, str] = field(default_factory=dict)
    """What was written: name -> path."""
    sample_before: str | None = None
    """Text generated before training."""
    sample_after: str | None = None
    """Text generated after training."""
    layers: list[LayerRecord] = field(default_factory=list)
    """Expert load of the last logging interval."""
