"""Runs whose checkpoints go to an object store: a server that speaks S3's protocol, and fsspec's memory.

The server is moto's, over HTTP on loopback; the store is reached as anybody's is, through s3fs and the environment.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from patches import Replace
from ranks import free_port
from s3_server import s3_server
from saved import MODEL, TEXTS, TRAINING, found_at, state, train, trained

from launcher.cli import commands
from moe_dist.checkpoint.lock import RunLock
from moe_dist.checkpoint.manager import Checkpoints
from moe_dist.checkpoint.reading import whole
from moe_dist.checkpoint.storage import CHUNK, open_storage
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import FILE, CheckpointError
from moe_dist.checkpoint.storage.object import ObjectStorage
from moe_dist.checkpoint.tools.inspecting import digests
from moe_dist.config import CheckpointConfig
from moe_dist.parallel.mesh import Mesh
from moe_dist.train import MoETrainer

pytest.importorskip("moto.server", reason="the S3 server of these tests is moto's")
pytest.importorskip("s3fs", reason="s3:// needs the package s3fs")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(params=["s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place of its own for every test."""
    if request.param == "s3":
        request.getfixturevalue("server")
    yield f"{request.param}://bucket/{tmp_path.name}"
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


@pytest.fixture
def storage(place: str) -> ObjectStorage:
    storage = open_storage(place)
    assert isinstance(storage, ObjectStorage)
    return storage


def fill(storage: ObjectStorage, step: int) -> list[str]:
    """A checkpoint of the finished run, taken to the store; its object names."""
    source = trained() / f"checkpoint-{step}"
    names = sorted(file.name for file in source.iterdir() if file.name != FILE)
    for name in [*names, FILE]:
        storage.put(f"checkpoint-{step}/{name}", (source / name).read_bytes())
    return [*names, FILE]


def test_a_run_saves_there_goes_on_from_there_and_keeps_what_it_should(place: str, tmp_path: Path) -> None:
    """Six steps straight on disk against four, a new start and two more in the store."""
    train(tmp_path / "run", folder=place, max_steps=4, save_total_limit=1, eval_steps=2)
    storage = open_storage(place)
    assert storage.steps() == [4]
    assert storage.folders() == ["checkpoint-4"]
    assert whole(found_at(place, 4)) == []
    assert digests(found_at(place, 4)) == digests(found_at(trained(), 4))
    again = train(tmp_path / "run", folder=place, save_total_limit=2, eval_steps=2)
    assert again.steps == 6
    assert len(again.losses) == 2
    assert storage.steps() == [4, 6]
    assert digests(found_at(place, 6)) == digests(found_at(trained(), 6))
    assert not list((tmp_path / "run").glob("*checkpoint*"))
    # A folder with nothing but the store's URL goes on from it too: nothing of the state is elsewhere. It counts its
    # starts from what lies there, and a start with the first folder, whose lock knows nothing of it, writes no more.
    # Seen to fail with `acquire` not told of the generation it has seen, and without the look for a newer one.
    assert train(tmp_path / "other", folder=place, max_steps=7).steps == 7
    assert [storage.manifest(step).generation for step in (4, 6, 7)] == [1, 2, 3]
    late = RunLock.acquire(tmp_path / "run")
    manager = Checkpoints(storage, Mesh.single(), CheckpointConfig(), late.run, 2, late)
    manager.begin(8, state(8), {"config": {}}, {})
    assert (
        manager.settle().error == f"{place}: start 3 of a run writes here, and this is start 2; nothing more is written"
    )
    late.release()
    assert storage.folders() == ["checkpoint-4", "checkpoint-6", "checkpoint-7"]


def test_sealed_there(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "ab" * 32)
    train(tmp_path / "run", folder=place, encryption_key="env:KEY", max_steps=4, eval_steps=2)
    assert digests(found_at(place, 4), Keys(["env:KEY"])) == digests(found_at(trained(), 4))
    assert train(tmp_path / "run", folder=place, encryption_key="env:KEY", max_steps=5).steps == 5


