"""Several hosts on one machine: network namespaces on a bridge, with cables that can be pulled (Linux, root)."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_numbers = itertools.count()


def _ip() -> str:
    found = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip("NOT TESTED HERE: there is no `ip` on this machine; `.ci/services` installs it")
    return found


class Hosts:
    """`count` hosts, 10.77.0.1 and on, each with the one interface eth0; no way leads out."""

    def __init__(self, count: int) -> None:
        self.ip = _ip()
        mark = f"{os.getpid()}x{next(_numbers)}"  # of no other test, now or left behind
        self.bridge = f"b{mark}"
        self.names = [f"h{mark}.{number}" for number in range(1, count + 1)]
        self.cables = [f"v{mark}.{number}" for number in range(1, count + 1)]

    def _do(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.ip, *command.split()], capture_output=True, text=True, timeout=20, check=False)

    def up(self) -> None:
        commands = [f"link add {self.bridge} type bridge", f"link set {self.bridge} up"]
        for number, (name, cable) in enumerate(zip(self.names, self.cables, strict=True), 1):
            commands += [
                f"netns add {name}",
                f"link add {cable} type veth peer name eth0 netns {name}",
                f"link set {cable} master {self.bridge} up",
                f"-n {name} addr add {self.address(number)}/24 dev eth0",
                f"-n {name} link set eth0 up",
                f"-n {name} link set lo up",
            ]
        for command in commands:
            done = self._do(command)
            if done.returncode:
                pytest.skip(f"NOT TESTED HERE: `ip {command}` is not possible here: {done.stderr.strip()}")

    def down(self) -> None:
        for name in self.names:
            self._do(f"netns del {name}")
        for link in [*self.cables, self.bridge]:
            self._do(f"link del {link}")

    def address(self, number: int) -> str:
        """Of a host, from 1."""
        return f"10.77.0.{number}"

    def on(self, number: int) -> list[str]:
        """What to put before a command so that it runs on a host."""
        return [self.ip, "netns", "exec", self.names[number - 1]]

    def cut(self, number: int) -> None:
        """Pull the cable of a host: it reaches nobody, nobody reaches it, and nobody is told."""
        assert self._do(f"link set {self.cables[number - 1]} down").returncode == 0

    def of(self, pid: int) -> int:
        """The host on which a process runs."""
        return self.names.index(self._do(f"netns identify {pid}").stdout.strip()) + 1


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Gone with the block."""
    made = Hosts(count)
    try:
        made.up()
        yield made
    finally:
        made.down()
