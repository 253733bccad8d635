"""The report: its numbers are the logged ones, it finds what is wrong, and it works in a real browser."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browser
from services import need

from moe_dist.config import ConfigError
from moe_dist.models.auxiliary import ROUTER_SUMS
from moe_dist.monitor.expert_stats import layer_record, load_ratios
from moe_dist.monitor.health.doctor import findings
from moe_dist.monitor.records import CheckpointRecord, EvalRecord, LayerRecord, RunInfo, RunSummary, TrainRecord
from moe_dist.monitor.report import figures
from moe_dist.monitor.report.page import write_report
from moe_dist.monitor.report.starts import starts_table
from moe_dist.monitor.run_log import read_run
from moe_dist.monitor.sinks import JsonlSink
from moe_dist.monitor.sinks.jsonl import note_failure

Make = Callable[..., TrainRecord]
EXPERTS = 8


def healthy_layers(step: int) -> list[LayerRecord]:
    loads = [
        [100 + (step * (expert + 3) * (layer + 1)) % (40 - 7 * layer) for expert in range(EXPERTS)] for layer in (0, 2)
    ]
    return [
        layer_record(
            *(layer, load, 0, sum(load) // 2, dict.fromkeys(ROUTER_SUMS, 1.1 * sum(load) // 2), 2),
            pairs_NE=np.array(
                [[pairs // (3 + layer) for pairs in load], [pairs - pairs // (3 + layer) for pairs in load]]
            ),
        )
        for layer, load in zip((0, 2), loads, strict=True)
    ]


def write_run(
    folder: Path,
    info: RunInfo,
    train_record: Make,
    steps: range = range(10, 110, 10),
    layers: Callable[[int], list[LayerRecord]] = healthy_layers,
    **changes: Any,
) -> JsonlSink:
    """A run in `metrics.jsonl`, by the sink that writes it in real runs; still open, without an end."""
    sink = JsonlSink(folder / "metrics.jsonl")
    sink.open(info)
    for step in steps:
        fields = {"loss": 5 - step / 50, "learning_rate": 1e-3 / step, "data_wait_share": 0.01 * (step % 7)}
        sink.train(train_record(step, layers=layers(step), **(fields | changes)))
        sink.evaluation(EvalRecord(step, 5.1 - step / 60, 9.0, 100, 0.5, 4.9))
        sink.checkpoint(CheckpointRecord(step, 2.0 + step / 100, 0.5, 1000, f"checkpoint-{step}"))
    return sink


@pytest.fixture
def run(tmp_path: Path, info: RunInfo, train_record: Make, summary: RunSummary) -> Path:
    folder = tmp_path / "a run"
    sink = write_run(folder, info, train_record)
    sink.summary(summary)
    sink.close()
    return folder


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def data(page: str) -> dict[str, Any]:
    """What the figures are drawn from, by name."""
    return {
        name: json.loads(text)
        for name, text in re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', page, re.DOTALL)
    }


def trace(figure: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [trace for trace in figure["data"] if trace.get("name") == name]
    return found


def test_the_figures_show_the_logged_numbers(run: Path) -> None:
    """Seen to fail with the validation rows drawn as training, and with layers taken by position instead of number."""
    shown = data(write_report([run]).read_text())
    train, evals, saves = rows(run, "train"), rows(run, "eval"), rows(run, "checkpoint")

    def check(figure: str, name: str, source: list[dict[str, Any]], key: str) -> None:
        found = trace(shown[f"figure-{figure}"], name)
        assert (found["x"], found["y"]) == ([row["step"] for row in source], [row[key] for row in source])

    check("loss", "training", train, "loss")
    check("loss", "validation", evals, "loss")
    check("loss", "unigram baseline", evals, "unigram_loss")
    check("loss", "learning rate", train, "learning_rate")
    check("throughput", "a run", train, "tokens_per_second")
    check("time-0", "dispatch and combine", train, "all_to_all_share")
    check("time-0", "waiting for data", train, "data_wait_share")
    check("checkpoints-0", "training waited", saves, "blocked_seconds")
    check("ranks-0", "imbalance tax", train, "imbalance_seconds")
    for rank in range(4):
        own = trace(shown["figure-ranks-0"], f"rank {rank}")
        assert own["y"] == [row["ranks"]["own_seconds"][rank] for row in train]
    talk = trace(shown["figure-phases-0"], "the all-to-all")
    assert talk["y"] == [row["phase_seconds"]["all_to_all"] for row in train]
    none = None
    assert shown["figure-flow-0"]["data"][0]["z"] == [
        [60, 40, none, none],
        [40, 80, none, none],
        [none, none, 50, 40],
        [none, none, 40, 50],
    ]
    for bar, row in zip(shown["figure-checkpoints-0"]["data"][1]["y"], saves, strict=True):
        assert bar + row["blocked_seconds"] == pytest.approx(row["seconds"])
    for key, (index, number) in itertools.product(
        ("load_imbalance", "load_entropy", "router_entropy"), enumerate((0, 2))
    ):
        found = trace(shown[f"figure-{key}-0"], f"layer {number}")
        assert found["y"] == [row["layers"][index][key] for row in train]
    frames = shown["frames-0"]
    assert (frames["steps"], frames["layers"]) == ([row["step"] for row in train], [0, 2])
    for picture, row in zip(frames["z"], train, strict=True):
        for ratios, layer in zip(picture, row["layers"], strict=True):
            assert ratios == pytest.approx(load_ratios(LayerRecord(**layer)), abs=5e-4)
    assert shown["figure-load-0"]["data"][0]["z"] == frames["z"][-1]


def test_the_page_needs_no_network_and_escapes_what_it_is_told(
    tmp_path: Path, info: RunInfo, train_record: Make
) -> None:
    folder = tmp_path / '<b>&"run'
    text = "data: {path: '</script><script>alert(1)</script>'}"
    write_run(folder, RunInfo(**{**asdict(info), "config_text": text, "sentence": "a <i>b"}), train_record).close()
    page = write_report([folder], tmp_path / "out" / "r.html").read_text()
    ours = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "<b>" not in ours
    assert "<i>" not in ours
    assert "alert(1)</script>" not in page
    assert html.escape(text) in ours
    assert "default-src 'none'" in ours
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)|@import|url\(""", ours)
    assert "plotly.js v" in page


