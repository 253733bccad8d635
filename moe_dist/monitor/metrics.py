"""Every number that a run reports: the one table of metrics.

A metric is a field of a record below, and its annotation says all there is to know about it. Its name is the field's,
also in `metrics.jsonl`. The sinks, the report and the tables in `docs/metrics.md` read this one; nothing is named a
second time. What no record has, such as the time of the last step, stands at the end.

`Metric(help, unit, TensorBoard tag, Prometheus gauge, ...)`. Seconds, bytes, tokens, natural logarithms (nats), shares
from 0 to 1. "All ranks": summed over them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

from moe_dist.monitor.metric import Metric, Record, Series, known


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def in_names(numbers: Mapping[str, float]) -> dict[str, float]:
    """With keys that a name of Prometheus can hold."""
    return {re.sub(r"\W+", "_", name): number for name, number in numbers.items()}


def first(values: Sequence[float]) -> float:
    """That of rank 0, which reports."""
    return values[0]


_OF_PREFERENCES = "Null where no preferences are learned."
LAYER, EXPERT = ("layer",), ("layer", "expert")
"""Labels of Prometheus."""

# The table is laid out by hand: a metric is one statement of few lines.
# fmt: off


@dataclass(frozen=True)
class LayerRecord:
    """One mixture-of-experts layer over one logging interval, all ranks together; 0.0: nothing was routed.

    E experts, K of them for each of T tokens, n_e pairs (a token sent to an expert) for expert e, m the mean of n_e.
    """

    labels: ClassVar = LAYER

    layer: Annotated[int, Metric("Global number of the block, from 0.")]
    tokens_per_expert: Annotated[list[int], Metric(
        "(token, expert) pairs routed to each expert.", note="n_0 ... n_(E-1), before any drop; in TensorBoard the "
        "histograms `moe/layer_NN/tokens_per_expert` and the picture `moe/expert_load`.", more=(
            Series("expert_tokens", "(token, expert) pairs routed since this start of the run.", "counter", EXPERT),
            Series("expert_load_ratio", "Load / the layer's mean load; 1: fair share.", "gauge", EXPERT)))]
    load_imbalance: Annotated[float, Metric(
        "Largest expert load / mean load; 1: balanced.", tag="moe/load_imbalance", gauge="load_imbalance_ratio",
        reduce=mean, chart="load imbalance", note="max n_e / m; E / K at worst.")]
    load_cv: Annotated[float, Metric(
        "Standard deviation / mean of expert loads; 0: balanced.", tag="moe/load_cv", gauge="load_cv_ratio",
        reduce=mean, note="sqrt(mean (n_e - m)^2) / m; sqrt(E / K - 1) at worst.")]
    load_entropy: Annotated[float, Metric(
        "Entropy of expert loads / ln E; 1: balanced.", tag="moe/load_entropy", gauge="load_entropy_ratio",
        reduce=mean, chart="entropy of loads", note="-sum p_e ln p_e / ln E, p_e = n_e / sum n; ln K / ln E at worst.")]
    dead_experts: Annotated[int, Metric(
        "Experts that no token chose in the last logging interval.", tag="moe/dead_experts", gauge="dead_experts",
        reduce=sum, note="Number of e with n_e = 0; E - K at worst.")]
    dropped_fraction: Annotated[float, Metric(
        "Share of (token, expert) pairs that found no place.", "0..1", "moe/dropped_fraction", "dropped_ratio",
        reduce=mean, note="Pairs over capacity / (T K).")]
    aux_loss: Annotated[float, Metric(
        "Load-balancing loss, unweighted; 1: balanced.", tag="moe/load_balancing_loss", gauge="load_balancing_loss",
        reduce=mean, note="Mean over tokens; E / K at worst.")] = 0.0
    z_loss: Annotated[float, Metric(
        "Mean squared log-sum-exp of the router's logits, unweighted.", tag="moe/z_loss", gauge="router_z_loss",
        reduce=mean, note="Mean over tokens of logsumexp(logits)^2.")] = 0.0
    router_entropy: Annotated[float, Metric(
        "Mean entropy of a token's router scores.", "nats", "moe/router_entropy", "router_entropy_nats", reduce=mean,
        chart="router entropy, nats", note="-sum s ln s, s the router's scores: from 0 to ln E.")] = 0.0
    router_confidence: Annotated[float, Metric(
        "Mean of the largest of a token's router scores.", "0..1", "moe/router_confidence", "router_confidence_ratio",
        reduce=mean, note="Mean over tokens of max s: from 1 / E to 1.")] = 0.0
    rank_imbalance: Annotated[float, Metric(
        "Load of the busiest rank / mean of ranks; 1: balanced.", tag="moe/rank_imbalance",
        gauge="rank_imbalance_ratio", reduce=mean, note="As `load_imbalance`, of the sums of the ranks that share the "
        "experts; `parallel.ep_size` at worst.")] = 0.0
    rank_imbalance_in_order: Annotated[float, Metric(
        "rank_imbalance if ranks held the experts in the order of their ids.", tag="moe/rank_imbalance_in_order",
        gauge="rank_imbalance_in_order_ratio", reduce=mean, note="The same as `rank_imbalance` with "
        "`parallel.expert_placement: off` and no copies: what these spare is the difference; 0 in older logs.")] = 0.0
    expert_ranks: Annotated[list[int], Metric(
        "Rank of its expert group that holds each expert; empty: in blocks in the order of their ids.", more=(
            Series("expert_rank", "Rank of its expert group that holds the expert (parallel.expert_placement).",
                   "gauge", EXPERT),))] = field(default_factory=list)
    copied_experts: Annotated[list[int], Metric(
        "Experts that every rank of a group computes for its own tokens (`parallel.replicated_experts`); empty: none.",
        note="In `rank_imbalance` each rank has as many of their tokens; how many it has is in `received_rows`.",
        )] = field(default_factory=list)
    router_logits_rms: Annotated[float, Metric(
        "Root mean square of the router's logits.", tag="moe/router_logits_rms", gauge="router_logits_rms", reduce=mean,
        note="sqrt(mean over tokens and experts of logits^2): grows before a router saturates.")] = 0.0
    kept_per_expert: Annotated[list[int], Metric(
        "As `tokens_per_expert`, after the drop; empty when nothing was dropped.")] = field(default_factory=list)
    domain_tokens: Annotated[list[list[int]], Metric(
        "As `tokens_per_expert`, a list for each named source of data; empty unless there are several.",
        note="[Below](#routing-by-domain).")] = field(default_factory=list)
    top_k: Annotated[int, Metric("Experts of each token, K; 0 in older logs.")] = 0
    fallback_tokens: Annotated[int, Metric(
        "Tokens whose router logits were not finite, and that went to `balance.fallback_expert`.", "tokens", more=(
            Series("fallback_tokens", "Tokens with router logits that were not finite, since this start of the run.",
                   "counter", LAYER),))] = 0


@dataclass(frozen=True)
class RanksRecord:
    """Every rank over one logging interval: lists in order of rank. Seconds are per optimizer step."""

    labels: ClassVar = ("stage",)

    own_seconds: Annotated[list[float], Metric(
        "Own seconds of a step, mean over the stage's ranks.", "s", gauge="stage_own_seconds", reduce=mean,
        note="Of a rank: where it waited for no other (`data`, `computing`, `optimizer`), median of the steps.")]
    phase_seconds: Annotated[dict[str, list[float]], Metric(
        "Mean seconds of a step in each of the phases `data`, `computing`, `all_to_all`, `gradients`, `optimizer` and "
        "`agreeing`.", "s")]
    received_rows: Annotated[list[int], Metric(
        "Rows that came for the rank's experts in the interval, 0 without expert parallelism.", "rows")]
    sent_bytes: Annotated[list[int], Metric("Bytes sent to other ranks by all-to-all in the interval.", "bytes")]
    memory_bytes: Annotated[list[int], Metric(
        "Peak memory, the highest of the stage's ranks.", "bytes", gauge="stage_memory_peak_bytes", reduce=max,
        note="Of a rank: allocated on CUDA, resident set on CPU.")]
    rows_to: Annotated[list[list[int]], Metric(
        "Rows that each rank sent to each rank of its expert-parallel group, itself included; empty without.",
        "rows")] = field(default_factory=list)
    bytes_to: Annotated[list[list[int]], Metric(
        "Bytes that each rank sent by all-to-all to each rank of its expert-parallel group, 0 to itself.",
        "bytes")] = field(default_factory=list)
    dispatch_seconds: Annotated[list[float], Metric(
        "Mean seconds of a step in which rows went to their experts, and their gradients back; device time on CUDA.",
        "s")] = field(default_factory=list)
    combine_seconds: Annotated[list[float], Metric(
        "Mean seconds of a step in which rows came home, and their gradients back; device time on CUDA.",
        "s")] = field(default_factory=list)


@dataclass(frozen=True)
class TrainRecord(Record):
    """One logging interval of training. Made by `train.reporting`."""

    kind: ClassVar[str] = "train"

    step: Annotated[int, Metric(
        "Optimizer steps finished by the run, over all its starts.", "steps", gauge="run_steps", more=(
            Series("steps", "Optimizer steps finished in this start of the run.", "counter"),))]
    max_steps: Annotated[int | None, Metric(
        "Optimizer steps of the whole run.", "steps", gauge="max_steps", note="null when time decides.")]
    epoch: Annotated[float, Metric(
        "Passes over the training data.", "passes", "train/epoch", "epoch", note="With fraction.")]
    loss: Annotated[float, Metric(
        "Training loss of the last logged step, nats per token.", "nats/token", "train/loss", "train_loss",
        note="Cross-entropy, or of preferences the DPO loss per pair, without auxiliary losses.")]
    learning_rate: Annotated[float, Metric(
        "Learning rate of the last step.", "", "train/learning_rate", "learning_rate")]
    grad_norm: Annotated[float, Metric(
        "Global gradient norm before clipping, last step.", "", "train/grad_norm", "grad_norm", note="L2.")]
    tokens: Annotated[int, Metric(
        "Tokens consumed by the run, over all its starts, all ranks.", "tokens", "train/tokens", "run_tokens", more=(
            Series("tokens", "Tokens consumed in this start of the run, all ranks.", "counter"),))]
    tokens_per_second: Annotated[float, Metric(
        "Throughput of the last logging interval, all ranks.", "tokens/s", "perf/tokens_per_second",
        "tokens_per_second")]
    step_seconds: Annotated[float, Metric(
        "Seconds per optimizer step, mean of the last logging interval.", "s", "perf/step_time_seconds",
        "step_seconds")]
    all_to_all_share: Annotated[float, Metric(
        "Share of step time in dispatch and combine, of the rank that waits least.", "0..1", "perf/all_to_all_share",
        "all_to_all_ratio", note="[Below](#what-waits-for-whom).")]
    data_wait_share: Annotated[float, Metric(
        "Share of step time waiting for a batch, of the rank that waits longest.", "0..1", "perf/data_wait_fraction",
        "data_wait_ratio", note="[Below](#what-waits-for-whom).")]
    skipped_steps: Annotated[int, Metric(
        "Steps skipped by the run, over all its starts, for a non-finite loss or gradient.", "steps",
        "train/skipped_steps", more=(
            Series("skipped_steps", "Steps skipped in this start for a non-finite loss or gradient.", "counter"),))]
    elapsed_seconds: Annotated[float, Metric("Seconds of training, over all starts of the run.", "s")]
    remaining_seconds: Annotated[float | None, Metric(
        "Expected seconds to the end of the run.", "s", gauge="remaining_seconds", note="null when unknown.")]
    memory_bytes: Annotated[int, Metric(
        "Peak memory of the reporting rank.", "bytes", "perf/memory_peak_bytes", "memory_peak_bytes", reduce=first,
        note="Allocated on CUDA, resident set on CPU.")]
    layers: Annotated[list[LayerRecord], Metric(
        "A list, one object for each expert layer.", note="[Below](#layers-one-expert-layer-over-one-interval).")] = (
        field(default_factory=list))
    phase_seconds: Annotated[dict[str, float], Metric(
        "Seconds of the last logging interval in this phase, mean over ranks.", "s", "time/{}_seconds",
        "phase_{}_seconds", note="An object: [below](#where-the-time-goes).")] = field(default_factory=dict)
    flops_per_second: Annotated[float, Metric(
        "Floating-point operations the model needs, all ranks.", "FLOP/s", "perf/model_flops_per_second",
        "model_flops_per_second", note="[Below](#model-flop-utilisation).")] = 0.0
    tokens_per_second_per_device: Annotated[float, Metric(
        "Throughput / ranks.", "tokens/s", "perf/tokens_per_second_per_device", "tokens_per_second_per_device")] = 0.0
    loss_std: Annotated[float, Metric(
        "Standard deviation of the losses of the interval's steps.", "nats/token", "train/loss_std", "train_loss_std",
        note="Of the finite ones; 0: fewer than two.")] = 0.0
    samples_per_second: Annotated[float | None, Metric(
        "Sequences per second of the last logging interval, all ranks.", "sequences/s", "perf/samples_per_second",
        "samples_per_second")] = None
    device_utilisation: Annotated[float | None, Metric(
        "Share of the last second in which the GPU had work.", "0..1", "perf/device_utilisation",
        "device_utilisation_ratio", note="That of the reporting rank, by NVML (needs `nvidia-ml-py`); null where it "
        "cannot be asked.")] = None
    mfu: Annotated[float | None, Metric(
        "Model FLOP utilisation: model_flops_per_second / peak of all devices.", "0..1", "perf/mfu", "mfu_ratio",
        note="[Below](#model-flop-utilisation); null where no peak is known.")] = None
    all_to_all_bytes: Annotated[int, Metric(
        "Bytes that all ranks sent to others by all-to-all, per step.", "bytes", "perf/all_to_all_bytes",
        "all_to_all_bytes")] = 0
    all_to_all_bytes_between_hosts: Annotated[int, Metric(
        "The part of them that went to another host.", "bytes", "perf/all_to_all_bytes_between_hosts",
        "all_to_all_bytes_between_hosts", note="The rest stayed inside one.")] = 0
    dispatch_seconds: Annotated[float, Metric(
        "Seconds of a step in all-to-all to the experts, mean over ranks.", "s", "perf/dispatch_seconds",
        "dispatch_seconds", reduce=mean, note="In both directions.")] = 0.0
    combine_seconds: Annotated[float, Metric(
        "Seconds of a step in all-to-all back home, mean over ranks.", "s", "perf/combine_seconds",
        "combine_seconds", reduce=mean, note="In both directions.")] = 0.0
    row_imbalance: Annotated[float, Metric(
        "Rows received by the busiest rank / mean; 1: balanced.", "", "perf/row_imbalance", "row_imbalance_ratio",
        note="0: no expert parallelism.")] = 0.0
    imbalance_seconds: Annotated[float, Metric(
        "Estimated seconds of a step spent waiting for the busiest rank.", "s", "perf/imbalance_tax_seconds",
        "imbalance_tax_seconds", note="[The imbalance tax](#the-imbalance-tax).")] = 0.0
    slowest_rank_ratio: Annotated[float, Metric(
        "Own seconds of the slowest rank / median of the others.", "", "perf/slowest_rank_ratio",
        "slowest_rank_ratio", note="0: nobody to compare.")] = 0.0
    stragglers: Annotated[list[int], Metric(
        "Ranks that have been slow for 3 intervals.", "ranks", "perf/stragglers", "stragglers", value=len,
        note="A list, elsewhere how many: [below](#stragglers).")] = field(default_factory=list)
    ranks: Annotated[RanksRecord | None, Metric(
        "Every rank.", note="Lists in order of rank: [below](#ranks-every-rank-over-one-interval).")] = None
    rewards_chosen: Annotated[float | None, Metric(
        "Reward of chosen answers, beta (log p - log r), mean over the interval's pairs.", "nats", "rewards/chosen",
        "reward_chosen", note=_OF_PREFERENCES)] = None
    rewards_rejected: Annotated[float | None, Metric(
        "Reward of rejected answers, mean over the interval's pairs.", "nats", "rewards/rejected", "reward_rejected",
        note=_OF_PREFERENCES)] = None
    reward_margin: Annotated[float | None, Metric(
        "Reward of the chosen answer - reward of the rejected one, mean over the interval's pairs.", "nats",
        "rewards/margins", "reward_margin", note=_OF_PREFERENCES)] = None
    reward_accuracy: Annotated[float | None, Metric(
        "Share of the interval's pairs whose chosen answer has the larger reward.", "0..1", "rewards/accuracies",
        "reward_accuracy_ratio", note=_OF_PREFERENCES)] = None
    steps: Annotated[dict[str, list[float]], Metric(
        "`loss`, `learning_rate`, `grad_norm`, `tokens_per_second`, rewards of each step of the interval, to `step`.",
        note="Lists by name; TensorBoard has an event for each step under their tags.")] = field(default_factory=dict)

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

    step: Annotated[int, Metric("Optimizer steps finished.", "steps")]
    loss: Annotated[float, Metric(
        "Loss on the validation set, nats per token.", "nats/token", "eval/loss", "validation_loss",
        note="Cross-entropy.")]
    perplexity: Annotated[float | None, Metric(
        "exp(loss).", "", "eval/perplexity", note="Null of preferences, whose loss is of no token.")]
    tokens: Annotated[int, Metric(
        "Tokens that the loss is a mean over, all ranks.", "tokens", note="Of preferences, pairs.")]
    seconds: Annotated[float, Metric("Duration of the last evaluation.", "s", gauge="evaluation_seconds")]
    unigram_loss: Annotated[float | None, Metric(
        "Validation loss of a model that knows token frequencies only.", "nats/token", "eval/unigram_loss",
        "validation_unigram_loss", note="The baseline; null if not computed.")] = None
    is_best: Annotated[bool, Metric("Lowest validation loss so far.", "bool")] = False
    tasks: Annotated[dict[str, float], Metric(
        "Metrics of train.eval_tasks, of a task its own.", tag="eval/task_{}", gauge="task_{}",
        value=in_names,
        note="An object, `task: metric` -> number; elsewhere NAME is `task_metric`.")] = field(default_factory=dict)
    rewards_chosen: Annotated[float | None, Metric(
        "Reward of chosen answers of the validation set.", "nats", "eval/rewards_chosen", "validation_reward_chosen",
        note=_OF_PREFERENCES)] = None
    rewards_rejected: Annotated[float | None, Metric(
        "Reward of rejected answers of the validation set.", "nats", "eval/rewards_rejected",
        "validation_reward_rejected", note=_OF_PREFERENCES)] = None
    reward_margin: Annotated[float | None, Metric(
        "Reward of the chosen answer - reward of the rejected one, validation set.", "nats", "eval/rewards_margins",
        "validation_reward_margin", note=_OF_PREFERENCES)] = None
    reward_accuracy: Annotated[float | None, Metric(
        "Share of the validation pairs whose chosen answer has the larger reward.", "0..1", "eval/rewards_accuracies",
        "validation_reward_accuracy_ratio", note=_OF_PREFERENCES)] = None


@dataclass(frozen=True)
class CheckpointRecord(Record):
    """One checkpoint, written or failed; Prometheus has the last that is complete."""

    kind: ClassVar[str] = "checkpoint"

    step: Annotated[int, Metric(
        "Optimizer steps in the last complete checkpoint.", "steps", gauge="last_checkpoint_step")]
    seconds: Annotated[float, Metric(
        "Duration of the last complete checkpoint.", "s", "time/checkpoint_total_seconds", "checkpoint_seconds",
        note="From the start of saving until it was complete, or had failed.")]
    blocked_seconds: Annotated[float, Metric(
        "Seconds that training waited for the last checkpoint.", "s", "time/checkpoint_blocked_seconds",
        "checkpoint_blocked_seconds", note="A part of `seconds`.")]
    bytes: Annotated[int, Metric(
        "Size of the last complete checkpoint.", "bytes", "perf/checkpoint_bytes", "checkpoint_bytes",
        note="On disk, all ranks; 0 when it failed.")]
    path: Annotated[str, Metric("Where it is, or was to be.")]
    ok: Annotated[bool, Metric("Whether it is complete and can be loaded.", "bool", "perf/checkpoint_ok")] = True
    reason: Annotated[str, Metric(
        "Why it was saved (`save_steps`, `end`, a signal); when it failed, what went wrong.")] = ""


@dataclass(frozen=True)
class RunSummary(Record):
    """How a run ended."""

    kind: ClassVar[str] = "summary"

    steps: Annotated[int, Metric("Optimizer steps finished.", "steps")]
    seconds: Annotated[float, Metric("Seconds of training, over all starts of the run.", "s")]
    initial_loss: Annotated[float | None, Metric("First training loss, or null.", "nats/token")]
    final_loss: Annotated[float | None, Metric("Last training loss, or null.", "nats/token")]
    best_eval_loss: Annotated[float | None, Metric("Lowest validation loss, or null.", "nats/token")]
    unigram_loss: Annotated[float | None, Metric("Baseline for the validation loss, or null.", "nats/token")]
    tokens: Annotated[int, Metric("Tokens consumed, all ranks.", "tokens")]
    tokens_per_second: Annotated[float, Metric("Mean throughput, all ranks.", "tokens/s")]
    skipped_steps: Annotated[int, Metric("Steps skipped for a non-finite loss or gradient.", "steps")]
    reason: Annotated[str, Metric("Why the run ended, in words.")]
    failed: Annotated[bool, Metric("It stopped itself for a reason that a person must look at.", "bool")] = False
    paths: Annotated[dict[str, str], Metric("What was written: name -> path.")] = field(default_factory=dict)
    sample_before: Annotated[str | None, Metric(
        "Text generated before training, or null.", note="In TensorBoard the text `sample/before`.")] = None
    sample_after: Annotated[str | None, Metric(
        "Text generated after training, or null.", note="In TensorBoard the text `sample/after`.")] = None
    layers: Annotated[list[LayerRecord], Metric("Expert load of the last interval.")] = field(default_factory=list)


SINK_SERIES = {series.name: series for series in (
    Series("run", "What is running.", "info"),
    Series("run_start_timestamp_seconds", "When this start of the run began."),
    Series("run_finished", "1 after the run has ended as planned."),
    Series("logging_interval_steps", "Steps between two updates of these metrics."),
    Series("checkpoint_interval_steps", "Steps between two checkpoints."),
    Series("last_step_timestamp_seconds", "When the last step was logged."),
    Series("last_evaluation_timestamp_seconds", "End of the last evaluation."),
    Series("last_checkpoint_timestamp_seconds", "When the last checkpoint was complete."),
    Series("checkpoints", "Complete checkpoints of this start of the run.", "counter"),
    Series("checkpoint_failures", "Checkpoints that failed.", "counter"),
    Series("actions", "Automatic changes of balancing in this start of the run.", "counter"),
    Series("layer", "Pipeline stage of each layer.", "info", LAYER),
    Series("used_experts_ratio", "exp(entropy of loads) / E; 1: balanced.", labels=LAYER),
    Series("used_experts_limit_ratio", "used_experts_ratio below which a layer has collapsed, sqrt(K / E).",
           labels=LAYER),
    Series("load_imbalance_limit_ratio", "load_imbalance_ratio above which a layer is unbalanced.", labels=LAYER),
    Series("lasting_dead_experts", "Experts without a token for 3 logging intervals.", labels=LAYER),
)}
"""What the Prometheus sink knows or computes, and no record has, by name."""
# fmt: on