def test_without_a_manifest_it_is_no_checkpoint(storage: ObjectStorage, place: str, tmp_path: Path) -> None:
    """A save killed before its last object: not listed, not gone on from, collected by the next start.

    Seen to fail with `steps` that asks for folders only, and with `leftovers` that finds none.
    """
    fill(storage, 2)
    names = fill(storage, 4)
    storage.remove_file(f"checkpoint-4/{FILE}")
    storage.put("checkpoint-4/receipt-1-00001.json", b"{}")
    storage.put("notes/mine.txt", b"not ours")
    storage.put("checkpoint-9/mine.txt", b"not ours either")
    assert storage.steps() == [2]
    assert storage.leftovers() == ["checkpoint-4"]
    assert len(storage.files("checkpoint-4")) == len(names)
    with pytest.raises(CheckpointError, match=r"checkpoint-4: no complete checkpoint there .*: checkpoint-2\)"):
        storage.manifest(4)
    result = train(tmp_path / "run", folder=place, max_steps=3, save_steps=0, eval_steps=2)
    assert (result.steps, len(result.losses)) == (3, 1)
    assert storage.steps() == [2, 3]
    assert storage.files("checkpoint-4") == []
    assert storage.files("checkpoint-9") == ["mine.txt"]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from moe_dist.checkpoint.storage import object as object_storage
