"""Programs that are no Python packages: Prometheus, its tools, a browser. `.ci/services` installs them on Debian."""

from __future__ import annotations

import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def need(program: str) -> str:
    """The path of a program, or a skip that nobody overlooks."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"NOT TESTED HERE: there is no `{program}` on this machine; `.ci/services` installs it")
    return found


@contextmanager
def serving(command: list[str], ready: str, log: Path, within: float = 30.0) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers at the URL `ready`; ended with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + within
            while not _answers(ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"{command[0]} does not answer at {ready}\n{log.read_text()}")
                time.sleep(0.05)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as reply:
            return reply.status == 200
    except OSError:
        return False
