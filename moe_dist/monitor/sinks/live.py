"""The console on a terminal: a few quiet lines that follow the run, drawn by rich.

One accent colour, dim labels, yellow only where something asks for attention. Imported only for a terminal.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moe_dist.monitor.expert_stats import extremes, overall
from moe_dist.monitor.records import CheckpointRecord, EvalRecord, LayerRecord, RunInfo, RunSummary, TrainRecord
from moe_dist.monitor.sinks import text
from moe_dist.monitor.sinks.base import Sink

ACCENT, LABEL, VALUE, ALERT = "cyan", "dim", "", "yellow"
MARGIN, GAP = 2, 3
MIN_BAR, MAX_BAR = 10, 60
MAX_STRIP = 32
MAX_LAYERS = 12
MAX_FRAME = 116
SIDE_BY_SIDE = 96
"""Columns from which the two samples stand next to each other."""
LOAD_COLUMN = 40
"""Columns of the expert table before its load strips."""


class LiveConsole(Sink):
    """Records update a Live area at the bottom; evaluations and messages scroll away above it."""

    name = "console"

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    def open(self, info: RunInfo) -> None:
        active = f"{info.active_params:,} ({100 * info.active_params / max(1, info.total_params):.1f}%)"
        self._console.print()
        self._print(Text(info.sentence, style="bold"))
        self._console.print()
        if info.layout:
            # No wrapping: a folded grid reads as a different layout.
            grid = Text("\n".join(info.layout), no_wrap=True, overflow="ellipsis")
            self._print(Padding(grid, (0, 0, 1, 2), expand=False))
        self._print(Text(text.parameters(info)))
        self._print(labelled("active params per token", active))
        self._print(labelled("output", info.output_dir))
        self._console.print()
        self._show(Text("waiting for the first logging interval", style=LABEL))

    def train(self, record: TrainRecord) -> None:
        self._show(ProgressLines(record))

    def evaluation(self, record: EvalRecord) -> None:
        cells = [
            Text.assemble(("eval ", ACCENT), f"step {record.step:,}"),
            labelled("loss", text.loss(record.loss), "bold"),
        ]
        if against := text.eval_gain(record):
            worse = record.unigram_loss is not None and record.loss >= record.unigram_loss
            cells.append(Text(against, style=ALERT if worse else LABEL))
        if record.is_best:
            cells.append(Text("best", style=ACCENT))
        if record.perplexity is not None:
            cells.append(labelled("ppl", f"{record.perplexity:.2f}"))
        cells += [labelled(*pair) for pair in text.reward_pairs(record)]
        self._print(fit(cells, self._console.width - MARGIN))

    def checkpoint(self, record: CheckpointRecord) -> None:
        cells = [
            Text.assemble(("checkpoint ", ACCENT if record.ok else ALERT), f"step {record.step:,}"),
            labelled("took", f"{record.seconds:.1f} s"),
            labelled("blocked", f"{record.blocked_seconds:.1f} s"),
            Text(text.memory(record.bytes)) if record.ok else Text(f"failed: {record.reason}", style=ALERT),
        ]
        # A reason may be long: it is cut, not left out.
        self._print(Text("   ").join(cells) if not record.ok else fit(cells, self._console.width - MARGIN))

    def summary(self, summary: RunSummary) -> None:
        self.close()
        self._console.print()
        table = Table.grid(padding=(0, 2))
        table.add_column(style=LABEL, no_wrap=True)
        table.add_column(overflow="fold")
        for label, words in text.summary_rows(summary, "→"):
            table.add_row(label, Text(words))
        if summary.paths:
            table.add_row("", "")
        for label, path in summary.paths.items():
            table.add_row(label, Text(path))
        self._framed(table, "summary")
        if summary.layers:
            self._framed(expert_table(summary.layers, self._frame_width - LOAD_COLUMN), "expert load")
        self._samples(summary)

    def message(self, message: str) -> None:
        self._print(Text(message))

    def close(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            atexit.unregister(self.close)
            live.stop()

    @property
    def _frame_width(self) -> int:
        return min(MAX_FRAME, self._console.width - 2 * MARGIN)

    def _framed(self, renderable: RenderableType, title: str) -> None:
        self._print(framed(renderable, title, self._frame_width))

    def _samples(self, summary: RunSummary) -> None:
        samples = [
            (Text(text.clean(sample), overflow="fold"), f"sample {when} training")
            for when, sample in (("before", summary.sample_before), ("after", summary.sample_after))
            if sample is not None
        ]
        if len(samples) == 2 and self._frame_width >= SIDE_BY_SIDE:
            half = (self._frame_width - 1) // 2
            lines = max(len(sample.wrap(self._console, half - 4)) for sample, _ in samples)
            grid = Table.grid(padding=(0, 1, 0, 0))
            grid.add_row(*(framed(sample, title, half, lines + 2) for sample, title in samples))
            self._print(grid)
        else:
            for sample, title in samples:
                self._framed(sample, title)

    def _show(self, renderable: RenderableType) -> None:
        if self._live is None:
            # No refresh thread: the area changes when a record comes, and never competes with training.
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
            # The cursor is hidden while the area lives; an exception that ends the process must not keep it.
            atexit.register(self.close)
        self._live.update(indented(renderable), refresh=True)

    def _print(self, renderable: RenderableType) -> None:
        self._console.print(indented(renderable), highlight=False, markup=False)


class ProgressLines:
    """The live area: progress, numbers, experts; each line keeps the cells that fit the terminal."""

    def __init__(self, record: TrainRecord) -> None:
        self.record = record

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        yield ""
        yield self._progress(width)
        yield fit(self._numbers(), width)
        if experts := self._experts():
            line = fit(experts, width)
            strip = self._strip(width - line.cell_len - GAP)
            yield line if strip is None else fit([line, strip], width)

    def _progress(self, width: int) -> Text:
        record, share = self.record, text.progress(self.record)
        # As wide as it will get, so that the bar stays where it is.
        digits = 2 * len(f"{record.max_steps:,}") + 1 if record.max_steps else 0
        step = labelled("step", text.step_of(record, ",").rjust(digits), "bold")
        elapsed = labelled("elapsed", text.duration(record.elapsed_seconds))
        if share is None:
            return fit([step, elapsed], width)
        done = f"{100 * share:5.1f}%"
        left = Text.assemble(text.duration(record.remaining_seconds), (" left", LABEL))
        room = min(MAX_BAR, width - step.cell_len - len(done) - left.cell_len - 2 * GAP - 1)
        track = Text.assemble(bar(share, room), " ", done) if room >= MIN_BAR else Text(done.strip())
        return fit([step, track, left, elapsed], width)

    def _numbers(self) -> list[Text]:
        record = self.record
        cells = [
            labelled("loss", text.loss(record.loss), "bold"),
            *(labelled(*pair) for pair in text.reward_pairs(record)),
            labelled("lr", f"{record.learning_rate:.2e}"),
            labelled("grad", f"{record.grad_norm:.2f}"),
            Text.assemble(text.compact(record.tokens_per_second), (" tok/s", LABEL)),
            labelled("a2a", text.percent(record.all_to_all_share)),
            labelled("data", text.percent(record.data_wait_share)),
            labelled("mem", text.memory(record.memory_bytes)),
        ]
        if record.skipped_steps:
            cells.insert(1, labelled("skipped", f"{record.skipped_steps:,}", ALERT))
        return cells

    def _experts(self) -> list[Text]:
        found = extremes(self.record.layers)
        if found is None:
            return []
        totals = overall(self.record.layers)
        dead, dropped = totals["dead_experts"], totals["dropped_fraction"]
        return [
            labelled("hot", text.expert(found[0])),
            labelled("cold", text.expert(found[1])),
            labelled("dead", f"{dead:.0f}", ALERT if dead else VALUE),
            labelled("dropped", text.percent(dropped)),
        ]

    def _strip(self, room: int) -> Text | None:
        """The layer of the hottest expert as blocks, when there is room for all of them or for many."""
        found = extremes(self.record.layers)
        if found is None:
            return None
        layer = next(layer for layer in self.record.layers if layer.layer == found[0].layer)
        label = f"L{layer.layer} "
        columns = min(len(layer.tokens_per_expert), MAX_STRIP)
        if room < columns + len(label):
            return None
        return Text.assemble((label, LABEL), (text.load_strip(layer, columns), ACCENT))


def expert_table(layers: list[LayerRecord], room: int) -> Table:
    """One row per layer: its hottest and coldest expert, and all of them as blocks."""
    shown = text.most_uneven(layers, MAX_LAYERS)
    table = Table.grid(padding=(0, 2))
    for heading in ("layer", "hot", "cold", "dead", "load (half height: fair share)"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("layer", "dead") else "left")
    table.add_row(*(Text(str(column.header), style=LABEL) for column in table.columns))
    for layer in shown:
        found = extremes([layer])
        hot, cold = (text.expert(load).split("/")[1] for load in found) if found else ("-", "-")
        dead = Text(str(layer.dead_experts), style=ALERT if layer.dead_experts else VALUE)
        strip = Text(text.load_strip(layer, max(8, min(64, room))), style=ACCENT)
        table.add_row(str(layer.layer), hot, cold, dead, strip)
    if len(shown) < len(layers):
        table.add_row("", "", "", "", Text(f"the {len(shown)} most uneven of {len(layers)} layers", style=LABEL))
    return table


def labelled(label: str, value: str, style: str = VALUE) -> Text:
    """`label value`, the label dim."""
    return Text.assemble((f"{label} ", LABEL), (value, style), overflow="fold")


def bar(share: float, width: int) -> Text:
    """A progress bar of `width` columns; thin, so that it stays in the background."""
    done = round(share * width)
    return Text.assemble(("━" * done, ACCENT), ("─" * (width - done), LABEL))


def fit(cells: Iterable[Text], width: int) -> Text:
    """Cells on one line, as many from the first as fit in `width` columns."""
    line = Text(no_wrap=True, overflow="crop")
    for cell in cells:
        if line.cell_len + (GAP if line.cell_len else 0) + cell.cell_len > width:
            break
        if line.cell_len:
            line.append(" " * GAP)
        line.append_text(cell)
    return line


def indented(renderable: RenderableType) -> RenderableType:
    return Padding(renderable, (0, 0, 0, MARGIN), expand=False)


def framed(renderable: RenderableType, title: str, width: int, height: int | None = None) -> Panel:
    heading = Text(title, style=LABEL)
    return Panel(
        renderable,
        title=heading,
        title_align="left",
        border_style=LABEL,
        padding=(0, 1),
        width=width,
        height=height,
    )
