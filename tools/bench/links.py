"""Two hosts with one cable between them, made of network namespaces: real sockets, a real limit on the rate. Needs root
and the `ip` and `tc` programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

LOOPBACK = "loopback"
BURST, LATENCY = "128kb", "50ms"


@dataclass(frozen=True)
class Link:
    """How to start a program on either end: words before its command, and variables of its own."""

    prefixes: list[list[str]]
    surroundings: list[dict[str, str]]


def is_possible() -> bool:
    """Whether this machine can have such hosts."""
    return os.geteuid() == 0 and all(shutil.which(name) for name in ("ip", "tc"))


@contextmanager
def link(rate: str) -> Iterator[Link]:
    """`rate`: as `tc` writes it (1gbit, 100mbit), or `loopback` for two processes on this host."""
    if rate == LOOPBACK:
        yield Link([[], []], [{"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}] * 2)
        return
    mark = os.getpid() % 100000
    hosts, cables = [f"bench{mark}a", f"bench{mark}b"], [f"bv{mark}a", f"bv{mark}b"]
    try:
        for host in hosts:
            _do("ip", "netns", "add", host)
        _do("ip", "link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for number, (host, cable) in enumerate(zip(hosts, cables, strict=True), 1):
            _do("ip", "link", "set", cable, "netns", host)
            _do("ip", "-n", host, "addr", "add", f"10.78.0.{number}/24", "dev", cable)
            _do("ip", "-n", host, "link", "set", cable, "up")
            _do("ip", "-n", host, "link", "set", "lo", "up")
            limit = ("root", "tbf", "rate", rate, "burst", BURST, "latency", LATENCY)
            _do("ip", "netns", "exec", host, "tc", "qdisc", "add", "dev", cable, *limit)
        yield Link(
            [["ip", "netns", "exec", host] for host in hosts],
            [{"MASTER_ADDR": "10.78.0.1", "GLOO_SOCKET_IFNAME": cable} for cable in cables],
        )
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def on_both_hosts(place: Link, script: str, arguments: list[str]) -> list[Any]:
    """`script --rank ARGUMENTS` as a rank on either end; what the last line of each says, in JSON."""
    port = str(21000 + os.getpid() % 20000)
    ranks = []
    for number, (prefix, own) in enumerate(zip(place.prefixes, place.surroundings, strict=True)):
        surroundings = {**os.environ, "RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": port}
        surroundings |= {**own, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [*prefix, sys.executable, script, "--rank", *arguments]
        ranks.append(subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, text=True))
    try:
        with ThreadPoolExecutor(len(ranks)) as both:  # a pipe that nobody reads would stop its writer
            said = [both.submit(_said_by, rank, ranks) for rank in ranks]
        return [json.loads(text.result().splitlines()[-1]) for text in said]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _said_by(rank: subprocess.Popen[str], ranks: list[subprocess.Popen[str]]) -> str:
    """What it has printed by its end; a failure ends the others, which would wait for it."""
    said = rank.communicate(timeout=1800)[0]
    if rank.returncode:
        for other in ranks:
            other.kill()
        raise SystemExit("a rank has failed")
    return said


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
