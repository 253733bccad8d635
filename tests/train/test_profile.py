"""`moe-dist profile`: time and bytes go to the part that they belong to, on real ranks and one page."""

from __future__ import annotations

import html
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import mesh_of, micro_batches, tiny_config
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from moe_dist.config import load_mapping
from moe_dist.models.experts import Expert
from moe_dist.models.moe import LocalDispatcher
from moe_dist.monitor.report.profile_page import terminal_lines
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.state_bytes import state_bytes
from moe_dist.train.build import build_model
from moe_dist.train.passes import model_inputs
from moe_dist.train.profiler_ranges import Part, Ranges, entered, saved_for_backward
from moe_dist.train.profiling import run_profile

SLEEP = 0.02


class _SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        time.sleep(3 * SLEEP)
        return grads[0]


class SlowExpert(Expert):
    """Sleeps forward, and three times as long backward; only in the last layer."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.layer = nn.Linear(hidden_size, hidden_size)
        self.slow = False

    def forward(self, x_RD: Tensor) -> Tensor:
        if not self.slow:
            return self.layer(x_RD)
        time.sleep(SLEEP)
        return _SlowBackward.apply(self.layer(x_RD))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_time_belongs_to_the_part_that_takes_it(recompute: str) -> None:
    """Forward and backward, also where autograd runs forward again. Seen to fail with backward nodes given to the
    outermost part instead of the innermost, and with parts that keep the seconds of parts inside them.
    """
    config = tiny_config("model.expert=test_profile:SlowExpert", f"train.gradient_checkpointing={recompute}")
    mesh = mesh_of(1)
    clock = Clock(mesh.device)
    model = build_model(config, mesh, clock)
    (slow,) = [expert for name, expert in model.named_modules() if name.endswith("layers.2.moe.experts.experts.5")]
    slow.slow = True
    inputs = model_inputs(micro_batches(1)[0])
    with entered(model, clock) as ranges, profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        started = time.perf_counter()
        model(**inputs).float().square().mean().backward()
        wall = time.perf_counter() - started
    found = ranges.seconds(profiler.events())
    experts = Part(2, "experts")
    assert SLEEP <= found[experts, "forward"] < SLEEP + 0.5 * SLEEP + 0.2 * wall
    again = SLEEP if recompute == "full" else 0.0
    assert 3 * SLEEP + again <= found[experts, "backward"] < 3 * SLEEP + again + 0.5 * SLEEP + 0.2 * wall
    assert found[Part(0, "experts"), "backward"] < SLEEP
    assert {part.layer for part, _ in found} == {None, 0, 1, 2}
    names = {part.name for part, _ in found}
    assert {"attention", "router", "dispatch", "combine", "shared expert", "dense feed-forward", "output head"} <= names
    assert min(found.values()) > -1e-4
    assert 0.5 * wall < sum(found.values()) <= wall


def test_nothing_is_left_behind() -> None:
    config = tiny_config()
    clock = Clock(torch.device("cpu"))
    model = build_model(config, mesh_of(1), clock)
    with entered(model, clock):
        assert not all(isinstance(moe.dispatcher, LocalDispatcher) for moe in model.moe_layers())
    assert all(isinstance(moe.dispatcher, LocalDispatcher) for moe in model.moe_layers())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert "measure" not in vars(clock)


def test_bytes_kept_for_backward_are_counted_once_where_they_are_first_kept() -> None:
    """sin keeps its input, cos keeps its own, and a weight is nobody's activation."""
    ranges, weight = Ranges(), torch.randn(50, requires_grad=True)
    x = torch.randn(50, requires_grad=True)
    with saved_for_backward(ranges, [weight]) as saved:
        with ranges.part(0, "sine"):
            y = x.sin()
        with ranges.part(1, "cosine"):
            z = y.cos() * weight
        with ranges.part(2, "again"):
            (y.exp() + z).sum()
    found = saved()
    # Products keep both factors: cos(y) once, the weight not. exp keeps its result.
    assert found == {Part(0, "sine"): 200, Part(1, "cosine"): 400, Part(2, "again"): 200}


CONFIG = """
model: {vocab_size: 272, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, moe_intermediate_size: 48,
  num_experts: 4, num_experts_per_tok: 2}
data: {source: text, path: TEXTS, max_seq_length: 32}
parallel: {ep_size: 2}
train: {output_dir: RUN, per_device_train_batch_size: 4}
checkpoint: {save_steps: 1}
launch: {nproc_per_node: 2}
"""


