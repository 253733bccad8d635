"""Stop signals in pairs and triples, disks that fill up, and damaged files, again and again, on real runs.

    python tools/soak_faults.py signals --count 300 --seed 1
    python tools/soak_faults.py disk --count 100            # needs the right to mount a small disk
    python tools/soak_faults.py damage --count 500

signals: a run is told to stop by two or three signals of any kind, to its launcher, its process group or one rank,
while starting, training or saving, and started again. No step may be computed twice, and the end is bitwise that of a
run that nobody disturbed. disk: the disk of one run fills up while it trains, for up to a second and a half. It may
not end, what was saved stays whole, a new step is saved once there is room, and the end is bitwise the same. damage:
one or two files of the newest checkpoint are removed, cut, overwritten, exchanged; it must be refused by name with
nothing loaded, and the step before be chosen. Exit code 1 when anything is not as it must be.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flip import tiny
from soak import Soak, compare, last_step, losses, wait

from moe_dist.checkpoint.manager import Checkpoints
from moe_dist.checkpoint.reading import CheckpointRef, whole
from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.checkpoint.tools.flipping import Weights, load
from moe_dist.config import CheckpointConfig
from moe_dist.parallel.mesh import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
WHEN = ("training", "training", "training", "saving", "saving", "starting")
DISK = 256 * 2**20


def signals(soak: Soak, count: int, seconds: float) -> list[str]:
    """Told to stop `count` times, or for so long; returns what was wrong."""
    until = time.monotonic() + seconds
    draw, wrong = soak.draw, list[str]()
    codes: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    for number in range(1, count + 1):
        if time.monotonic() > until:
            break
        when, before, rows, mark = draw.choice(WHEN), soak.newest(), len(losses(soak.run)), len(soak.console())
        process = soak.start(soak.run, 10**6)
        try:
            if when == "starting":
                time.sleep(4 * draw.random())
            else:
                wait(process, lambda rows=rows: len(losses(soak.run)) > rows, soak)  # type: ignore[misc]
                time.sleep(draw.random())
                if when == "saving":
                    wait(process, lambda: any(soak.run.glob(".checkpoint-*.tmp")), soak)
            sent = [draw.choice(SIGNALS) for _ in range(draw.choice((2, 2, 3)))]
            for each in sent:
                send(soak, process, each, draw)
                time.sleep(0.3 * draw.random() ** 3)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            code = process.poll()
            left = soak.wait_gone(30)
        finally:
            soak.end(process)
        said = soak.console()[mark:]
        problems = soak.look(before) + [f"still alive: {left}"] * bool(left)
        problems += ["a stack trace"] * ("Traceback" in said)
        # Before the first handlers a signal ends a process as it ends any: nothing has been done that could be lost.
        early = [-int(each) for each in SIGNALS] + [128 + int(each) for each in SIGNALS]
        allowed = {75} | {130} & {130 if signal.SIGINT in sent else 75} | set(early if when == "starting" else ())
        if when == "starting" and "was ended by SIG" in said:
            allowed.add(1)  # a rank alone was told, before it could ask all to stop: the run would start again
        if code not in allowed:
            problems.append(f"exit code {code}: {said[-500:]}")
        if (soak.newest() or 0) != last_step(soak.run):
            problems.append(f"step {last_step(soak.run)} is done, step {soak.newest()} saved")
        codes[code or 0] += 1
        kinds[when] += 1
        wrong += problems
        if problems or number % 10 == 0:
            names = "+".join(each.name for each in sent)
            print(f"{number:4}  {names}  while {when}: {'; '.join(problems) or 'ok'}", flush=True)
    print(f"{codes.total()} stops while {dict(kinds)}, exit codes {dict(codes)}")
    again = len(losses(soak.run)) - len(dict(losses(soak.run)))
    return wrong + [f"{again} steps were computed twice"] * bool(again)


def send(soak: Soak, process: subprocess.Popen[bytes], number: signal.Signals, draw: random.Random) -> None:
    """To the launcher, its process group, or one rank."""
    to = draw.choice(("launcher", "group", "rank"))
    if number == signal.SIGINT and to == "rank":
        to = "launcher"  # ranks do not hear of Ctrl-C
    ranks = soak.rank_pids(process)
    with suppress(ProcessLookupError):
        if to == "group":
            os.killpg(process.pid, number)
        else:
            os.kill(draw.choice(ranks) if to == "rank" and ranks else process.pid, number)


def disk(soak: Soak, count: int) -> list[str]:
    """The disk of one run full `count` times; returns what was wrong."""
    wrong, filler = list[str](), soak.run.parent / "filler"
    process = soak.start(soak.run, 10**6)
    try:
        wait(process, lambda: soak.newest() is not None, soak)
        for number in range(1, count + 1):
            time.sleep(0.3 * soak.draw.random())
            before = soak.newest()
            fill(filler)
            time.sleep(1.5 * soak.draw.random())
            during = soak.newest()
            filler.unlink()
            wait(process, lambda during=during: (soak.newest() or 0) > (during or 0), soak)  # type: ignore[misc]
            problems = look_at_newest(soak, before)
            wrong += problems
            if problems or number % 10 == 0:
                print(f"{number:4}  saved before {before}, in it {during}: {'; '.join(problems) or 'ok'}", flush=True)
        process.send_signal(signal.SIGTERM)
        if (code := process.wait(60)) != 75:
            wrong.append(f"exit code {code}")
    finally:
        soak.end(process)
    said = soak.console()
    print(f"{count} times full, {last_step(soak.run)} steps, {said.count('warning')} warnings on the console")
    return wrong + ["a stack trace"] * ("Traceback" in said)


def look_at_newest(soak: Soak, before: int | None) -> list[str]:
    """As `Soak.look`, while the run goes on and deletes older steps."""
    newest = soak.newest() or 0
    wrong = [f"step {before} had been committed, now there is {newest}"] if newest < (before or 0) else []
    damage = whole(CheckpointRef(soak.storage, newest))
    return wrong + (damage if newest in soak.storage.steps() else [])


def fill(file: Path) -> None:
    """Until there is no room for one byte."""
    with open(file, "wb", buffering=0) as stream:
        for size in (2**20, 4096, 1):
            with suppress(OSError):
                while True:
                    stream.write(bytes(size))


def damage(run: Path, count: int, draw: random.Random) -> list[str]:
    """The newest checkpoint damaged `count` times; returns what was wrong."""
    storage, wrong, kinds = LocalStorage(run), list[str](), Counter[str]()
    steps = storage.steps()
    folder, other = run / f"checkpoint-{steps[-1]}", run / f"checkpoint-{steps[-2]}"
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    state = Weights(storage, steps[-1])
    for _ in range(count):
        done = []
        for name in draw.sample(sorted(kept), draw.choice((1, 1, 2))):
            kind = draw.choice(sorted(DAMAGES))
            DAMAGES[kind](folder / name, other / name, draw)
            done.append((kind, name))
            kinds[kind] += 1
        what = " and ".join(f"{kind} {name}" for kind, name in done)
        reason = load(storage, steps[-1], state)
        if reason is None or "\n" in reason or folder.name not in reason:
            wrong.append(f"{what}: {reason or 'loaded'}")
        if state.touched:
            wrong.append(f"{what}: weights were touched")
            state = Weights(storage, steps[-1])
        said = list[str]()
        chosen = Checkpoints(storage, Mesh.single(), CheckpointConfig()).find("auto", said.append)
        if chosen is None or chosen.step != steps[-2] or not any(folder.name in line for line in said):
            wrong.append(f"{what}: chosen {chosen}, said {said}")
        shutil.rmtree(folder)
        folder.mkdir()
        for name, content in kept.items():
            (folder / name).write_bytes(content)
    print(f"{count} damaged checkpoints: {dict(sorted(kinds.items()))}")
    return wrong + ["not put right again"] * (load(storage, steps[-1], state) is not None)


def overwrite(file: Path, draw: random.Random, zeros: bool) -> None:
    content = bytearray(file.read_bytes())
    first = draw.randrange(len(content))
    last = min(len(content), first + 1 + int(2 ** (draw.random() * 14)))
    new = bytes(last - first) if zeros else draw.randbytes(last - first)
    if bytes(content[first:last]) == new:
        new = bytes([content[first] ^ 255]) + new[1:]
    content[first:last] = new
    file.write_bytes(content)


def put_socket(file: Path) -> None:
    file.unlink()
    with socket.socket(socket.AF_UNIX) as one:
        os.chdir(file.parent)  # the path of a socket has to be short
        one.bind(file.name)


DAMAGES: dict[str, Callable[[Path, Path, random.Random], object]] = {
    "removed": lambda file, other, draw: file.unlink(),
    "emptied": lambda file, other, draw: file.write_bytes(b""),
    "cut": lambda file, other, draw: os.truncate(file, draw.randrange(file.stat().st_size)),
    "lengthened": lambda file, other, draw: file.write_bytes(file.read_bytes() + draw.randbytes(draw.randint(1, 9999))),
    "doubled": lambda file, other, draw: file.write_bytes(file.read_bytes() * 2),
    "made sparse": lambda file, other, draw: os.truncate(file, 2**40),
    "zeros in": lambda file, other, draw: overwrite(file, draw, zeros=True),
    "garbage in": lambda file, other, draw: overwrite(file, draw, zeros=False),
    "garbage for": lambda file, other, draw: file.write_bytes(draw.randbytes(file.stat().st_size)),
    "another step's": lambda file, other, draw: shutil.copy(other, file),
    "another file for": lambda file, other, draw: shutil.copy(
        draw.choice([one for one in sorted(other.parent.iterdir()) if one.name != file.name]), file
    ),
    "a folder for": lambda file, other, draw: (file.unlink(), file.mkdir()),
    "a link for": lambda file, other, draw: (file.unlink(), file.symlink_to(other)),
    "a broken link for": lambda file, other, draw: (file.unlink(), file.symlink_to("nowhere")),
    "a pipe for": lambda file, other, draw: (file.unlink(), os.mkfifo(file)),
    "a socket for": lambda file, other, draw: put_socket(file),
}


def on_a_disk(folder: Path, count: int, seed: int, ranks: int) -> list[str]:
    """`disk`, and the comparison with a run that had room."""
    (folder / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder / "disk")], check=True)
    try:
        soak = Soak(folder, ranks, 10, seed, "local")
        soak.run = folder / "disk" / "run"
        soak.storage = LocalStorage(soak.run)
        return disk(soak, count) + against_a_twin(soak, gaps=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder / "disk")], check=True)


def against_a_twin(soak: Soak, gaps: bool) -> list[str]:
    """Ten steps more, and how all of it differs from a run that nobody disturbed."""
    last = last_step(soak.run) + 10
    soak.finish(soak.run, last)
    soak.finish(soak.folder / "twin", last)
    wrong, compared = compare(soak, soak.folder / "twin", last)
    if gaps:  # what a full disk could not take is not in the log; the steps themselves are in the state
        wrong = [line for line in wrong if "never logged" not in line]
    print(f"{last} steps, {compared} losses and every tensor against an undisturbed run: {wrong or 'bitwise equal'}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("signals", "disk", "damage"))
    parser.add_argument("--count", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2, 4))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no more signals after this long")
    options = parser.parse_args()
    # In the background of a script, or under nohup, these are ignored, and would be by whatever is started from here.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, began = Path(tempfile.mkdtemp(prefix="soak-")), time.monotonic()
    try:
        if options.what == "signals":
            soak = Soak(folder, options.ranks, 3, options.seed, "local")
            wrong = signals(soak, options.count, options.seconds) + against_a_twin(soak, gaps=False)
        elif options.what == "disk":
            wrong = on_a_disk(folder, options.count, options.seed, options.ranks)
        else:
            wrong = damage(tiny(folder).parent, options.count, random.Random(options.seed))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for line in wrong[:20]:
        print(f"WRONG: {line}")
    print(f"{len(wrong)} problems, seed {options.seed}, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