def test_a_healthy_run_has_nothing_to_find(run: Path) -> None:
    assert findings(read_run(run)) == []
    assert "Nothing that needs attention." in write_report([run]).read_text()


def test_what_is_wrong_is_found_and_named(tmp_path: Path, info: RunInfo, train_record: Make) -> None:
    """A dead expert, a collapsed layer, a loss that is no number, starved steps, a failed checkpoint, a killed run."""

    def layers(step: int) -> list[LayerRecord]:
        dead = [100, 90, 0, 110, 95, 105, 100, 100]
        pair = [1, 1, 1, 500, 1, 1, 1, 500]
        return [
            layer_record(0, dead, 0, 350, {}, 2),
            layer_record(2, pair, 0, 503, {}, 2),
        ]

    sink = write_run(tmp_path / "bad", info, train_record, layers=layers, data_wait_share=0.6)
    sink.train(train_record(110, loss=math.nan, skipped_steps=3, layers=layers(110)))
    sink.checkpoint(CheckpointRecord(110, 1.0, 1.0, 0, "checkpoint-110", ok=False, reason="No space left on device"))
    sink.evaluation(EvalRecord(110, 4.8, 99.0, 100, 0.5, 4.9))
    sink.close()
    said = "\n".join(map(str, findings(read_run(tmp_path / "bad"))))
    for words in (
        "step 30: layer 0: 1 of 8 experts get no tokens (2)",
        "step 30: layer 2: the router has collapsed",
        "step 110: the loss is not finite",
        "3 steps were skipped",
        "of the time went into waiting for data; raise data.dataloader_num_workers",
        "step 110: a checkpoint could not be written: No space left on device",
        "validation loss rose from 3.4333 to 4.8000",
        "no end was logged: the run still runs, or was killed after step 110",
    ):
        assert words in said, words
    page = write_report([tmp_path / "bad"]).read_text()
    assert trace(data(page)["figure-loss"], "training")["y"][-1] is None
    assert trace(data(page)["figure-checkpoints-0"], "failed")["text"] == ["No space left on device"]


