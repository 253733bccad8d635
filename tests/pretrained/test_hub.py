"""Models by name from a hub, and onto it: against a server of the hub's HTTP interface on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import MODELS, random_weights, write_folder
from hub_server import CUT, TOKEN, Fault, Hub, Server

from moe_dist.config.host_cache import WAITING, one_at_a_time

ROOT = Path(__file__).parents[2]
NAME = "acme/tiny-moe"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Server() as hub:
        yield hub


Run = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(hub: Hub, tmp_path: Path) -> Start:
    """A command with that hub, in a process of its own: the hub's client reads its environment when it is imported."""

    def call(*words: object, token: str = TOKEN, **environment: str) -> subprocess.Popen[str]:
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf-home"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        own |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_TOKEN": token}
        return subprocess.Popen(
            [sys.executable, "-c", FAST, *map(str, words)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **own, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return call


@pytest.fixture
def run(start: Start) -> Run:
    def call(*words: object, **options: str) -> subprocess.CompletedProcess[str]:
        process = start(*words, **options)
        try:
            out, err = process.communicate(timeout=100)
        finally:
            process.kill()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    return call


FAST = """
import os, sys
from moe_dist.config import model_source
model_source.WAITS = (0.01,) * len(model_source.WAITS)
if "CHUNK" in os.environ:
    from huggingface_hub import constants
    constants.DOWNLOAD_CHUNK_SIZE = int(os.environ["CHUNK"])
from launcher.cli.main import main
sys.exit(main())
"""


def of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as an export makes it, in two files of weights."""
    made = write_folder(tmp_path / "exported", MODELS["qwen"], random_weights(MODELS["qwen"], torch.bfloat16), 2)
    (made / "README.md").write_text("---\nlibrary_name: transformers\n---\n")
    return made


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{from_pretrained: {NAME}}}\n")
    return file


def snapshot(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "hf-home" / "hub" / "models--acme--tiny-moe" / "snapshots").iterdir()
    return found


# ---- in


def test_in_by_name_and_again_without_a_network(
    hub: Hub, run: Run, folder: Path, run_file: Path, tmp_path: Path
) -> None:
    """No code, nothing pickled, nothing in folders; the second time from the cache."""
    files = of(folder)
    hub.files[NAME, "main"] = files | {"modeling_own.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"}
    hub.files[NAME, "main"] |= {"consolidated.safetensors": b"other"}
    said = run("check", run_file)
    assert said.returncode == 0, said.stderr
    assert "every tensor is there" in said.stdout
    place = snapshot(tmp_path)
    assert place.name == hub.commit(NAME, "main")
    assert of(place) == {name: data for name, data in files.items() if name != "README.md"}
    asked = len(hub.asked)
    said = run("check", run_file, HF_HUB_OFFLINE="1")
    assert (said.returncode, len(hub.asked)) == (0, asked), said.stderr
    hub.faults.append(Fault("GET", "/api/", 503, 10**6))
    assert run("check", run_file).returncode == 0


def test_a_revision_and_a_folder_of_that_name(hub: Hub, run: Run, folder: Path, run_file: Path, tmp_path: Path) -> None:
    hub.files[NAME, "main"] = {"config.json": b"{}"}
    hub.files[NAME, "v2"] = of(folder)
    run_file.write_text(f"model: {{from_pretrained: {NAME}@v2}}\n")
    assert run("check", run_file).returncode == 0
    assert snapshot(tmp_path).name == hub.commit(NAME, "v2")
    run_file.write_text(f"model: {{from_pretrained: {NAME}@v3}}\n")
    said = run("check", run_file)
    assert (said.returncode, said.stderr.count("moe-dist: error")) == (2, 1)
    assert "the hub has no such revision of it" in said.stderr
    (tmp_path / "acme").mkdir()
    folder.rename(tmp_path / NAME)
    asked = len(hub.asked)
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / "run.yaml"
    other.write_text(f"model: {{from_pretrained: {NAME}}}\n")
    assert run("check", other).returncode == 0  # that of the working directory
    assert len(hub.asked) == asked


def test_a_busy_hub_and_a_broken_connection(hub: Hub, run: Run, folder: Path, run_file: Path, tmp_path: Path) -> None:
    """Twice 503 at each step; a file breaks off in the middle, and goes on from there."""
    hub.files[NAME, "main"] = of(folder)
    hub.faults += [Fault("GET", "/revision/", 503, 2), Fault("GET", "/tree/", 503, 2), Fault("GET", "00001", 503, 2)]
    hub.faults += [Fault("GET", "00002", CUT)]
    said = run("check", run_file, CHUNK="1000")
    assert said.returncode == 0, said.stderr
    assert all(fault.count == 0 for fault in hub.faults)
    half = len(hub.files[NAME, "main"]["model-00002-of-00002.safetensors"]) // 2
    assert hub.ranges == [("model-00002-of-00002.safetensors", f"bytes={half // 1000 * 1000}-")]
    assert {name: data for name, data in of(folder).items() if name != "README.md"} == of(snapshot(tmp_path))


@pytest.mark.parametrize(
    ("token", "offline", "fault", "seen"),
    [
        ("hf_wrong", False, None, "the hub refuses the token (401): set HF_TOKEN"),
        (TOKEN, False, None, "the hub has no such model, or HF_TOKEN may not see it"),
        (TOKEN, True, None, "the hub's cache has not all of it, and the hub cannot be asked"),
        (TOKEN, False, 503, "the hub could not be used: status 503"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    token: str, offline: bool, fault: int | None, seen: str, hub: Hub, run: Run, run_file: Path
) -> None:
    if fault:
        hub.faults.append(Fault("GET", "/api/", fault, 10**6))
    said = run("check", run_file, token=token, **({"HF_HUB_OFFLINE": "1"} if offline else {}))
    assert said.returncode == 2
    errors = [line for line in said.stderr.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1, said.stderr
    assert seen in errors[0]
    assert f"from_pretrained='{NAME}'" in errors[0]


def test_processes_of_one_host_fetch_it_once(
    hub: Hub, run: Run, start: Start, folder: Path, run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that finds another at it waits, and then asks the hub nothing. Without the lock the hub is asked again."""
    hub.files[NAME, "main"] = of(folder)
    assert run("check", run_file).returncode == 0
    asked = len(hub.asked)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with one_at_a_time(f"{NAME}@None", lambda: None) as waited:
        assert not waited
        process = start("check", run_file)
        assert process.stderr is not None
        assert WAITING in process.stderr.readline()
    process.communicate(timeout=100)
    assert (process.returncode, len(hub.asked)) == (0, asked)


# ---- out


@pytest.mark.slow
def test_out_and_in_again(hub: Hub, run: Run, folder: Path, run_file: Path, tmp_path: Path) -> None:
    """Into a branch of a private model; what the hub has is compared, and comes back the same."""
    said = run("export", folder, "--push", NAME, "--private", "--revision", "tuned")
    assert said.returncode == 0, said.stderr
    commit = hub.commit(NAME, "tuned")
    assert said.stdout == f"pushed               5 files to {NAME}, commit {commit}: the hub has what is in {folder}\n"
    assert (hub.private[NAME], hub.files[NAME, "main"]) == (True, {})
    assert hub.files[NAME, "tuned"] == of(folder)
    run_file.write_text(f"model: {{from_pretrained: {NAME}@tuned}}\n")
    assert run("check", run_file).returncode == 0
    assert snapshot(tmp_path).name == commit


@pytest.mark.slow
def test_a_push_goes_on_and_sends_nothing_twice(hub: Hub, run: Run, folder: Path) -> None:
    """Refused in the middle; then 503 at each step and a connection that breaks: every content is taken once."""
    hub.faults.append(Fault("PUT", "/lfs/", 403, 1))
    said = run("export", folder, "--push", NAME)
    assert said.returncode == 2
    assert said.stderr.count("\n") == 1, said.stderr
    assert f"{folder} is whole, and this goes on: moe-dist export {folder} --push {NAME}" in said.stderr
    assert len(hub.lfs) <= 1
    hub.faults = [Fault("POST", pattern, 503, 2) for pattern in ("create", "commit")]
    hub.faults += [Fault("POST", "preupload", 503), Fault("GET", "whoami", 503, 2), Fault("PUT", "/lfs/", CUT)]
    said = run("export", folder, "--push", NAME)
    assert said.returncode == 0, said.stderr
    assert all(fault.count == 0 for fault in hub.faults), hub.faults
    assert len(hub.received) == len({name for name, _ in hub.received}) == 5
    assert hub.files[NAME, "main"] == of(folder)
    received = len(hub.received)
    assert run("export", folder, "--push", NAME).returncode == 0
    assert len(hub.received) == received


def test_what_the_hub_has_otherwise_is_named(hub: Hub, run: Run, folder: Path) -> None:
    """Seen red: without the comparison such a push ends with 0."""

    class Wrong(dict[str, bytes]):
        def __setitem__(self, name: str, data: bytes) -> None:
            super().__setitem__(name, data[:-1] + b"!" if name == "config.json" else data)

    hub.files[NAME, "main"] = Wrong()
    said = run("export", folder, "--push", NAME)
    assert (said.returncode, said.stdout) == (1, "not pushed           config.json: not what is here\n")


@pytest.mark.parametrize(
    ("words", "token", "seen"),
    [
        (("FOLDER", "--push", NAME), "hf_wrong", f"--push {NAME}: the hub refuses the token (401)"),
        (("FOLDER", "--push", "tiny-moe"), TOKEN, "--push tiny-moe: not ORG/NAME"),
        (("FOLDER", "--push", f"{NAME}@main"), TOKEN, "a branch is --revision"),
        (("FOLDER", "--private"), TOKEN, "--private: only with --push"),
        (("FOLDER",), TOKEN, "--output DIR: the folder to make is missing"),
        ((".", "--push", NAME), TOKEN, ".: no exported folder"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(
    words: tuple[str, ...], token: str, seen: str, hub: Hub, run: Run, folder: Path
) -> None:
    said = run("export", *(folder if word == "FOLDER" else word for word in words), token=token)
    assert (said.returncode, said.stderr.count("\n")) == (2, 1), said.stderr
    assert seen in said.stderr
    assert hub.received == []


@pytest.mark.slow
def test_provenance_has_the_commit(hub: Hub, run: Run, folder: Path, tmp_path: Path) -> None:
    hub.files[NAME, "main"] = of(folder)
    said = run("checkpoint", "import", NAME, "--output", "run")
    assert said.returncode == 0, said.stderr
    state: dict[str, Any] = json.loads((tmp_path / "run" / "checkpoint-0" / "trainer_state.json").read_text())
    assert state["pretrained"]["revision"] == hub.commit(NAME, "main")
