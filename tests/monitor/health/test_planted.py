"""One run with everything wrong at once, as a person would start it: found, named, alerted, reported."""

from __future__ import annotations

import html
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import rank_of
from promql import evaluate, series

from moe_dist.config import ConfigError
from moe_dist.monitor.health.doctor import findings
from moe_dist.monitor.health.rules import Finding
from moe_dist.monitor.report.page import write_report
from moe_dist.monitor.run_log import read_run

pytestmark = [pytest.mark.dist, pytest.mark.slow]
HARD_LIMIT = 240.0

PLANTS = '''
import os, time
import torch.nn.functional as F
from moe_dist.models.experts import Experts
from moe_dist.models.router import Router


class Sick(Router):
    """In the first layer expert 5 is dead; in the second experts 0 and 1 take all."""

    layers = 0

    def __init__(self, hidden_size, num_experts):
        super().__init__(hidden_size, num_experts)
        self.layer, Sick.layers = Sick.layers, Sick.layers + 1

    def logits(self, x_TD):
        logits = super().logits(x_TD)
        if self.layer == 0:
            return logits + F.pad(logits.new_full((1,), -40.0), (5, self.num_experts - 6))
        return logits + F.pad(logits.new_full((2,), 20.0), (0, self.num_experts - 2))


class Slow(Experts):
    """Rank 1 is slow."""

    def forward(self, rows, rows_per_expert):
        if self.training and os.environ["RANK"] == "1":
            time.sleep(0.05)
        return super().forward(rows, rows_per_expert)
'''

CONFIG = """\
model:
  vocab_size: 272
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  moe_intermediate_size: 32
  num_experts: 8
  router: planted:Sick
  expert: planted:Slow
data: {{source: text, path: '{folder}/text/*.txt', max_seq_length: 64, validation_split: 0.0}}
parallel: {{ep_size: 2}}
train: {{output_dir: '{folder}/run', max_steps: 100000, per_device_train_batch_size: 8}}
monitor:
  logging_steps: 3
  progress: plain
  tensorboard: false
  stall_timeout: 10
  prometheus: {{port: 0}}
launch: {{nproc_per_node: 2, device: cpu}}
"""


@contextmanager
def training(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`moe-dist train` in a session of its own, of which nothing is left."""
    (folder / "text").mkdir()
    for number in range(12):
        words = " ".join(f"word{(number + 1) * place % 97}" for place in range(400))
        (folder / "text" / f"{number}.txt").write_text(words)
    (folder / "planted.py").write_text(PLANTS)
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "moe_dist", "train", str(folder / "run.yaml")]
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(
            *(command,), env={**os.environ, "PYTHONPATH": paths}, stdout=out, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            for pid in session(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(30)


def session(leader: int) -> dict[int, int | None]:
    """Pids of the processes of a session, with the rank each was told."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == leader:
                    found[int(entry.name)] = rank_of(int(entry.name))
    return found


def until(found: Callable[[], Any], process: subprocess.Popen[str], folder: Path) -> Any:
    deadline = time.monotonic() + HARD_LIMIT
    while not (answer := found()):
        assert process.poll() is None, (folder / "out").read_text() + (process.stderr.read() if process.stderr else "")
        assert time.monotonic() < deadline, (folder / "out").read_text()
        time.sleep(0.2)
    return answer


def named(run: Path) -> dict[tuple[str, int | None, int | None], Finding]:
    """Findings of the doctor by kind, layer and rank."""
    try:
        return {(found.kind, found.layer, found.rank): found for found in findings(read_run(run))}
    except ConfigError:  # nothing logged yet
        return {}


PLANTED = {("dead_experts", 0, None), ("collapse", 1, None), ("straggler", None, 1)}


def test_everything_planted_is_found_named_alerted_and_reported(tmp_path: Path) -> None:
    """A dead expert, a collapse, a slow rank, and that rank stopped. Each plant has been left out in turn, and what is
    asked of it here was then missing."""
    run = tmp_path / "run"
    with training(tmp_path) as process:
        until(lambda: named(run).keys() >= PLANTED, process, tmp_path)
        address = yaml.safe_load((run / "targets.json").read_text())[0]["targets"][0]
        (victim,) = (pid for pid, rank in session(process.pid).items() if rank == 1)
        os.kill(victim, signal.SIGSTOP)
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
            scraped = reply.read().decode()
        assert process.wait(HARD_LIMIT) == 1
        assert process.stderr is not None
        said = process.stderr.read().splitlines()
        assert not {pid for pid, rank in session(process.pid).items() if rank is not None}
    line = next(line for line in said if line.startswith("moe-dist: error: "))
    assert line.startswith(f"moe-dist: error: rank 1 (pid {victim}) has not moved for ")
    assert "SIGSTOP" in line

    found = named(run)
    assert found.keys() >= PLANTED | {("run_failed", None, None)}
    assert found["dead_experts", 0, None].experts == (5,)
    assert found["collapse", 1, None].experts == (0, 1)
    failed = found["run_failed", None, None]
    assert failed.severity == "critical"
    assert f"rank 1 (pid {victim}) has not moved for " in failed.words
    assert ("no_end", None, None) not in found
    page = write_report([run]).read_text()
    command = [sys.executable, "-m", "launcher", "doctor", str(run)]
    doctor = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert doctor.returncode == 1
    told, log = " ".join(doctor.stdout.split()), (run / "train.log").read_text()
    for finding in found.values():
        assert html.escape(str(finding)) in page
        assert finding.words in told
    # The log has the numbers of the moment in which each was found.
    for key in PLANTED:
        assert re.search(re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", re.escape(found[key].words)), log), found[key].words
    alerts(scraped, tmp_path)


def alerts(scraped: str, folder: Path) -> None:
    """The rules, on what the run has exposed: seen for half an hour while it stands still, then gone."""
    known = [{"series": 'up{run="r", instance="i", job="j"}', "values": "1x30 0x10"}, *series([scraped], 30)]
    firing = 'count by (alertname, layer) (ALERTS{alertstate="firing", alertname!~"DataStarved|LoadImbalanced"})'

    def expected(*alerts: str) -> list[dict[str, Any]]:
        return [{"labels": f"{{{labels}}}", "value": 1} for labels in alerts]

    wanted = expected(
        'alertname="ExpertsDead", layer="0"',
        'alertname="ExpertsDead", layer="1"',  # all but two
        'alertname="RouterCollapsed", layer="1"',
        'alertname="Straggler"',
        'alertname="TrainingStalled"',
    )
    checks = [
        {"expr": firing, "eval_time": "25m", "exp_samples": wanted},
        {"expr": firing, "eval_time": "38m", "exp_samples": expected('alertname="TrainingUnreachable"')},
    ]
    assert evaluate(known, checks, folder) == ""