from saved import train
def die(self, staging, step, manifest):
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    publish(self, staging, step, manifest)
publish, object_storage.ObjectStorage._publish = object_storage.ObjectStorage._publish, die
train(Path(sys.argv[2]), folder=sys.argv[3], eval_steps=2)
"""


def test_a_run_killed_before_its_manifest(server: str, tmp_path: Path) -> None:
    """A whole process, SIGKILL when every shard is uploaded and the manifest is not."""
    place = f"s3://bucket/{tmp_path.name}"
    words = [sys.executable, "-c", KILLED, str(Path(__file__).parents[2]), str(tmp_path / "run"), place]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr
    storage = open_storage(place)
    assert storage.steps() == [2]
    assert storage.leftovers() == ["checkpoint-4"]
    assert any(name.startswith("shard-") for name in storage.files("checkpoint-4"))
    result = train(tmp_path / "run", folder=place, eval_steps=2)
    assert len(result.losses) == 4
    assert digests(found_at(place, 6)) == digests(found_at(trained(), 6))
    assert whole(found_at(place, 4)) == []


def test_a_step_is_never_overwritten(storage: ObjectStorage, place: str, tmp_path: Path) -> None:
    """Going on from an older step, or afresh, would meet those after it, which nobody can move: refused in one line.

    Seen to fail when `begin` clears the folder first, and when a save that failed removes its folder: both belong to
    the committed checkpoint here. And without the refusals: the next start would go on from the old run.
    """
    for step in (2, 4, 6):
        fill(storage, step)
    before = {path: storage.read(path) for step in (4, 6) for path in _paths(storage, step)}
    with pytest.raises(CheckpointError, match="checkpoint-4: is there already"):
        storage.begin(storage.staging(4, 9), 9)
    with pytest.raises(CheckpointError, match=r"checkpoint-4, checkpoint-6 would be later than .* another checkpoint"):
        train(tmp_path / "run", folder=place, resume="2")
    with pytest.raises(CheckpointError, match=r"never: .* \(the newest of step 6\).* give another checkpoint\.folder"):
        train(tmp_path / "run", folder=place, resume="never")
    assert list(tmp_path.iterdir()) == []
    assert {path: storage.read(path) for step in (4, 6) for path in _paths(storage, step)} == before
    # A writer that began before the other one committed.
    manifest = storage.manifest(4)
    with pytest.raises(CheckpointError, match="is there already"):
        storage.commit("checkpoint-4", manifest)
    storage.discard("checkpoint-4", 9)
    assert {path: storage.read(path) for step in (4, 6) for path in _paths(storage, step)} == before


def test_retention_keeps_nothing_that_was_refused(storage: ObjectStorage, place: str, tmp_path: Path) -> None:
    """A damaged newest step cannot be moved away: it is neither kept in place of a good one nor counted.

    Seen to fail with `retain` counting every step that has a manifest: the damaged one alone was left.
    """
    for step in (2, 6):
        fill(storage, step)
    shard = next(name for name in storage.files("checkpoint-6") if name.startswith("shard-"))
    storage.put(f"checkpoint-6/{shard}", b"damaged")
    train(tmp_path / "run", folder=place, max_steps=4, save_total_limit=1, eval_steps=2)
    assert storage.steps() == [4, 6]
    assert whole(found_at(place, 4)) == []


def _slowly(do: Any, asleep: threading.Event, gate: threading.Event, *arguments: Any) -> None:
    asleep.set()
    assert gate.wait(60)
    do(*arguments)


def test_a_start_that_wakes_up_leaves_the_next_ones_files_alone(place: str, tmp_path: Path) -> None:
    """Both save step 10 into one folder: start 1 hangs in an upload, start 2 is about to commit when 1 goes on.

    Seen to fail with `discard` removing the folder, and with receipts that do not bear the number of their start.
    """
    asleep, gates = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    managers = []
    for index, hanging in enumerate(("write", "_publish")):
        lock = RunLock.acquire(tmp_path / "run")
        storage = open_storage(place)
        setattr(storage, hanging, partial(_slowly, getattr(storage, hanging), asleep[index], gates[index]))
        manager = Checkpoints(storage, Mesh.single(), CheckpointConfig(), lock.run, lock.generation, lock)
        manager.begin(10, state(10), {"config": {}}, {})
        managers.append(manager)
        assert asleep[index].wait(60)
        lock.release()
    gates[0].set()
    error = managers[0].settle().error
    assert error is not None
    assert "has taken over from start 1" in error
    with pytest.raises(CheckpointError, match="start 2 of the run writes there, this is 1"):
        storage.begin("checkpoint-10", 1)
    gates[1].set()
    assert managers[1].settle().error is None
    storage.discard("checkpoint-10", 2)  # its answer got lost on the way: what is committed stays
    assert whole(found_at(place, 10)) == []


def _paths(storage: ObjectStorage, step: int) -> list[str]:
    return [f"checkpoint-{step}/{name}" for name in storage.files(f"checkpoint-{step}")]


def test_of_two_that_publish_at_once_one_does(storage: ObjectStorage) -> None:
    """The store itself decides (If-None-Match), not a look before. Seen to fail with a plain put."""
    fill(storage, 2)
    content = storage.read(f"checkpoint-2/{FILE}")
    with pytest.raises(CheckpointError, match="is there already"):
        storage._publish("checkpoint-2", 2, b"another")
    assert storage.read(f"checkpoint-2/{FILE}") == content


def test_an_upload_that_breaks_off_leaves_no_object(storage: ObjectStorage) -> None:
    """Also one of several parts. Seen to fail with a `with` block, which completes the upload on its way out."""

    def pieces(count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield bytes(CHUNK)
        raise OSError("the source went away")

    for count in (1, 5):
        with pytest.raises(OSError, match="went away"):
            storage.write("checkpoint-2/shard-1-00000.safetensors", pieces(count))
        assert storage.size("checkpoint-2/shard-1-00000.safetensors") is None
        assert storage.files("checkpoint-2") == []


def test_large_files_go_in_parts_and_come_back(storage: ObjectStorage) -> None:
    content = bytes(range(256)) * (5 * CHUNK // 256) + b"end"
    view = memoryview(content)
    storage.write("checkpoint-2/big", (view[start : start + CHUNK] for start in range(0, len(content), CHUNK)))
    assert storage.size("checkpoint-2/big") == len(content)
    assert b"".join(storage.chunks("checkpoint-2/big")) == content
    assert storage.read("checkpoint-2/big") == content
    with pytest.raises(CheckpointError, match="longer than the 10 bytes"):
        storage.read("checkpoint-2/big", 10)
    with pytest.raises(FileNotFoundError):
        storage.read("checkpoint-2/nothing")


def test_removal_begins_with_the_manifest(storage: ObjectStorage, replace: Replace) -> None:
    """A deletion cut short leaves nothing that looks whole. Seen to fail with the manifest removed last."""
    names = fill(storage, 2)
    removed = []

    def stop(path: str) -> None:
        removed.append(path)
        if len(removed) == 2:
            raise KeyboardInterrupt
        remove(path)

    remove = storage.remove_file
    replace(storage, "remove_file", stop)
    with pytest.raises(KeyboardInterrupt):
        storage.remove("checkpoint-2")
    assert storage.steps() == []
    assert storage.leftovers() == ["checkpoint-2"]
    assert len(names) - 1 == len(storage.files("checkpoint-2"))


def test_damage_is_found_before_it_is_loaded(storage: ObjectStorage, place: str, tmp_path: Path) -> None:
    for step in (2, 4):
        fill(storage, step)
    (name,) = [name for name in storage.files("checkpoint-4") if name.startswith("shard-")]
    content = bytearray(storage.read(f"checkpoint-4/{name}"))
    content[-9] ^= 16
    storage.put(f"checkpoint-4/{name}", bytes(content))
    (line,) = whole(found_at(place, 4))
    assert line.startswith(f"{place}/checkpoint-4/{name}: its BLAKE3 is not what was written (holds ")
    result = train(tmp_path / "run", folder=place, max_steps=3, eval_steps=2, save_at_end=False)
    assert len(result.losses) == 1  # it went on from step 2


def test_the_commands(
    storage: ObjectStorage,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def say(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moe-dist", "checkpoint", *map(str, words)])
        return (commands.run(), *capsys.readouterr())

    for step in (4, 6):
        fill(storage, step)
    storage.put("checkpoint-8/shard-1-00000.safetensors", b"12345")
    code, out, _ = say("ls", place)
    assert (code, out.count("complete"), "checkpoint-8 (5 bytes)" in out) == (0, 2, True)
    assert [row["step"] for row in json.loads(say("ls", f"{place}/checkpoint-4", "--json")[1])["steps"]] == [4]
    assert say("verify", place)[1].endswith("2 of 2 checkpoints verified\n")
    assert say("reshard", f"{place}/checkpoint-6", f"{place}-copy", "--shards", 3)[0] == 0
    assert digests(found_at(f"{place}-copy", 6)) == digests(found_at(trained(), 6))
    code, out, err = say("prune", place, "--keep", 1)
    assert (code, out.count("removed"), "left alone: checkpoint-8" in err) == (0, 1, True)
    assert storage.steps() == [6]
    # Named by the run that writes there, whose lock tells that nobody is writing now.
    options: Any = {**TRAINING, "folder": place, "max_steps": 1, "save_steps": 0, "save_at_end": False}
    storage.remove("checkpoint-6")
    MoETrainer(model_config=MODEL, training_config=options, output_dir=tmp_path / "run").train(TEXTS)
    fill(storage, 6)
    storage.put("checkpoint-8/shard-1-00000.safetensors", b"12345")
    assert say("prune", tmp_path / "run", "--keep", 1)[0] == 0
    assert storage.folders() == ["checkpoint-6"]
    (shard,) = [name for name in storage.files("checkpoint-6") if name.startswith("shard-")]
    storage.remove_file(f"checkpoint-6/{shard}")
    code, out, _ = say("verify", place)
    assert (code, f"{shard}: missing (holds " in out) == (1, True)


def test_a_bucket_that_is_not_there_is_one_line(server: str, tmp_path: Path) -> None:
    """And it is not made: a typing error would else become a bucket. Seen to fail without the look in `folders`."""
    with pytest.raises(CheckpointError, match="s3://buckett/run: there is no bucket buckett"):
        train(tmp_path / "run", folder="s3://buckett/run")
    assert not fsspec.filesystem("s3").exists("buckett")


def test_no_connection_and_no_credentials_are_errors_of_the_place(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """boto's own exceptions are neither OSError nor ValueError. Seen to fail with the file system as it is."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    try:
        fsspec.filesystem("s3").clear_instance_cache()
        with monkeypatch.context() as patch:
            patch.delenv("AWS_ACCESS_KEY_ID")
            patch.delenv("AWS_SECRET_ACCESS_KEY")
            with pytest.raises(OSError, match=r"^s3://bucket/run: NoCredentialsError: "):
                open_storage("s3://bucket/run").steps()
        fsspec.filesystem("s3").clear_instance_cache()
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
            with pytest.raises(OSError, match=r"^s3://bucket/run: EndpointConnectionError: "):
                open_storage("s3://bucket/run").write("checkpoint-2/shard-1-00000.safetensors", [b"12"])
    finally:
        fsspec.filesystem("s3").clear_instance_cache()


def test_an_unknown_protocol_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.folder=s4://bucket/run: "):
        train(tmp_path / "run", folder="s4://bucket/run")
