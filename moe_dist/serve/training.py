"""Trainings that clients ask for: a queue, of which one at a time runs as a child process `moe-dist train`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_dist.config import Config, ConfigError, dump_config
from moe_dist.parallel.layout import Layout
from moe_dist.serve.errors import Refused
from moe_dist.serve.train_config import read_config

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
_MAX_WAITING = 64
_MAX_ENDED = 256
"""Ended ones that are still known."""
_TAIL = 256 * 1024
_KILLED_AFTER = 15.0
"""Seconds beyond `launch.grace_period` in which a training that is to end saves."""


@dataclass
class Training:
    """One of the queue. `run`: its run folder within the folder of all."""

    id: str
    key: str
    config: Config
    run: str
    created: int
    status: Status = "queued"
    started: int | None = None
    ended: int | None = None
    exit_code: int | None = None
    process: asyncio.subprocess.Process | None = None
    is_cancelled: bool = False


class TrainingQueue:
    """Everything in `folder`: run files and data that are named, run folders, and `.queue/ID.yaml` and `ID.log`.

    `command` starts a training, with a run file behind it, in `environment`. `own_code`: whether classes of a person's
    own may be named. `tell` gets a line for the audit log when one begins or ends. All methods are called in one event
    loop.
    """

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        own_code: bool = False,
        tell: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> None:
        """Raises OSError for a folder that cannot be written to."""
        self.folder, self.own_code = folder.resolve(), own_code
        self._command, self._environment, self._tell = tuple(command), dict(environment), tell
        self._own = self.folder / ".queue"
        self._own.mkdir(mode=0o700, exist_ok=True)
        self._all: dict[str, Training] = {}
        self._news = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._is_ending = False

    def start(self) -> None:
        """In the loop that will call everything else."""
        self._worker = asyncio.create_task(self._work())

    async def stop(self, seconds: float) -> None:
        """What waits is cancelled, what runs is asked to save and end, and after so long killed."""
        self._is_ending = True
        for one in self._all.values():
            self._cancel(one)
        self._news.set()
        if self._worker is None:
            return
        await asyncio.wait({self._worker}, timeout=seconds)
        self.kill()
        await self._worker

    def kill(self) -> None:
        """Whoever runs ends now. May be called by a signal handler."""
        for one in self._all.values():
            if one.process is not None:
                _send(one.process, signal.SIGKILL)

    async def add(self, key: str, config: str | dict[str, Any], overrides: Sequence[str]) -> Training:
        """Queue one for the client `key`. Raises Refused: 422 for a configuration that cannot be, 429, 503."""
        try:
            found = await asyncio.to_thread(self._read, config, overrides)
        except ConfigError as error:
            name = str(error).partition("=")[0]
            raise Refused(422, str(error)[:2000], "invalid_config", param=name if len(name) < 80 else None) from error
        if self._is_ending:
            raise Refused(503, "this server is being stopped", "shutting_down", retry_after=5)
        if sum(one.status == "queued" for one in self._all.values()) >= _MAX_WAITING:
            raise Refused(429, f"{_MAX_WAITING} trainings wait: no more may", "queue_full", retry_after=60)
        run = os.path.relpath(self.folder / found.train.output_dir, self.folder)
        one = Training(f"train-{secrets.token_hex(8)}", key, found, run, int(time.time()))
        self._file(one, "yaml").write_text(dump_config(found), "utf-8")
        ended = [other.id for other in self._all.values() if other.ended is not None]
        for gone in ended[: max(0, len(ended) - _MAX_ENDED)]:
            del self._all[gone]
        self._all[one.id] = one
        self._news.set()
        return one

    def _read(self, config: str | dict[str, Any], overrides: Sequence[str]) -> Config:
        found = read_config(config, overrides, self.folder, own_code=self.own_code)
        if not found.parallel.elastic:
            Layout.of(found, found.launch.nproc_per_node)
        return found

    def get(self, name: str) -> Training:
        """Raises Refused (404)."""
        if name not in self._all:
            raise Refused(404, f"training {name[:80]!r} is not known here", "training_not_found", param="id")
        return self._all[name]

    def cancel(self, name: str) -> Training:
        """It will not begin, or is asked to save and end. Raises Refused (404)."""
        one = self.get(name)
        self._cancel(one)
        self._news.set()
        return one

    def _cancel(self, one: Training) -> None:
        if one.status == "queued":
            one.status, one.ended = "cancelled", int(time.time())
            self._say(one)
        elif one.status == "running":
            one.is_cancelled = True

    def card(self, one: Training) -> dict[str, Any]:
        """For clients. `position`: how many begin before it; None for one that does not wait."""
        waiting = [other.id for other in self._all.values() if other.status == "queued"]
        return {
            "id": one.id,
            "object": "training",
            "status": one.status,
            "position": waiting.index(one.id) if one.id in waiting else None,
            "output_dir": one.run,
            "created_at": one.created,
            "started_at": one.started,
            "finished_at": one.ended,
            "exit_code": one.exit_code,
            **(self._progress(one) if one.started is not None else {"step": None, "loss": None}),
        }

    def cards(self) -> list[dict[str, Any]]:
        """The newest first."""
        return [self.card(one) for one in reversed(self._all.values())]

    def _progress(self, one: Training) -> dict[str, Any]:
        """Step and loss of the last line about training that was written since this one began."""
        path = self.folder / one.run / "metrics.jsonl"
        with contextlib.suppress(OSError):
            if path.stat().st_mtime >= (one.started or 0):
                for line in reversed(_tail(path).splitlines()):
                    with contextlib.suppress(ValueError, AttributeError):
                        row = json.loads(line)
                        if row.get("kind") == "train":
                            loss = row.get("loss")  # not a number: a text
                            return {"step": row.get("step"), "loss": loss if isinstance(loss, float) else None}
        return {"step": None, "loss": None}

    def log(self, one: Training, lines: int) -> str:
        """The last lines that it has printed."""
        with contextlib.suppress(OSError):
            return "".join(_tail(self._file(one, "log")).splitlines(keepends=True)[-lines:])
        return ""

    def _file(self, one: Training, kind: str) -> Path:
        return self._own / f"{one.id}.{kind}"

    async def _work(self) -> None:
        while not self._is_ending:
            self._news.clear()
            following = next((one for one in self._all.values() if one.status == "queued"), None)
            if following is None:
                await self._news.wait()
            else:
                await self._run(following)

    async def _run(self, one: Training) -> None:
        one.status, one.started = "running", int(time.time())
        self._say(one)
        code: int | None = None
        try:
            with self._file(one, "log").open("ab") as log:
                one.process = await asyncio.create_subprocess_exec(
                    *self._command,
                    str(self._file(one, "yaml")),
                    cwd=self.folder,
                    env=self._environment,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C in the server's terminal is for the server
                )
            code = await self._until_it_ends(one, one.process)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file(one, "log").write_text(f"moe-dist: error: {error}\n", "utf-8")
        one.exit_code = None if code is None else code if code >= 0 else 128 - code
        one.status = "succeeded" if code == 0 else "cancelled" if one.is_cancelled else "failed"
        one.ended, one.process = int(time.time()), None
        self._say(one)

    async def _until_it_ends(self, one: Training, process: asyncio.subprocess.Process) -> int:
        ends = asyncio.ensure_future(process.wait())
        while not ends.done() and not one.is_cancelled:
            news = asyncio.ensure_future(self._news.wait())
            await asyncio.wait({ends, news}, return_when=asyncio.FIRST_COMPLETED)
            news.cancel()
            self._news.clear()
        if not ends.done():
            _send(process, signal.SIGTERM)
            await asyncio.wait({ends}, timeout=one.config.launch.grace_period + _KILLED_AFTER)
            if not ends.done():
                _send(process, signal.SIGKILL)
        return await ends

    def _say(self, one: Training) -> None:
        self._tell({"training": one.id, "key": one.key, "status": one.status, "exit_code": one.exit_code})


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        text = file.read().decode("utf-8", "replace")
    return text.partition("\n")[2] if size > _TAIL else text
