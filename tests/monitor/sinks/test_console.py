"""The console, plain and live."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable

import pytest
from rich.cells import cell_len
from rich.console import Console

from moe_dist.monitor.expert_stats import layer_record
from moe_dist.monitor.records import CheckpointRecord, EvalRecord, RunInfo, RunSummary, TrainRecord
from moe_dist.monitor.sinks import ConsoleSink, text

Make = Callable[..., TrainRecord]


def play(sink: ConsoleSink, info: RunInfo, make: Make, evaluation: EvalRecord, summary: RunSummary) -> None:
    sink.open(info)
    sink.train(make(120))
    sink.message("checkpoint-120 saved in 1.2 s")
    sink.checkpoint(CheckpointRecord(120, 3.5, 0.5, 2_000_000, "run/checkpoint-120"))
    sink.checkpoint(CheckpointRecord(125, 1.0, 1.0, 0, "run/checkpoint-125", ok=False, reason="No space left"))
    sink.evaluation(evaluation)
    sink.train(make(130, max_steps=None))
    sink.train(make(140, max_steps=None, remaining_seconds=None, skipped_steps=3, layers=[]))
    sink.summary(summary)
    sink.close()
    sink.close()


@pytest.fixture
def crowded() -> dict[str, object]:
    """A record whose every field is as long as it gets."""
    layers = [layer_record(93, [0] * 100 + [1] * 27 + [900], 700, 464, {}, 2)]
    return {
        "max_steps": 5_000_000,
        "loss": 10.12345,
        "grad_norm": 1234.5678,
        "tokens_per_second": 123_456_789.0,
        "all_to_all_share": 1.0,
        "data_wait_share": 0.99,
        "skipped_steps": 12_345,
        "remaining_seconds": 1e6,
        "layers": layers,
    }


def test_plain_lines(info: RunInfo, train_record: Make, eval_record: EvalRecord, summary: RunSummary) -> None:
    stream = io.StringIO()
    play(ConsoleSink("plain", stream), info, train_record, eval_record, summary)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) < 160
    assert "\x1b" not in stream.getvalue()
    for line in (
        "Training a 25.3M-parameter model on 4 ranks (cpu).",
        "  edp 0   rank 0  rank 1",
        "trainable params: 25,312,256 || all params: 50,624,512 || trainable%: 50.0000",
        "checkpoint-120 saved in 1.2 s",
        "checkpoint step: 120  seconds: 3.5  blocked: 0.5  size: 2MiB  path: run/checkpoint-120",
        "checkpoint step: 125  seconds: 1.0  blocked: 1.0  failed: No space left",
        "step: 120/5000  loss: 2.1342  lr: 2.84e-04  grad_norm: 0.92  tok/s: 18.2k  a2a: 12%  left: 1:13:04"
        "  hot: L3/E01 2.0x  cold: L0/E02 0.0x  dead: 1  dropped: 1.0%",
        "eval step: 500  loss: 2.3121  perplexity: 10.09  unigram_loss: 3.3101  below_unigram: 0.9980"
        "  tokens: 123,456  seconds: 3.2  best: yes",
        "step: 140  loss: 2.1342  lr: 2.84e-04  grad_norm: 0.92  tok/s: 18.2k  a2a: 12%  left: -  skipped: 3",
        "  ended            all 5,000 steps are done",
        "  training loss    5.5454 -> 2.1342",
        "  validation loss  2.3121 (unigram 3.3101, better by 0.9980)",
        "  checkpoint       outputs/run/checkpoint-5000",
        "  | def parse(self, name):",
        "  |     return self.value",
    ):
        assert line in lines


def test_plain_line_of_a_crowded_record(train_record: Make, crowded: dict[str, object]) -> None:
    stream = io.StringIO()
    ConsoleSink("plain", stream).train(train_record(4_999_999, **crowded))
    (line,) = stream.getvalue().splitlines()
    assert len(line) < 160
    assert "left: 11d13h" in line
    assert "hot: L93/E127" in line


def test_plain_in_a_narrow_encoding_loses_letters_not_lines(summary: RunSummary) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    ConsoleSink("plain", stream).message("naïve café")
    stream.seek(0)
    assert stream.read() == "na?ve caf?\n"


@pytest.mark.parametrize("width", [80, 120])
def test_live_fits_its_terminal(
    width: int,
    info: RunInfo,
    train_record: Make,
    eval_record: EvalRecord,
    summary: RunSummary,
    crowded: dict[str, object],
) -> None:
    console = Console(record=True, width=width, height=40, force_terminal=True, file=io.StringIO())
    sink = ConsoleSink("live", console=console)
    sink.open(info)
    sink.train(train_record(4_999_999, **crowded))
    play(sink, info, train_record, eval_record, summary)
    # Recorded text runs on where a terminal would move its cursor; frames begin with a padded empty line.
    lines = [line for line in screen(console.file.getvalue()) if line]  # type: ignore[attr-defined]
    assert max(map(cell_len, lines)) <= width
    shown = "\n".join(lines)
    for words in (
        "Training a 25.3M-parameter model on 4 ranks (cpu).",
        "edp 1   rank 2  rank 3",
        "trainable params: 25,312,256 || all params: 50,624,512 || trainable%: 50.0000",
        "step   120/5,000   ━",
        "loss 2.1342   lr 2.84e-04   grad 0.92   18.2k tok/s   a2a 12.0%",
        "hot L3/E01 2.0x   cold L0/E02 0.0x   dead 1   dropped 1.0%",
        "1:13:04 left",
        "checkpoint-120 saved in 1.2 s",
        "checkpoint step 120   took 3.5 s   blocked 0.5 s   2MiB",
        "checkpoint step 125   took 1.0 s   blocked 1.0 s   failed: No space left",
        "eval step 500   loss 2.3121   unigram 3.3101, better by 0.9980   best",
        "step 130   ━",
        "step 140   elapsed 1:48",
        "5.5454 → 2.1342",
        "outputs/run/checkpoint-5000",
        "def parse(self, name):",
        "def ·[2J· q#2 zzx)",
    ):
        assert words in shown, words
    if width == 120:
        # The layer of the hottest expert: 0.8x, 2.0x, 0.8x, 0.4x of the fair share.
        assert "L3 ▄█▄▂" in shown


def screen(output: str) -> list[str]:
    """Everything printed, frame after frame, without control codes."""
    from rich.text import Text

    return [line.rstrip() for part in output.split("\r") for line in Text.from_ansi(part).plain.split("\n")]


def test_live_on_a_tiny_terminal_drops_cells(train_record: Make, crowded: dict[str, object]) -> None:
    console = Console(width=30, height=10, force_terminal=True, file=io.StringIO())
    sink = ConsoleSink("live", console=console)
    sink.train(train_record(4_999_999, **crowded))
    sink.close()
    assert max(map(cell_len, screen(console.file.getvalue()))) <= 30  # type: ignore[attr-defined]


def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch, train_record: Make, summary: RunSummary) -> None:
    def output() -> str:
        stream = io.StringIO()
        sink = ConsoleSink("live", stream)
        sink.train(train_record())
        sink.summary(summary)
        return stream.getvalue()

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[36m" in output()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[36m" not in output()
    assert "\x1b[33m" not in output()


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_auto_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert ConsoleSink("auto", Terminal()).mode == "live"
    assert ConsoleSink("auto", io.StringIO()).mode == "plain"
    narrow = Terminal()
    narrow.encoding = "ascii"
    assert ConsoleSink("auto", narrow).mode == "plain"
    monkeypatch.setenv("TERM", "dumb")
    assert ConsoleSink("auto", Terminal()).mode == "plain"


def test_none_says_nothing(info: RunInfo, train_record: Make, eval_record: EvalRecord, summary: RunSummary) -> None:
    stream = Terminal()
    play(ConsoleSink("none", stream), info, train_record, eval_record, summary)
    assert stream.getvalue() == ""


def test_cursor_comes_back(train_record: Make) -> None:
    console = Console(width=80, force_terminal=True, file=io.StringIO())
    sink = ConsoleSink("live", console=console)
    sink.train(train_record())
    sink.close()
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "-"), (0.4, "0:00"), (59.6, "1:00"), (723, "12:03"), (3723, "1:02:03"), (183600, "2d03h")],
)
def test_durations(seconds: float | None, words: str) -> None:
    assert text.duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(912, "912"), (18_234, "18.2k"), (999_960, "1.00M"), (1.83e6, "1.83M"), (float("nan"), "nan")],
)
def test_compact_numbers(value: float, words: str) -> None:
    assert text.compact(value) == words


def test_load_strip() -> None:
    layer = layer_record(0, [0, 10, 10, 20], 0, 20, {}, 2)
    assert text.load_strip(layer, 4) == "·▄▄█"
    assert text.load_strip(layer, 2) == "▂▆"
    assert text.load_strip(layer, 0) == ""


def test_progress_by_steps_or_time(train_record: Make) -> None:
    assert text.progress(train_record(2500)) == 0.5
    by_time = train_record(max_steps=None, elapsed_seconds=30.0, remaining_seconds=90.0)
    assert text.progress(by_time) == 0.25
    assert text.progress(train_record(max_steps=None, remaining_seconds=None)) is None


def test_heavy_imports_wait_until_they_are_needed() -> None:
    code = (
        "import sys, moe_dist.monitor.sinks;"
        "heavy = {'torch', 'rich.live', 'tensorboard'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0B"), (700, "700B"), (98_304, "96KiB"), (1_992_294, "2MiB"), (852_000_000, "813MiB"), (2**31, "2.0GiB")],
)
def test_sizes_have_a_unit_that_fits(num_bytes: int, words: str) -> None:
    """A small model's weights were `0MiB`."""
    assert text.memory(num_bytes) == words
