"""A save is killed, or refused by the disk, at every call it makes; what was committed before is always there.

FAULTS rows 3 and 6. `strace` injects into real system calls of a real process: mkdir, write, fsync, rename, unlink and
rmdir, the first, the second ... until the save no longer makes that many.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from patches import Replace
from saved import state

from moe_dist.checkpoint.lock import RunLock
from moe_dist.checkpoint.manager import Checkpoints, Outcome
from moe_dist.checkpoint.reading import CheckpointRef, whole
from moe_dist.checkpoint.shards import Piece, split
from moe_dist.checkpoint.storage import Buffer, LocalStorage
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import FILE, STATE_FILE
from moe_dist.checkpoint.tools.inspecting import tensors
from moe_dist.checkpoint.writing import Commit, Saving, Writer
from moe_dist.config import CheckpointConfig
from moe_dist.parallel.mesh import Mesh

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="NOT PROVEN HERE: crash points need strace (apt-get install strace)"
)
CALLS = ("mkdir", "write", "fsync", "rename", "unlink", "unlinkat", "rmdir")


def checkpoints(folder: Path, **options: Any) -> Checkpoints:
    return Checkpoints(LocalStorage(folder), Mesh.single(), CheckpointConfig(**options))


def save(folder: Path, step: int, **options: Any) -> Outcome:
    manager = checkpoints(folder, **options)
    manager.begin(step, state(step), {"config": {}, "step": step}, {})
    return manager.settle()


def good_steps(folder: Path) -> list[int]:
    """Committed steps; each must be whole and of the step it says."""
    storage = LocalStorage(folder)
    for step in storage.steps():
        found = CheckpointRef(storage, step)
        assert whole(found) == []
        for name, value in tensors(found, storage.manifest(step), Keys()):
            assert (value == step).all(), f"{name} of checkpoint-{step} holds {value.flatten()[0]}"
    return storage.steps()


def saved_under_strace(folder: Path, inject: str, step: int) -> int:
    """Save `step` in a child whose system calls strace spoils: 0 when it succeeded, 7 when it said the right error."""

    def act() -> int:
        Writer.start = Writer.run  # type: ignore[method-assign]  # one thread: calls are counted per thread
        outcome = save(folder, step, save_total_limit=2)
        said = outcome.error is None or os.strerror(getattr(errno, inject.partition("error=")[2].partition(":")[0]))
        return 0 if outcome.error is None else 7 if str(said) in outcome.error else 8

    return under_strace(inject, act)


def under_strace(inject: str, act: Callable[[], int]) -> int:
    """`act` in a child whose system calls strace spoils; what it gives, or the child's exit code as of `os.wait`."""
    child = os.fork()
    if child == 0:
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(act())
        finally:
            os._exit(99)
    os.waitpid(child, os.WUNTRACED)
    calls = inject.partition(":")[0]
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e", f"inject={inject}"]
    tracer = subprocess.Popen([*command, "-p", str(child)], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 20
        while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
            if tracer.poll() is not None or time.monotonic() > deadline:
                assert tracer.stderr is not None
                pytest.skip(f"NOT PROVEN HERE: strace cannot attach: {tracer.stderr.read().strip()}")
            time.sleep(0.002)
        os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    finally:
        tracer.kill()
        tracer.wait()


@needs_strace
@pytest.mark.parametrize("call", CALLS)
def test_killed_at_every_call(tmp_path: Path, call: str) -> None:
    """Steps 1 and 2 are there, 3 is being saved and 1 is to go. Whatever the moment: only whole steps, the newest of
    before among them; then what is left over is cleared away, and the same save goes through.

    Seen to fail with a step removed in place instead of renamed first, and with shards written into the final folder.
    """
    points = 0
    for number in range(1, 200):
        folder = tmp_path / str(number)
        assert save(folder, 1).error is None
        assert save(folder, 2).error is None
        code = saved_under_strace(folder, f"{call}:signal=SIGKILL:when={number}", 3)
        assert code in (0, -signal.SIGKILL), code
        steps = good_steps(folder)
        assert steps in ([1, 2], [1, 2, 3], [2, 3]), steps
        checkpoints(folder).owner.clean_up()
        assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint-{step}" for step in steps]
        if 3 not in steps:
            assert save(folder, 3, save_total_limit=2).error is None
            assert good_steps(folder) == [2, 3]
        if code == 0:
            break
        points += 1
        shutil.rmtree(folder)
    assert code == 0
    assert points or call in ("unlink", "unlinkat", "rmdir"), "no such call was made: nothing was tried"


@needs_strace
@pytest.mark.parametrize(
    ("call", "number_of"), [("write", "ENOSPC"), ("fsync", "EIO"), ("mkdir", "EROFS"), ("rename", "EIO")]
)
def test_refused_by_the_disk_at_every_call(tmp_path: Path, call: str, number_of: str) -> None:
    """The save fails and says why; older steps are untouched and no partial work is left (or it is collected later).

    Seen to fail with errors of `fsync` ignored.
    """
    for number in range(1, 200):
        folder = tmp_path / str(number)
        assert save(folder, 1).error is None
        code = saved_under_strace(folder, f"{call}:error={number_of}:when={number}", 3)
        steps = good_steps(folder)
        if code == 0:
            break
        assert code == 7, code
        # Only the last flush, of the folder that has just got its name, may fail and the step be there.
        assert steps == [1] or (call, steps) == ("fsync", [1, 3])
        checkpoints(folder).owner.clean_up()
        if steps == [1]:
            assert save(folder, 3).error is None
        shutil.rmtree(folder)
    assert number > 1, "no such call was made: nothing was tried"
    assert steps == [1, 3]
    shutil.rmtree(folder)
    assert save(folder, 1).error is None
    code = saved_under_strace(folder, f"{call}:signal=SIGKILL:when={number}", 3)
    assert code == 0, f"{call} number {number} was refused and nobody noticed"


def writer_of(folder: Path, rank: int) -> Writer:
    """One of the two ranks that write step 3 together, each a tensor; they meet in the folder alone."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {f"model.{number}": ("F32", (64, 3)) for number in range(2)}
    storage = LocalStorage(folder)
    layout = {"world": 2, "pp": 1, "edp": 2, "ep": 1}
    saving = Saving(storage, Keys(), storage.staging(3, 1), 3, "0", 1, layout)
    (shard,) = split([Piece(f"model.{rank}", (0, 0), (64, 3), "F32", (64, 3))], f"shard-1-{rank:05d}")
    shard.views[0].fill_(3.0)
    commit = Commit(saving, shapes, {"config": {}}, {}, lambda: None, lambda: None) if rank == 0 else None
    return Writer(saving, [shard], rank, commit)


def written(writer: Writer) -> int:
    writer.run()
    return 0 if writer.error is None else 8


@needs_strace
@pytest.mark.parametrize(("victim", "call"), [(1, "write"), (1, "rename"), (0, "fsync"), (0, "rename"), (0, "unlink")])
def test_one_of_two_ranks_is_killed_at_every_call(tmp_path: Path, victim: int, call: str) -> None:
    """Rank 1 before its receipt, rank 0 also between the receipts and the commit: the whole step or none of it.

    Seen to fail with the receipt left before the shard is written, and with the manifest written after the rename.
    """
    for number in range(1, 50):
        folder = tmp_path / str(number)
        assert save(folder, 1).error is None
        one, other = writer_of(folder, victim), writer_of(folder, 1 - victim)
        one.saving.storage.begin(one.saving.staging, 1)
        if victim == 0:
            assert written(other) == 0
        code = under_strace(f"{call}:signal=SIGKILL:when={number}", partial(written, one))
        assert code in (0, -signal.SIGKILL), code
        if victim == 1:
            if not (folder / one.saving.receipt(1)).exists():
                other.abort.set()  # as when the ranks have heard that one is dead
            assert (written(other) == 0) != other.abort.is_set()
        steps = good_steps(folder)
        assert steps in ([1], [1, 3])
        checkpoints(folder).owner.clean_up()
        assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint-{step}" for step in steps]
        if code == 0:
            break
        shutil.rmtree(folder)
    assert (code, steps) == (0, [1, 3])
    assert number > 1, "no such call was made: nothing was tried"


@needs_strace
@pytest.mark.parametrize("call", ["unlinkat", "rmdir", "rename"])
def test_what_may_go_cannot(tmp_path: Path, call: str) -> None:
    """Retention is refused by the disk at every call: the new step is there all the same, and no old one is half gone.

    Seen to fail with an error of `Ownership.retain` taken for one of the save.
    """
    for number in range(1, 200):
        folder = tmp_path / str(number)
        for step in (1, 2):
            assert save(folder, step).error is None
        code = saved_under_strace(folder, f"{call}:error=EIO:when={number}", 3)
        steps = good_steps(folder)
        assert (code, steps) in ((0, [1, 2, 3]), (0, [2, 3]), (7, [1, 2])), (code, steps)
        if code == 0 and not list(folder.glob(".trash-*")) and steps == [2, 3]:
            break
        checkpoints(folder).owner.clean_up()
        shutil.rmtree(folder)
    assert number > 1, "no such call was made: nothing was tried"


def test_the_disk_is_full_before_it_begins(tmp_path: Path, replace: Replace) -> None:
    replace(LocalStorage, "free_bytes", lambda self: 1000)
    error = save(tmp_path, 1).error
    assert error is not None
    assert error.startswith(f"No space left on {tmp_path}: need 2.2 KiB, have 1000 bytes")
    assert list(tmp_path.iterdir()) == []


def test_a_nan_is_never_kept(tmp_path: Path) -> None:
    """FAULTS row 13."""
    manager = checkpoints(tmp_path)
    bad = state(1)
    bad.tensors["model.b"][5, 1] = float("nan")
    manager.begin(1, bad, {"config": {}}, {})
    error = manager.settle().error
    assert error is not None
    assert error.startswith("model.b holds a value that is not finite")
    assert list(tmp_path.iterdir()) == []


def test_a_step_is_never_overwritten(tmp_path: Path) -> None:
    assert save(tmp_path, 1).error is None
    before = (tmp_path / "checkpoint-1" / "manifest.json").read_bytes()
    error = save(tmp_path, 1).error
    assert error is not None
    assert "is there already, and no checkpoint is ever overwritten" in error
    assert (tmp_path / "checkpoint-1" / "manifest.json").read_bytes() == before
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "mine.txt").write_text("not yours")
    error = save(tmp_path, 2).error
    assert error is not None
    assert "checkpoint-2: is in the way and no checkpoint of ours" in error
    assert (tmp_path / "checkpoint-2" / "mine.txt").read_text() == "not yours"


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    """FAULTS row 19, and row 10: two starts on one folder, and one that lost its lock without knowing it."""
    first = RunLock.acquire(tmp_path)
    with pytest.raises(ValueError, match=rf"another run is writing there \(process {os.getpid()} on "):
        RunLock.acquire(tmp_path)
    first.release()
    second = RunLock.acquire(tmp_path)
    assert (second.run, second.generation) == (first.run, first.generation + 1)
    manager = Checkpoints(
        LocalStorage(tmp_path), Mesh.single(), CheckpointConfig(), first.run, first.generation, lock=first
    )
    manager.begin(1, state(1), {"config": {}}, {})
    error = manager.settle().error
    assert error is not None
    assert f"start 2 of this run (process {os.getpid()} on " in error
    assert LocalStorage(tmp_path).steps() == []
    second.release()


@pytest.mark.parametrize("asleep_at", ["shard-", STATE_FILE])
def test_a_writer_that_wakes_up_too_late(tmp_path: Path, replace: Replace, asleep_at: str) -> None:
    """A start that hangs in the middle of a save while another takes over: it commits nothing, and leaves nothing.

    Seen to fail without each of the two looks at the lock in `Commit`: before the first file that bears no number of
    its start, and before the rename.
    """
    first = RunLock.acquire(tmp_path)
    storage, asleep, gate, written = LocalStorage(tmp_path), threading.Event(), threading.Event(), []
    write = storage.write

    def slowly(path: str, chunks: Iterable[Buffer]) -> None:
        written.append(path.rpartition("/")[2])
        if written[-1].startswith(asleep_at):
            asleep.set()
            assert gate.wait(60)
        write(path, chunks)

    replace(storage, "write", slowly)
    manager = Checkpoints(storage, Mesh.single(), CheckpointConfig(), first.run, first.generation, lock=first)
    manager.begin(1, state(1), {"config": {}}, {})
    assert asleep.wait(60)
    first.release()
    second = RunLock.acquire(tmp_path)
    gate.set()
    error = manager.settle().error
    second.release()
    assert error is not None
    assert f"start 2 of this run (process {os.getpid()} on " in error
    assert (STATE_FILE in written) == (asleep_at == STATE_FILE)
    assert FILE not in written
    assert os.listdir(tmp_path) == [".run.lock"]


def test_a_start_that_has_not_begun_leaves_nothing(tmp_path: Path, replace: Replace) -> None:
    """Also when not even its lock could be written. Seen to fail with the lock left in the folder, or changed."""
    RunLock.acquire(tmp_path / "a" / "run").leave()
    assert os.listdir(tmp_path) == []
    RunLock.acquire(tmp_path / "run").release()
    before = (tmp_path / "run" / ".run.lock").read_bytes()
    RunLock.acquire(tmp_path / "run").leave()
    assert (tmp_path / "run" / ".run.lock").read_bytes() == before
    begun = RunLock.acquire(tmp_path / "run")
    begun.begin("ab", ["job"])
    begun.leave()
    assert (RunLock.acquire(tmp_path / "run").generation, begun.generation) == (3, 2)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    replace(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        RunLock.acquire(tmp_path / "b" / "run")
    assert os.listdir(tmp_path) == ["run"]
