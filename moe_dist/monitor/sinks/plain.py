"""The console without a terminal: log files, pipes, batch jobs. One line per record, under 160 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TextIO

from moe_dist.monitor.expert_stats import extremes, overall
from moe_dist.monitor.records import CheckpointRecord, EvalRecord, RunInfo, RunSummary, TrainRecord
from moe_dist.monitor.sinks import text
from moe_dist.monitor.sinks.base import Sink

WIDTH = 159
MAX_LAYERS = 16
NOTABLE_WAIT = 0.05


class PlainConsole(Sink):
    """`key: value` pairs, two spaces apart, always in the same order."""

    name = "console"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def open(self, info: RunInfo) -> None:
        self._wrapped(info.sentence)
        self._lines(f"  {line}" for line in info.layout)
        active = 100 * info.active_params / max(1, info.total_params)
        self._lines(
            (
                text.parameters(info),
                f"active params per token: {info.active_params:,} ({active:.1f}%)",
                f"output: {info.output_dir}",
            )
        )

    def train(self, record: TrainRecord) -> None:
        self._lines([join_within(WIDTH, train_pairs(record))])

    def evaluation(self, record: EvalRecord) -> None:
        pairs = [
            ("eval step", str(record.step)),
            ("loss", text.loss(record.loss)),
        ]
        if record.perplexity is not None:
            pairs += [("perplexity", f"{record.perplexity:.2f}")]
        pairs += text.reward_pairs(record)
        if record.unigram_loss is not None:
            gain = record.unigram_loss - record.loss
            pairs += [("unigram_loss", text.loss(record.unigram_loss)), ("below_unigram", f"{gain:.4f}")]
        counted = "tokens" if record.reward_margin is None else "pairs"
        pairs += [(counted, f"{record.tokens:,}"), ("seconds", f"{record.seconds:.1f}")]
        pairs += [(name.replace(": ", "/"), f"{number:.4f}") for name, number in record.tasks.items()]
        self._lines([join_within(WIDTH, [*pairs, ("best", "yes" if record.is_best else "no")])])

    def checkpoint(self, record: CheckpointRecord) -> None:
        pairs = [("checkpoint step", str(record.step)), ("seconds", f"{record.seconds:.1f}")]
        pairs += [("blocked", f"{record.blocked_seconds:.1f}")]
        if record.ok:
            self._lines([join_within(WIDTH, [*pairs, ("size", text.memory(record.bytes)), ("path", record.path)])])
        else:
            self._lines([join_within(WIDTH, [*pairs, ("failed", record.reason)])])

    def summary(self, summary: RunSummary) -> None:
        rows = text.summary_rows(summary, "->")
        rows += [(name, path) for name, path in summary.paths.items()]
        label_width = max(len(label) for label, _ in rows)
        self._lines(["", "summary"])
        self._lines(f"  {label:<{label_width}}  {words}" for label, words in rows)
        self._experts(summary)
        for title, sample in (("before", summary.sample_before), ("after", summary.sample_after)):
            if sample is not None:
                self._lines(["", f"sample {title} training"])
                for line in text.clean(sample).splitlines():
                    self._lines(f"  | {part}" for part in _chunks(line, WIDTH - 4))

    def message(self, message: str) -> None:
        self._wrapped(message)

    def _experts(self, summary: RunSummary) -> None:
        if not summary.layers:
            return
        shown = text.most_uneven(summary.layers, MAX_LAYERS)
        which = "" if len(shown) == len(summary.layers) else f", {len(shown)} of {len(summary.layers)} layers"
        self._lines(["", f"expert load, last interval (1.0x: fair share){which}"])
        self._lines([f"  {'hot':<14}  {'cold':<14}  {'cv':>5}  {'dead':>4}  {'dropped':>7}"])
        for layer in shown:
            found = extremes([layer])
            hot, cold = map(text.expert, found) if found else (f"L{layer.layer} -", "-")
            numbers = f"{layer.load_cv:>5.2f}  {layer.dead_experts:>4}  {text.percent(layer.dropped_fraction):>7}"
            self._lines([f"  {hot:<14}  {cold:<14}  {numbers}"])

    def _wrapped(self, paragraph: str) -> None:
        for line in paragraph.splitlines() or [""]:
            # Long words are paths: breaking one would make it useless to copy.
            self._lines(textwrap.wrap(line, WIDTH, break_long_words=False, break_on_hyphens=False) or [""])

    def _lines(self, lines: Iterable[str]) -> None:
        # A log in a foreign encoding loses a letter, not the line.
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        for line in lines:
            self._stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


def _chunks(line: str, width: int) -> list[str]:
    """The line in pieces of `width`, spaces as they are: a sample may be code."""
    return [line[start : start + width] for start in range(0, len(line), width)] or [""]


def train_pairs(record: TrainRecord) -> list[tuple[str, str]]:
    """What a line of training says; what follows `cold` is said only when there is something to say."""
    pairs = [
        ("step", text.step_of(record)),
        ("loss", text.loss(record.loss)),
        *text.reward_pairs(record),
        ("lr", f"{record.learning_rate:.2e}"),
        ("grad_norm", f"{record.grad_norm:.2f}"),
        ("tok/s", text.compact(record.tokens_per_second)),
        ("a2a", f"{100 * record.all_to_all_share:.0f}%"),
        ("left", text.duration(record.remaining_seconds)),
    ]
    if found := extremes(record.layers):
        pairs += [("hot", text.expert(found[0])), ("cold", text.expert(found[1]))]
    totals = overall(record.layers)
    if record.skipped_steps:
        pairs += [("skipped", str(record.skipped_steps))]
    if dead := totals.get("dead_experts"):
        pairs += [("dead", f"{dead:.0f}")]
    if dropped := totals.get("dropped_fraction"):
        pairs += [("dropped", text.percent(dropped))]
    if record.data_wait_share >= NOTABLE_WAIT:
        pairs += [("data_wait", text.percent(record.data_wait_share))]
    return pairs


def join_within(width: int, pairs: list[tuple[str, str]]) -> str:
    """`key: value` pairs on one line; those at the end that do not fit are left out."""
    line = ""
    for key, value in pairs:
        longer = f"{line}  {key}: {value}" if line else f"{key}: {value}"
        if len(longer) > width:
            break
        line = longer
    return line
