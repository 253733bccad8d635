"""`/train`: who may, what may be trained and from where, and how the queue is got through."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from launcher.connect.environment import outside_of_ranks
from moe_dist.config import FIELDS, ConfigError
from moe_dist.config.names import CODE_KEYS, PATH_KEYS, meaning, takes
from moe_dist.serve.errors import Refused
from moe_dist.serve.train_config import read_config
from moe_dist.serve.training import TrainingQueue


@pytest.fixture
def folder(tmp_path: Path, run_file: dict[str, Any]) -> Path:
    """Of trainings, beside a file that is none of theirs and a link to it."""
    place = tmp_path / "trainings"
    (place / "data").mkdir(parents=True)
    (place / "text.txt").write_text("some words to learn\n" * 200)
    (tmp_path / "secret.txt").write_text("secret")
    (place / "link.txt").symlink_to(tmp_path / "secret.txt")
    (place / "data" / "more.txt").symlink_to(tmp_path / "secret.txt")
    (place / "run.yaml").write_text(json.dumps(run_file))
    (place / "up.yaml").write_text("base: ../outside.yaml\n")
    (tmp_path / "outside.yaml").write_text("train: {max_steps: 1}\n")
    return place


def test_a_run_file_its_overrides_and_a_mapping_are_read(folder: Path, run_file: dict[str, Any]) -> None:
    for config in ("run.yaml", run_file):
        found = read_config(config, ["max_steps=7", "output_dir=other"], folder, own_code=False)
        assert found.train.max_steps == 7
        assert found.data.path == str(folder / "text.txt")
        assert found.train.output_dir == folder / "other"


OUTSIDE = ["../secret.txt", "/etc/passwd", "~/x", "${HOME}/x", "a/../../x", "link.txt", "s3://bucket/x", "", "a\0b"]
OUTSIDE += ["\ud800", "*/../../*.txt"]


@pytest.mark.parametrize("text", OUTSIDE)
@pytest.mark.parametrize("key", sorted(PATH_KEYS))
def test_no_path_leads_out_of_the_folder(folder: Path, run_file: dict[str, Any], key: str, text: str) -> None:
    """Whatever key takes one. Planted: without the check of where a link leads link.txt is read."""
    section, leaf = key.rsplit(".", 1)
    tree: Any = {section: {leaf: text}} if "." not in section else {"monitor": {"prometheus": {leaf: text}}}
    with pytest.raises(ConfigError, match=rf"^{key}=.*: (a path within the folder|there is no such path)"):
        read_config(tree, [], folder, own_code=False)


@pytest.mark.parametrize(
    ("config", "overrides", "words"),
    [
        ("../outside.yaml", [], "config='../outside.yaml': a path within"),
        ("up.yaml", [], "base=.*: a path within"),
        ("nowhere.yaml", [], "nowhere.yaml"),
        ("run.yaml", ["data.path=[text.txt, ../secret.txt]"], "data.path='../secret.txt'"),
        ("run.yaml", ["data.path={a: link.txt}"], "data.path='link.txt'"),
        ("run.yaml", ["data.path=data/*.txt"], r"data.path='data/\*.txt'"),
        ("run.yaml", ["--resume_from_checkpoint", "/tmp"], "checkpoint.resume='/tmp'"),
        ("run.yaml", ["model.from=/etc"], "model.from='/etc'"),
        ("run.yaml", ["tokenizer=gpt2"], "data.tokenizer='gpt2': there is no such path"),
        ("run.yaml", ["eval_tasks=[task.yaml]"], "train.eval_tasks='task.yaml': FILE.jsonl is allowed"),
        ("run.yaml", ["eval_tasks=[hellaswag]"], "train.eval_tasks='hellaswag': FILE.jsonl is allowed"),
        ("run.yaml", ["eval_tasks=['x=/etc/passwd.jsonl']"], "FILE.jsonl is allowed"),
        ("run.yaml", ["base=x"], "base"),
        ("run.yaml", ["ep_size=2"], "ep_size=2"),
        ("run.yaml", ["learning_rate=fast"], "learning_rate='fast'"),
        ({"nothing": 1}, [], "nothing=1: unknown key"),
        ({"data": [1]}, [], "data"),
    ],
)
def test_what_cannot_be_is_one_line(folder: Path, config: Any, overrides: list[str], words: str) -> None:
    queue = TrainingQueue(folder, (), {})
    with pytest.raises(Refused, match=words) as raised:
        asyncio.run(queue.add("boss", config, overrides))
    assert raised.value.status == 422
    assert "\n" not in raised.value.message


def test_classes_of_ones_own_are_refused_unless_allowed(folder: Path) -> None:
    described = {key for key, field in FIELDS.items() if "package.module:Class" in meaning(field) + takes(key)}
    assert described == CODE_KEYS
    for key in CODE_KEYS:
        value: Any = ["os:system"] if "list" in str(FIELDS[key].annotation) else "os:system"
        section, leaf = key.split(".")
        with pytest.raises(ConfigError, match=f"{key}=.*--train-code"):
            read_config({section: {leaf: value}}, [], folder, own_code=False)
    found = read_config("run.yaml", ["callbacks=[os:system]"], folder, own_code=True)
    assert found.train.callbacks == ["os:system"]


def test_a_training_is_no_rank_of_the_server() -> None:
    rank = {"RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MOE_DIST_REPORTS": "5", "PMI_RANK": "0"}
    others = {"PATH": "/bin", "HF_HOME": "/x", "MOE_DIST_DEBUG": "1", "OMP_NUM_THREADS": "1"}
    assert outside_of_ranks({**rank, **others, "SLURM_PROCID": "0", "TORCHELASTIC_RUN_ID": "x"}) == others


@pytest.fixture
def boss(server: Any, run_file: dict[str, Any]) -> Iterator[httpx.Client]:
    (server.log.parent / "trainings" / "text.txt").write_text("some words to learn\n" * 200)
    headers = {"authorization": f"Bearer {server.keys['boss']}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


def test_only_admins_train(server: Any, boss: httpx.Client, run_file: dict[str, Any]) -> None:
    for method, path in (("POST", "/train"), ("GET", "/train"), ("GET", "/train/x"), ("POST", "/train/x/cancel")):
        for name, status in (("alice", 403), ("watch", 403), (None, 401)):
            headers = {"authorization": f"Bearer {server.keys[name]}"} if name else {}
            reply = httpx.request(method, server.url + path, headers=headers, json={"config": run_file})
            assert reply.status_code == status, (method, path, name)
    assert boss.get("/train/x").status_code == boss.get("/train/x/log").status_code == 404
    reply = boss.post("/train", json={"config": run_file, "overrides": ["train.output_dir=/tmp/x"]})
    assert reply.status_code == 422
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == ("train.output_dir", "invalid_config")


BODIES: list[Any] = [None, [], "x", {}, {"config": None}, {"config": 1}, {"config": ""}, {"config": "x" * 2000}]
BODIES += [{"config": {"\ud800": 1}}, {"config": {"": {}}}, {"config": {"train": {"max_steps": 1e400}}}]
BODIES += [{"config": {}, "overrides": "x=1"}, {"config": {}, "overrides": ["x"]}, {"config": {}, "overrides": ["="]}]
BODIES += [
    {"config": {}, "overrides": ["a: [b"]},
    {"config": {}, "overrides": ["model={a: &x [*x]}"]},
    {"config": "\0"},
]
BODIES += [{"config": {}, "more": 1}, {"config": {"data": {"path": {"a": {"b": [{}]}}}}}, {"config": "\ud800"}]


def test_bodies_that_are_wrong_are_refused(boss: httpx.Client) -> None:
    for body in BODIES:
        content = json.dumps(body).encode()
        reply = boss.post("/train", content=content, headers={"content-type": "application/json"})
        assert reply.status_code == 422, (body, reply.text)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert len(reply.json()["error"]["message"]) < 2001
    assert boss.get("/train").json()["data"] == []


def test_without_a_folder_nothing_is_trained(run: Path) -> None:
    from moe_dist.generate.engine import MoEInferenceEngine
    from moe_dist.pretrained.inference import find_model, open_model
    from moe_dist.serve.app import Service
    from moe_dist.serve.engine_thread import EngineThread
    from moe_dist.serve.gate import Limits

    engine = MoEInferenceEngine(*open_model(find_model(str(run))))
    service = Service(EngineThread(engine, 8), "run", limits=Limits(), keys=None, audit=None)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(service.application)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/train", json={"config": {}})

    reply = asyncio.run(ask())
    assert reply.status_code == 404
    assert "--train-dir" in reply.json()["error"]["message"]


def until(client: httpx.Client, training: str, *wanted: str) -> dict[str, Any]:
    deadline = time.monotonic() + 200
    while (found := client.get(f"/train/{training}").json())["status"] not in wanted:
        assert time.monotonic() < deadline, (found, client.get(f"/train/{training}/log").text)
        time.sleep(0.1)
    return found


def test_one_that_will_not_end_is_killed(folder: Path) -> None:
    """Once the time for it is over. Planted: without `kill` this never ends."""
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)"
    )
    queue = TrainingQueue(folder, (sys.executable, "-u", "-c", deaf), dict(os.environ))

    async def live() -> None:
        queue.start()
        going, waiting = await queue.add("boss", "run.yaml", []), await queue.add("boss", "run.yaml", [])
        while "deaf" not in queue.log(going, 10):
            await asyncio.sleep(0.02)
        assert (queue.card(going)["status"], queue.card(waiting)["position"]) == ("running", 0)
        async with asyncio.timeout(60):
            await queue.stop(0.1)
        assert (going.status, going.exit_code) == ("cancelled", 137)
        assert (waiting.status, waiting.started) == ("cancelled", None)
        with pytest.raises(Refused, match="being stopped"):
            await queue.add("boss", "run.yaml", [])

    asyncio.run(live())


@pytest.mark.proof
@pytest.mark.dist
def test_the_queue_is_got_through_one_at_a_time(server: Any, boss: httpx.Client, run_file: dict[str, Any]) -> None:
    """One is cancelled while it runs and saves, one while it waits, one trains to its end."""
    place = server.log.parent / "trainings"
    first, second, third = (
        boss.post("/train", json={"config": run_file, "overrides": overrides}).json()
        for overrides in ([], ["output_dir=runs/two"], ["output_dir=runs/three", "max_steps=2", "save_steps=2"])
    )
    assert (second["status"], third["status"]) == ("queued", "queued")
    assert third["position"] == second["position"] + 1
    assert boss.post(f"/train/{second['id']}/cancel").json()["status"] == "cancelled"
    server.wait_for_a_step(boss, first["id"])
    assert boss.get(f"/train/{third['id']}").json()["status"] == "queued"
    boss.post(f"/train/{first['id']}/cancel")
    ended = until(boss, first["id"], "cancelled", "failed", "succeeded")
    assert (ended["status"], ended["exit_code"]) == ("cancelled", 75)
    assert list((place / "runs" / "one").glob("checkpoint-*"))
    done = until(boss, third["id"], "succeeded", "failed")
    assert (done["status"], done["exit_code"], done["step"], done["output_dir"]) == ("succeeded", 0, 2, "runs/three")
    assert not (place / "runs" / "two").exists()
    assert "is saved" in boss.get(f"/train/{first['id']}/log", params={"lines": 5}).text
    assert [one["id"] for one in boss.get("/train").json()["data"][:3]] == [third["id"], second["id"], first["id"]]
    lines = [line for line in server.audited() if line.get("training") == third["id"]]
    assert {line["key"] for line in lines} == {"boss"}
    assert [line["status"] for line in lines if "path" not in line] == ["running", "succeeded"]
    assert [line["path"] for line in lines if "path" in line] == ["/train"]


@pytest.mark.proof
@pytest.mark.dist
def test_sigterm_lets_a_training_save(run: Path, folder: Path, tmp_path: Path, serving: Any) -> None:
    """What waits will not begin. Without keys this machine is an admin."""
    with serving(run, tmp_path, "--train-dir", folder, "--audit-log", tmp_path / "audit.jsonl") as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            going, waiting = (client.post("/train", json={"config": "run.yaml"}).json() for _ in range(2))
            server.wait_for_a_step(client, going["id"])
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(100) == 0
        ends = {line["training"]: line for line in server.audited() if line["status"] == "cancelled"}
        assert (ends[going["id"]]["exit_code"], ends[waiting["id"]]["exit_code"]) == (75, None)
        assert list((folder / "runs" / "one").glob("checkpoint-*"))
        assert "Traceback" not in server.log.read_text()


@pytest.mark.proof
@pytest.mark.dist
def test_a_training_saves_when_its_server_is_killed(folder: Path) -> None:
    """The kernel tells it. The server here is another Python that starts one and dies at once."""
    command = [sys.executable, "-u", "-m", "moe_dist", "train", str(folder / "run.yaml")]
    log = folder / "log"
    text = (
        "import os, signal, subprocess, sys, time\n"
        f"environment = {{**os.environ, 'MOE_DIST_LAUNCHER': str(os.getpid())}}\n"
        f"child = subprocess.Popen({command!r}, env=environment, cwd={str(folder)!r}, stdout=open({str(log)!r}, 'w'),\n"
        "    stderr=subprocess.STDOUT, start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(100)\n"
    )
    server = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    child = int(server.stdout.readline())
    metrics = folder / "runs" / "one" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and '"kind": "train"' in metrics.read_text()):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    server.kill()
    server.wait(10)
    server.stdout.close()
    try:
        while "is saved" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
    finally:
        with_it_gone(child)
    assert list((folder / "runs" / "one").glob("checkpoint-*"))


def with_it_gone(pid: int) -> None:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