def cells(page: str, anchor: str) -> list[list[str]]:
    """The rows of the first table after a heading, as text."""
    table = page[page.index(f'id="{anchor}"') :]
    table = table[: table.index("</table>")]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [
        [html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows
    ]


@pytest.mark.dist
def test_the_command_on_two_ranks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"def f(x):\n    return x * {number}\n" * 40)
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG.replace("TEXTS", str(tmp_path / "*.txt")).replace("RUN", str(run)))
    command = [
        sys.executable,
        "-m",
        "launcher",
        "profile",
        str(file),
        *("--compute", "--memory", "--report", str(tmp_path / "pages"), "--format", "html"),
        "--steps",
        "2",
        "bias_update_rate=1e-3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "USDT" not in done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "pages/profile.html")
    assert "all-to-all against compute" in done.stdout
    assert not run.exists()  # nothing is saved, nothing logged
    page = (tmp_path / "pages/profile.html").read_text()
    assert not re.search(r"<script|https?://|src=", page)
    assert re.search(r"<pre>.*rank 1", page, re.DOTALL)
    phases = {row[0]: float(row[2]) for row in cells(page, "phases")[1:]}
    assert {"computing", "the all-to-all", "updating weights", "reducing gradients"} <= phases.keys()
    talk = [[float(number) for number in row[2:4]] for row in cells(page, "talk")[1:]]
    assert sum(row[0] for row in talk) / 2 == pytest.approx(phases["the all-to-all"], rel=0.3, abs=0.5)
    # Forward, backward, all-to-all: what the ranges hold and what the phases hold is the same time.
    both = phases["computing"] + phases["the all-to-all"]
    assert sum(map(sum, talk)) / 2 == pytest.approx(both, rel=0.05, abs=0.1)
    layers = [row[0].strip() for row in cells(page, "layers")[1:]]
    assert {"layer 0", "layer 1", "not of a layer", "experts", "router", "all-to-all", "combine"} <= set(layers)
    assert len(cells(page, "operators")) > 10
    messages = {row[0]: tuple(map(float, row[2:4])) for row in cells(page, "overlap")[1:]}
    assert {f"layer {layer}, {way}" for layer in (0, 1) for way in ("dispatch", "combine")} < messages.keys()
    waited = sum(exposed for name, (exposed, _) in messages.items() if name.startswith("layer"))
    assert waited == pytest.approx(phases["the all-to-all"], rel=0.3, abs=0.5)
    assert messages["gradients"][1] > 0.0  # buckets travel while backward goes on
    assert "all of it" in done.stdout
    memory = {(row[0], row[1]): (row[2], row[3]) for row in cells(page, "memory")[1:]}
    for rank in ("rank 0", "rank 1"):
        for owner in ("weights", "gradients", "optimizer"):
            measured, predicted = memory[rank, owner]
            assert measured == predicted != "0"
        assert int(memory[rank, "activations"][0].replace(",", "")) > 10_000


def test_memory_alone_times_nothing(tmp_path: Path) -> None:
    """And time alone measures no activations. Seen to fail with `compute` not looked at."""
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"def f(x):\n    return x * {number}\n" * 40)
    text = CONFIG.replace("TEXTS", str(tmp_path / "*.txt")).replace("RUN", str(tmp_path / "run"))
    config = load_mapping(yaml.safe_load(text) | {"parallel": {"ep_size": 1}})
    for compute, memory in ((False, True), (True, False)):
        found = run_profile(config, mesh_of(1), 2, compute, memory, tmp_path / "pages")
        assert found is not None
        told, page = found[0], found[1].read_text()
        (rank,) = told.ranks
        assert (sum(rank.phases.values()) > 0, len(rank.operators) > 10) == (compute, compute)
        assert (len(rank.saved) > 3) is memory
        assert ("Run with --compute" in page, "Run with --memory" in page) == (not compute, not memory)
        assert terminal_lines(told)[-1].startswith("  memory of rank 0 ")
        assert (len(terminal_lines(told)) > 1) is compute


LAYOUTS = (
    "parallel.pp_size=2 parallel.ep_size=1 train.gradient_accumulation_steps=2",
    "parallel.ep_size=1 parallel.zero_stage=3",
    "parallel.zero_stage=1 parallel.engine=deepspeed",
    "launch.nproc_per_node=1 parallel.ep_size=1 train.gradient_checkpointing=full train.bf16=true",
)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kind_of_layout(tmp_path: Path, layout: str) -> None:
    if "deepspeed" in layout:
        pytest.importorskip("deepspeed")
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"def f(x):\n    return x * {number}\n" * 40)
    (tmp_path / "tiny.yaml").write_text(
        CONFIG.replace("TEXTS", str(tmp_path / "*.txt")).replace("RUN", str(tmp_path / "run"))
    )
    words = ["profile", str(tmp_path / "tiny.yaml"), "--compute", "--memory", "--steps", "2", *layout.split()]
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *words], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "run" / "profile.html").read_text()
    phases = {row[0]: float(row[2]) for row in cells(page, "phases")[1:]}
    talk = [[float(number) for number in row[2:4]] for row in cells(page, "talk")[1:]]
    both = phases["computing"] + phases.get("the all-to-all", 0.0)
    assert sum(map(sum, talk)) / len(talk) == pytest.approx(both, rel=0.1, abs=0.5)
    assert {"layer 0", "layer 1"} <= {row[0].strip() for row in cells(page, "layers")[1:]}
    for row in cells(page, "memory")[1:]:
        assert row[1] == "activations" or row[2] == row[3] or "deepspeed" in layout


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "profile", "configs/demo.yaml", "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "steps" in done.stderr
    done = subprocess.run(
        [*command[:-1], "1", "--format", "pdf"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "html" in done.stderr


def test_measured_and_predicted_are_the_same_formula() -> None:
    """What the page shows beside the measured bytes is what `moe-dist check` prints."""
    config = tiny_config()
    (bytes_of_a_rank,) = state_bytes(config, mesh_of(1).layout)
    assert bytes_of_a_rank.weights == sum(p.nbytes for p in build_model(config, mesh_of(1)).parameters())
