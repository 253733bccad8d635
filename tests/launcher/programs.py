"""Commands as a person starts them: in a session of their own, watched, timed, and gone when a test is over.

What belongs to one is found by a variable in its environment: torchrun and mpirun give each rank a session of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from processes import rank_of

BIN = Path(sys.executable).parent
HARD_LIMIT = 150.0
"""Seconds after which a command has failed, whatever it was to do; a busy machine needs a fraction of it."""

started: list[Program] = []
MARK = "MOE_DIST_TEST_PROGRAM"
_numbers = itertools.count()

CONFIG = """\
model:
  vocab_size: 272
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4
  moe_intermediate_size: 32
  num_experts: 4
  max_position_embeddings: 64
data:
  source: text
  path: {folder}/text/*.txt
  max_seq_length: 64
parallel:
  ep_size: 2
train:
  output_dir: {folder}/run
  max_steps: 3
  per_device_train_batch_size: 2
monitor:
  logging_steps: 1
  progress: plain
  tensorboard: false
launch:
  nproc_per_node: 2
  device: cpu
"""
ONE_RANK = ("launch.nproc_per_node=1", "parallel.ep_size=1")
FOREVER = ("train.max_steps=1000000",)


def write_config(folder: Path) -> Path:
    """A model that trains in milliseconds, on a little text of its own."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for number in range(12):
        words = " ".join(f"word{(number + 1) * place % 97}" for place in range(200))
        (folder / "text" / f"{number}.txt").write_text(words)
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(folder=folder))
    return path


def metrics(run_folder: Path, kind: str) -> list[dict[str, Any]]:
    whole, _, _ = (run_folder / "metrics.jsonl").read_text().rpartition("\n")  # a run may be writing the last line
    rows = [json.loads(line) for line in whole.splitlines()]
    return [row for row in rows if row["kind"] == kind]


def losses(run_folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(run_folder, "train")]


class Program:
    """A command in its own session; `tty` gives it a terminal. It ends with `stop`, and all that it has started."""

    def __init__(self, *command: str | Path, tty: bool = False, **environment: str) -> None:
        self.written = {"out": b"", "err": b""}
        self.began = time.monotonic()
        words = [str(word) for word in command]
        words[0] = str(BIN / words[0]) if (BIN / words[0]).exists() else words[0]
        if "PYTHONPATH" in environment and "PYTHONPATH" in os.environ:
            environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
        own = f"{os.getpid()}.{next(_numbers)}"
        self.mark = f"{MARK}={own}\0".encode()
        surroundings = {**os.environ, "COLUMNS": "160", "TERM": "xterm", "PYTHONUTF8": "1", MARK: own, **environment}
        self.terminal: int | None = None
        streams: dict[str, int]
        if tty:
            self.terminal, theirs = pty.openpty()
            streams = {"out": self.terminal}
            given = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
            # A new session takes the terminal it opens first as its own: then Ctrl-C is typed, not sent.
            wrapper = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execv(sys.argv[1], sys.argv[1:])"
            words = [sys.executable, "-S", "-c", wrapper, *words]
        else:
            (out, to_out), (err, to_err) = os.pipe(), os.pipe()
            streams = {"out": out, "err": err}
            given = {"stdin": subprocess.DEVNULL, "stdout": to_out, "stderr": to_err}
        # Tests in the background of a script have Ctrl-C ignored, under nohup hang-ups; what they start must not.
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
        before = {number: signal.signal(number, handler) for number, handler in usual.items()}
        try:
            self.process = subprocess.Popen(words, env=surroundings, start_new_session=True, **given)  # type: ignore[call-overload]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        for number in {given["stdout"], given["stderr"]}:
            os.close(number)
        self.readers = [threading.Thread(target=self._read, args=item, daemon=True) for item in streams.items()]
        for reader in self.readers:
            reader.start()
        started.append(self)

    def _read(self, name: str, number: int) -> None:
        with suppress(OSError):  # how a terminal says that its last writer has gone
            while data := os.read(number, 65536):
                self.written[name] += data
        os.close(number)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        return self.written["out"].decode(errors="replace")

    @property
    def err(self) -> str:
        return self.written["err"].decode(errors="replace")

    def type(self, text: str) -> None:
        assert self.terminal is not None
        os.write(self.terminal, text.encode())

    def end(self, within: float = HARD_LIMIT) -> int:
        """Wait for the end, its own and that of everything it printed through; returns the exit code."""
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within} s\n{self.out}\n{self.err}") from None
        for reader in self.readers:
            reader.join(10)
        return code

    def wait_until(self, condition: Callable[[], Any], what: str) -> Any:
        """The first true answer of `condition`, while the program runs."""
        deadline = time.monotonic() + HARD_LIMIT
        while not (answer := condition()):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise AssertionError(f"never: {what}\n{self.out}\n{self.err}")
            time.sleep(0.02)
        return answer

    def wait_for(self, text: str) -> None:
        self.wait_until(lambda: text in self.out, f"{text!r} on the console")

    def ranks(self) -> dict[int, int]:
        """Rank -> pid, of the processes that were told a rank."""
        found = {}
        for pid in self.processes():
            with suppress(OSError):
                if (rank := rank_of(pid)) is not None:
                    found[rank] = pid
        return found

    def processes(self) -> list[int]:
        """Everything alive that it has started, itself included, whatever session it is in by now."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                    # Ray's workers write their names over their environments; a session they keep.
                    ours = int(session) == self.process.pid or self.mark in (entry / "environ").read_bytes()
                    if ours and state != "Z":
                        found.append(int(entry.name))
        return found

    def gone_within(self, seconds: float) -> float:
        """Seconds until nothing of it is alive."""
        began = time.monotonic()
        while left := self.processes():
            assert time.monotonic() - began < seconds, f"left behind: {left}"
            time.sleep(0.02)
        return time.monotonic() - began

    def stop(self) -> None:
        while left := self.processes():  # one that is ended may just have started another
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.process.wait(10)


def stop_all() -> None:
    while started:
        started.pop().stop()


class Run(NamedTuple):
    """A run that has ended, its folder, and its command."""

    folder: Path
    code: int
    program: Program
