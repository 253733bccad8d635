"""A tiny run and one server of it, which the tests of this folder share."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from moe_dist.serve.keys import new_key
from moe_dist.train import MoETrainer

MODEL = {
    "vocab_size": 264,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 2048,
}
OPTIONS = {
    "max_seq_length": 32,
    "max_steps": 1,
    "save_steps": 1,
    "progress": "none",
    "tensorboard": False,
    "validation_split": 0.0,
    "seed": 3,
}

PATIENCE = 200.0
"""Seconds until something counts as not coming: far more than it takes, on a machine that others use too."""


@dataclass
class Server:
    """A process that serves, at `url` (without /v1)."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    keys: dict[str, str]
    audit: Path

    def get(self, path: str, key: str | None = None) -> str:
        headers = {"authorization": f"Bearer {self.keys[key]}"} if key else {}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=20) as reply:
            return str(reply.read().decode())

    def metric(self, name: str) -> float:
        """The sum of all its samples."""
        lines = self.get("/metrics", "watch" if self.keys else None).splitlines()
        return sum(float(line.split()[-1]) for line in lines if re.match(rf"moe_dist_serve_{name}[{{ ]", line))

    def wait_for(self, name: str, value: float) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)

    def wait_for_a_step(self, client: httpx.Client, training: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while (found := client.get(f"/train/{training}").json())["step"] is None:
            log = client.get(f"/train/{training}/log").text
            assert time.monotonic() < deadline, (found, log)
            assert found["status"] in ("queued", "running"), (found, log)
            time.sleep(0.1)

    def audited(self, at_least: int = 0) -> list[dict[str, Any]]:
        """Lines of the audit log; that of an answer comes after it."""
        deadline = time.monotonic() + 60
        while len(lines := self.audit.read_text().splitlines()) < at_least and time.monotonic() < deadline:
            time.sleep(0.02)
        return [json.loads(line) for line in lines]


@contextmanager
def _serving(run: Path, folder: Path, *options: object, keys: dict[str, str] | None = None) -> Iterator[Server]:
    log = folder / "server.log"
    command = [sys.executable, "-m", "launcher", "serve", run, "--port", 0, *options]
    with log.open("wb") as output:
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE
        while (found := re.search(r"(https?://[\d.]+:\d+)/v1", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Server(process, found[1], log, keys or {}, folder / "audit.jsonl")
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@pytest.fixture(scope="session", name="serving")
def _the_way_to_serve() -> Any:
    """`with serving(run, folder, *options) as server`: another server."""
    return _serving


@pytest.fixture(scope="session")
def run_file() -> dict[str, Any]:
    """A training of seconds from `text.txt`, whose last step is far away."""
    return {
        "model": MODEL,
        "data": {"path": "text.txt", "source": "text", "max_seq_length": 32, "validation_split": 0.0},
        "train": {"max_steps": 100_000, "output_dir": "runs/one", "logging_steps": 1, "progress": "none"},
        "checkpoint": {"save_steps": 50_000},
        "monitor": {"tensorboard": False},
        "launch": {"device": "cpu"},
    }


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs") / "run"
    texts = [f"def f{i}(x):\n    return x * {i}\n" * 12 for i in range(8)]
    MoETrainer({}, model_config=MODEL, training_config=OPTIONS, output_dir=place).train(texts)
    return place


@pytest.fixture(scope="package")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With keys `alice` (user), `watch` (metrics), `boss` (admin), `poor` (one request a minute); eight answers at
    once, 32 in all. Trainings are in `trainings` beside the log.
    """
    folder = tmp_path_factory.mktemp("serve")
    keys, lines = {}, []
    for name, role in (("alice", "user"), ("watch", "metrics"), ("boss", "admin"), ("poor", "user")):
        keys[name], line = new_key(name, role)
        lines.append(line + " requests_per_minute=1" * (name == "poor"))
    (folder / "keys").write_text("\n".join(["# who may ask", *lines]))
    (folder / "trainings").mkdir()
    options: tuple[object, ...] = ("--keys", folder / "keys", "--audit-log", folder / "audit.jsonl", "--max-batch", 8)
    options += ("--train-dir", folder / "trainings")
    limits = ("--max-waiting", 24, "--max-tokens", 1500, "--max-body-kb", 20)
    with _serving(run, folder, *options, *limits, keys=keys) as found:
        yield found