def test_steps_that_a_restart_repeats_count_once(tmp_path: Path, info: RunInfo, train_record: Make) -> None:
    folder = tmp_path / "resumed"
    train = "train: {per_device_train_batch_size: 2, gradient_accumulation_steps: %d}"
    write_run(folder, replace(info, config_text=train % 1), train_record, range(10, 60, 10), loss=3.0).close()
    note_failure(folder, "rank 3 (pid 7) was killed by SIGKILL in step 51, computing")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')  # killed while writing
    smaller = {"layout": ["rank 0", "pp 1 x edp 1 x ep 2 = 2 ranks; dense"], "config_text": train % 2, "world_size": 2}
    write_run(folder, replace(info, **smaller), train_record, range(40, 80, 10), loss=2.0).close()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # still writing
    log = read_run(folder)
    assert [(row["step"], row["loss"]) for row in log.train] == [
        *((step, 3.0) for step in (10, 20, 30)),
        *((step, 2.0) for step in (40, 50, 60, 70)),
    ]
    assert [row["step"] for row in log.evals] == [10, 20, 30, 40, 50, 60, 70]
    steps = [10, 20, 30, 40, 50, 60, 70]
    assert [[row["step"] for row in log.rows if row["kind"] == kind] for kind in ("train", "eval")] == [steps, steps]
    assert [row["step"] for row in log.checkpoints] == [10, 20, 30, 40, 50, 40, 50, 60, 70]
    assert [start["step"] for start in log.starts] == [10, 40]
    assert "started again before step 40" in map(str, findings(log))
    first, second = starts_table(log)
    layouts = ["edp 1   rank 2  rank 3", "2 x 1 x 4 = 8"], ["pp 1 x edp 1 x ep 2 = 2 ranks", "2 x 2 x 2 = 8"]
    assert [first[0], *first[2:]] == [
        *("1", "10", "4 on cpu", *layouts[0]),
        "rank 3 (pid 7) was killed by SIGKILL in step 51, computing",
    ]
    assert [second[0], *second[2:]] == ["2", "40", "2 on cpu", *layouts[1], "no end was logged"]
    written = write_report([folder]).read_text()
    assert all(f"<td>{html.escape(cell)}</td>" in written for cell in (*first[1:], *second[1:]))
    # Bars of one step in a trace would be stacked. Seen to fail with all of them drawn.
    bars = data(written)["figure-checkpoints-0"]["data"][:2]
    assert [bar["x"] for bar in bars] == [steps] * 2
    seconds = {row["step"]: row["seconds"] for row in log.checkpoints}
    assert [a + b for a, b in zip(*(bar["y"] for bar in bars), strict=True)] == pytest.approx(list(seconds.values()))


def test_runs_side_by_side(run: Path, tmp_path: Path, info: RunInfo, train_record: Make) -> None:
    other = tmp_path / "other"
    write_run(other, info, train_record, range(5, 50, 5)).close()
    shown = data(write_report([run, other], tmp_path / "both.html").read_text())
    for folder in (run, other):
        found = trace(shown["figure-loss"], f"training {folder.name}")
        assert found["y"] == [row["loss"] for row in rows(folder, "train")]
    assert {"figure-load-0", "figure-load-1", "figure-time-1", "frames-1"} <= shown.keys()


def test_a_long_run_has_as_many_pictures_as_a_page_can_bear(tmp_path: Path, info: RunInfo, train_record: Make) -> None:
    write_run(tmp_path, info, train_record, range(1, 2 * figures.MAX_FRAMES + 2)).close()
    steps = figures.frames(read_run(tmp_path))["steps"]
    assert (len(steps), len(set(steps)), steps[0], steps[-1]) == (100, 100, 1, 201)


@pytest.mark.parametrize(
    ("highest", "ticks"),
    [
        (3e-4, ["0", "0.0001", "0.0002", "0.0003"]),
        (2e-3, ["0", "0.0005", "0.001", "0.0015", "0.002"]),
        (8.7e-5, ["0", "2e-05", "4e-05", "6e-05", "8e-05", "0.0001"]),
        (0.0, None),
    ],
)
def test_the_axis_of_the_learning_rate_has_round_ticks(highest: float, ticks: list[str] | None) -> None:
    assert figures.round_ticks(highest).get("ticktext") == ticks


