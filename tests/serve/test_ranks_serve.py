"""A server over two ranks: the same answers, the load of all experts, and an end that clients can understand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.generate.options import SamplingOptions
from moe_dist.pretrained.inference import find_model, open_model

BODY = {"model": "run", "prompt": ["def ", "x", "abc"], "temperature": 0, "ignore_eos": True, "max_tokens": 6}


PLANTED = """
import importlib.abc, os, sys

class Planting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "moe_dist.serve.load" and os.environ.get("RANK") == "1":
            from moe_dist.generate.engine import MoEInferenceEngine
            forward = MoEInferenceEngine._forward
            def broken(self, rows):
                if os.path.exists(os.environ["PLANTED"]):
                    raise RuntimeError("this rank has no luck")
                return forward(self, rows)
            MoEInferenceEngine._forward = broken

sys.meta_path.insert(0, Planting())
"""
"""A `sitecustomize` by which rank 1 raises in a pass once there is a file."""


@pytest.mark.dist
@pytest.mark.parametrize("how", ["killed", pytest.param("raises", marks=pytest.mark.proof)])
def test_two_ranks_say_what_one_says(
    how: str, run: Path, tmp_path: Path, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until one of them is killed, or raises: then whoever waits is told, and the command fails and names it."""
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PLANTED", f"{tmp_path}/now")
    engine = MoEInferenceEngine(*open_model(find_model(str(run))))
    wanted = engine.generate(BODY["prompt"], SamplingOptions(max_tokens=6, ignore_eos=True))  # type: ignore[arg-type]
    with serving(run, tmp_path, "--nproc", 2, "ep_size=2") as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            said = client.post("/v1/completions", json=BODY).json()
            assert [choice["text"] for choice in said["choices"]] == [answer.text for answer in wanted]
            pairs = 2 * 2 * (said["usage"]["prompt_tokens"] + 3 * 5)
            assert server.metric("expert_tokens_total") == pairs
            endless = BODY | {"prompt": "x", "max_tokens": 1500}
            with (
                ThreadPoolExecutor(1) as pool,
                client.stream("POST", "/v1/completions", json=endless | {"stream": True}) as reply,
            ):
                lines = reply.iter_lines()
                next(lines)
                whole = pool.submit(client.post, "/v1/completions", json=endless)
                server.wait_for("live_requests", 2)
                if how == "killed":
                    os.kill(_rank(server.process.pid, 1), signal.SIGKILL)
                (tmp_path / "now").touch()
                assert server.process.wait(30) == 1
                last = [line for line in lines if line][-1]
        assert whole.result().status_code == 503
        assert whole.result().json()["error"]["code"] == "engine_failed"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
        log = server.log.read_text()
        assert ("rank 1" if how == "killed" else "rank 1: RuntimeError: this rank has no luck") in log
        assert "Traceback" not in log


def _rank(launcher: int, rank: int) -> int:
    found = subprocess.run(["ps", "-eo", "pid,ppid,comm"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()[1:]]
    below, size = {str(launcher)}, 0
    while len(below) > size:
        size = len(below)
        below |= {pid for pid, parent, _ in rows if parent in below}
    [pid] = [pid for pid, _, name in rows if pid in below and name == f"moe-rank-{rank}"]
    return int(pid)