def test_the_legend_of_the_loss_stands_above_its_curves(run: Path) -> None:
    layout = data(write_report([run]).read_text())["figure-loss"]["layout"]
    assert (layout["legend"]["yanchor"], layout["legend"]["y"] > 1) == ("bottom", True)
    assert layout["yaxis2"]["tickvals"] == [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4]


def test_many_layers_are_a_picture(tmp_path: Path, info: RunInfo, train_record: Make) -> None:
    def layers(step: int) -> list[LayerRecord]:
        return [layer_record(n, [step, n + 1], 0, step, {}, 1) for n in range(20)]

    write_run(tmp_path, info, train_record, layers=layers).close()
    shown = data(write_report([tmp_path]).read_text())
    (picture,) = shown["figure-load_imbalance-0"]["data"]
    assert picture["type"] == "heatmap"
    assert picture["zmin"] == 1.0  # the fair share
    logged = rows(tmp_path, "train")
    assert picture["z"] == [[row["layers"][n]["load_imbalance"] for row in logged] for n in range(20)]


def test_dense_models_have_a_report_too(tmp_path: Path, info: RunInfo, train_record: Make) -> None:
    write_run(tmp_path / "dense", info, train_record, layers=lambda step: []).close()
    assert "dense: no expert layers." in write_report([tmp_path / "dense"]).read_text()


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no run folder, metrics.jsonl cannot be read \(No such file"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run"}\n')
    with pytest.raises(ConfigError, match="no step has been logged yet"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('hello\n{"kind": "run"}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:1: not a line of metrics"):
        read_run(tmp_path)


def test_the_command(run: Path) -> None:
    def report(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launcher", "report", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = report(run)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(run / "report.html"), "")
    done = report(run / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("moe-dist: error: ")
    assert done.stderr.count("\n") == 1


def contrast(colour: str) -> float:
    """Contrast on white, by the formula of WCAG 2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def test_contrast_is_enough_to_read() -> None:
    """WCAG AA: 4.5 for text. Lines get the same, though 3 would do."""
    page = (Path(figures.__file__).parent / "report_page.html").read_text()
    inks = re.findall(r"--(?:ink|quiet|accent|alert): (#[0-9a-f]{6})", page)
    assert len(inks) >= 8
    assert {colour: round(contrast(colour), 1) for colour in (*figures.COLOURS, *inks) if contrast(colour) < 4.5} == {}
    assert contrast("#767676") == pytest.approx(4.54, abs=0.01)


def browse(page: Path, folder: Path) -> tuple[str, list[str]]:
    """The document after its scripts have run in a headless Chromium, and what its console said."""
    command = [need("chromium"), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--window-size=1200,900"]
    command += ["--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


PROBE = """<script>
drawn.then(async () => {
  const slider = document.querySelector("input[data-frames]"), chart = document.getElementById("load-0");
  const said = (name, value) => document.body.setAttribute("data-told-" + name, JSON.stringify(value));
  said("before", chart.data[0].z);
  said("range", [slider.min, slider.max, slider.value, slider.tabIndex]);
  slider.value = 3;
  slider.dispatchEvent(new Event("input"));
  await new Promise((done) => setTimeout(done, 500));
  said("after", chart.data[0].z);
  said("label", document.getElementById("step-0").textContent);
  const layers = document.getElementById("slider-domains-0"), domains = document.getElementById("domains-0");
  said("last", domains.data[0].z);
  layers.value = 0;
  layers.dispatchEvent(new Event("input"));
  await new Promise((done) => setTimeout(done, 500));
  said("first", domains.data[0].z);
  said("layer", document.getElementById("step-domains-0").textContent);
  document.getElementById("contrast").click();
  await new Promise((done) => setTimeout(done, 500));
  said("width", document.getElementById("loss").data[0].line.width);
  const room = (c) => [c.id, c._fullLayout._size.h / c._fullLayout.height];
  said("rooms", Object.fromEntries([...document.querySelectorAll(".chart")].map(room)));
  said("figures", [...document.querySelectorAll(".chart")].map((c) => c.querySelectorAll(".main-svg").length > 0));
});
PLANT
</script>"""


@pytest.mark.slow
def test_a_real_browser_draws_every_figure_and_the_slider_works(run: Path, tmp_path: Path) -> None:
    page = write_report([run])
    shown = data(page.read_text())
    page.write_text(page.read_text().replace("</body>", PROBE.replace("PLANT", "") + "</body>"))
    document, console = browse(page, tmp_path)
    assert console == []
    told = {name: json.loads(html.unescape(text)) for name, text in re.findall(r' data-told-(\w+)="([^"]*)"', document)}
    frames = shown["frames-0"]["z"]
    assert told["before"] == frames[-1]
    assert told["range"] == ["0", str(len(frames) - 1), str(len(frames) - 1), 0]
    assert told["after"] == frames[3] != frames[-1]
    assert told["label"] == "step 40"
    by_layer = shown["frames-domains-0"]["z"]
    assert [told["first"], told["last"]] == by_layer
    assert by_layer[0] != by_layer[1]
    assert told["layer"] == "layer 0"
    assert told["width"] == 4
    assert len(told["figures"]) == len([name for name in shown if name.startswith("figure-")])
    assert all(told["figures"])
    # Of the height of a figure most is for its curves. Seen red: a legend that grew upwards left a third of "phases-0".
    assert "phases-0" in told["rooms"]
    assert {name: share for name, share in told["rooms"].items() if share < 0.6} == {}


@pytest.mark.slow
def test_the_keyboard_is_enough(run: Path, tmp_path: Path) -> None:
    """Real keys: controls are reached by Tab, in order and with a visible focus, and do what they say. Seen to fail
    with `tabindex="-1"` on the slider, with `outline: none`, and with a slider that does not listen.
    """
    page = write_report([run])
    frames = data(page.read_text())["frames-0"]
    steps = frames["steps"]
    with browser(tmp_path) as chromium:
        chromium.open(page)
        passed: list[str] = []

        def tab_to(wanted: str) -> None:
            for _ in range(80):
                chromium.press("Tab")
                name, outline = chromium.told(
                    "(() => { const at = document.activeElement; return [at.getAttribute('href') ||"
                    " at.id || at.tagName.toLowerCase(), getComputedStyle(at).outlineStyle]; })()"
                )
                passed.append(name)
                if name != "body":
                    assert outline == "solid", name
                if name == wanted:
                    return
            raise AssertionError(f"{wanted} is out of reach: {passed}")

        tab_to("contrast")
        assert passed == ["#findings", "contrast"]  # a link over all of this comes first
        chromium.press("Enter")
        assert chromium.told("document.documentElement.classList.contains('contrast')") is True
        tab_to("#experts")
        chromium.press("Enter")
        tab_to("slider-0")
        assert passed[-2:] == ["#experts", "slider-0"]
        for key, place in (("ArrowLeft", -2), ("ArrowLeft", -3), ("ArrowRight", -2), ("Home", 0)):
            chromium.press(key)
            assert chromium.told("document.getElementById('step-0').textContent") == f"step {steps[place]}", key
            assert chromium.told("document.getElementById('load-0').data[0].z") == frames["z"][place], key
        tab_to("summary")  # the last interval in numbers, folded
        details = "document.activeElement.parentElement.open"
        assert chromium.told(details) is False
        chromium.press("Enter")
        assert chromium.told(details) is True
        tab_to("slider-domains-0")
        before = chromium.told("document.getElementById('step-domains-0').textContent")
        chromium.press("ArrowLeft")
        assert chromium.told("document.getElementById('step-domains-0').textContent") != before


@pytest.mark.slow
def test_the_browser_test_sees_errors(run: Path, tmp_path: Path) -> None:
    """An error in a script, and a file that a page may not load, both reach the console that the test looks at."""
    page = write_report([run])
    plant = "setTimeout(() => { throw new Error('planted'); }, 1); new Image().src = 'https://example.org/x.png';"
    page.write_text(page.read_text().replace("</body>", PROBE.replace("PLANT", plant) + "</body>"))
    _, console = browse(page, tmp_path)
    assert [line for line in console if "planted" in line]
    assert [line for line in console if "example.org" in line]
