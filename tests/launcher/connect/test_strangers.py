"""Somebody on the network, against every launcher that runs here: nothing of his is executed, read or believed."""

from __future__ import annotations

import os
import pickle
import re
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from mortal import TORCHRUN, errors
from programs import FOREVER, Program, metrics
from ranks import free_port

pytestmark = [pytest.mark.dist, pytest.mark.launch, pytest.mark.slow]
SECRET = "the secret of these machines"
AGENT = (sys.executable, "-m", "moe_dist", "agent")
TRAIN = ("-m", "moe_dist", "train")
Address = tuple[str, int]


class Bomb:
    """What whoever unpickles it does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def listening(pids: list[int]) -> set[Address]:
    """Where these processes listen, by IPv4 and IPv6."""
    inodes = set()
    for pid in pids:
        with suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    inodes.add(os.readlink(entry)[8:-1])
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, _, port = fields[1].rpartition(":")
                words = struct.unpack(f">{len(address) // 8}I", bytes.fromhex(address))
                found.add((socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words)), int(port, 16)))
    return found


STRANGERS = 50
"""Connections to every port, in each of two rounds: as soon as it listens, and again while the run trains."""
MORE_THREADS, MORE_MEMORY = 24, 16 * 2**20
"""By which a process may grow in the second round: the metrics server serves 16 at a time, a thread each."""


def half_a_hello() -> bytes:
    """The first half of what a client of TLS says first."""
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    return hello[: len(hello) // 2]


class Strangers:
    """Connections that stay as long as they are let, and say what the other end takes of it."""

    def __init__(self, bomb: bytes) -> None:
        self.unsaid: dict[socket.socket, memoryview] = {}
        self.words = (
            b"GET / HTTP/1.1\r\n\r\n",
            os.urandom(4096),
            b"",
            bomb,
            half_a_hello(),
            b"GET /metrics HTTP/1.1\r\n" + b"X-More: of it\r\n" * 200,
            b"x" * 2**20,
        )

    def attack(self, address: Address) -> None:
        """As a web browser, with random bytes, in silence, with the bomb, with half of a TLS hello, with a head that
        never ends, with a line that never does; the eighth has gone before anybody has looked."""
        for number in range(STRANGERS):
            kind = number % (len(self.words) + 1)
            with suppress(OSError):
                stranger = socket.create_connection(address, timeout=5)
                if kind == len(self.words):
                    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    stranger.close()
                else:
                    stranger.setblocking(False)
                    self.unsaid[stranger] = memoryview(self.words[kind])
        self.go_on()

    def go_on(self) -> None:
        """Nobody is waited for."""
        for stranger, words in self.unsaid.items():
            with suppress(OSError):
                self.unsaid[stranger] = words[stranger.send(words) :] if words else words

    def close(self) -> None:
        for stranger in self.unsaid:
            stranger.close()


def size_of(pids: list[int]) -> dict[int, tuple[int, int]]:
    """Threads and resident bytes of each process."""
    found = {}
    for pid in pids:
        with suppress(OSError, KeyError):
            rows = dict(row.split(":", 1) for row in Path(f"/proc/{pid}/status").read_text().splitlines())
            found[pid] = (int(rows["Threads"]), int(rows["VmRSS"].split()[0]) * 1024)
    return found


def write_as_torch(address: Address, bomb: bytes, let_in: list[Address]) -> threading.Thread:
    """Note where a client of torch's can read or write; gloo's ports leave it without an answer as long as they are."""

    def write() -> None:
        with suppress(RuntimeError, ValueError):
            store = dist.TCPStore(address[0], address[1], is_master=False, timeout=timedelta(seconds=1))
            store.set("torch.rendezvous.run", bomb)
            if store.get("torch.rendezvous.run"):
                let_in.append(address)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


def trains(folder: Path) -> bool:
    """Whether some steps are done, so that a process has what it needs."""
    return (folder / "metrics.jsonl").is_file() and len(metrics(folder, "train")) >= 5


def outside() -> str:
    """An address of this machine that others could reach."""
    for _, name in socket.if_nameindex():
        from launcher.connect.addresses import _of_interface

        address = _of_interface(name)
        if address and not address.startswith("127."):
            return address
    pytest.skip("this machine has no network")


def one_machine(starter: tuple[str, ...]) -> Callable[[Path, tuple[str, ...]], list[Program]]:
    def start(config: Path, options: tuple[str, ...]) -> list[Program]:
        return [Program(*starter, config, *options)]

    return start


def agents(config: Path, options: tuple[str, ...]) -> list[Program]:
    """Two machines under `launch torchrun`."""
    meeting = (f"--rdzv-endpoint={outside()}:{free_port()}", "--nnodes=2", "--nproc-per-node=1")
    return [
        Program(*TORCHRUN, *meeting, f"--node-rank={rank}", config, *options, MOE_DIST_SECRET=SECRET)
        for rank in range(2)
    ]


def pods(config: Path, options: tuple[str, ...]) -> list[Program]:
    """Two machines with numbers, as in k8s/."""
    place = (f"--master-addr={outside()}", f"--master-port={free_port()}", "--nnodes=2", "--nproc-per-node=1")
    interface = {"GLOO_SOCKET_IFNAME": _interface(), "MOE_DIST_SECRET": SECRET}
    return [Program(*AGENT, *place, f"--node-rank={rank}", *TRAIN, config, *options, **interface) for rank in range(2)]


def by_hand(config: Path, options: tuple[str, ...]) -> list[Program]:
    """Ranks with variables only, as those of srun are."""
    place = {"MASTER_ADDR": outside(), "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    place |= {"GLOO_SOCKET_IFNAME": _interface(), "MOE_DIST_SECRET": SECRET}
    return [
        Program("moe-dist", "train", config, *options, **place, RANK=str(rank), LOCAL_RANK="0") for rank in range(2)
    ]


def _interface() -> str:
    from launcher.connect.addresses import interface_of

    return interface_of(outside()) or ""


STARTERS = {
    "local": (one_machine(("moe-dist", "train")), True),
    "torchrun": (one_machine(TORCHRUN), True),
    "two machines": (agents, False),
    "pods": (pods, False),
    "by hand": (by_hand, False),
}


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    found: list[Program] = []
    yield found
    for program in found:
        if program.process.poll() is None:
            program.process.kill()


@pytest.mark.parametrize(("start", "is_alone"), STARTERS.values(), ids=STARTERS.keys())
def test_a_stranger(
    start: Callable[..., list[Program]], is_alone: bool, config: Path, tmp_path: Path, programs: list[Program]
) -> None:
    """No port on all interfaces; on one machine none that others reach at all. Where machines meet torch's client of a
    store gets no word in, the run goes on until it is told to stop, and whoever listens has warned once at most. No
    process has a thread or memory for each that comes.

    torchrun's own stores listen on all interfaces and take what anybody writes.
    """
    bomb = pickle.dumps(Bomb(tmp_path / "bomb"))
    options = (*FOREVER, f"train.output_dir={tmp_path / 'run'}", "monitor.prometheus.port=0")
    programs += start(config, options)
    tried: set[Address] = set()
    before: dict[int, tuple[int, int]] = {}
    after: dict[int, tuple[int, int]] = {}
    is_told, enough = False, 0
    writers: list[threading.Thread] = []
    let_in: list[Address] = []
    with closing(Strangers(bomb)) as strangers:
        while any(program.process.poll() is None for program in programs):
            pids = [pid for program in programs for pid in program.processes()]
            there = listening(pids)
            for address in there - tried:
                tried.add(address)
                if not address[0].startswith("127."):
                    writers.append(write_as_torch(address, bomb, let_in))
                strangers.attack(address)
            strangers.go_on()
            if not before and trains(tmp_path / "run"):
                before = size_of(pids)
                for address in there:
                    strangers.attack(address)
                enough = metrics(tmp_path / "run", "train")[-1]["step"] + 50
            if before and not is_told:  # what is imported to write the last checkpoint is not the strangers'
                now = size_of([pid for pid in pids if pid in before])
                after |= {pid: tuple(map(max, size, after.get(pid, size))) for pid, size in now.items()}
                if metrics(tmp_path / "run", "train")[-1]["step"] >= enough:
                    programs[0].process.terminate()
                    is_told = True
        assert [program.end() for program in programs] == [75] * len(programs), [program.err for program in programs]
    for writer in writers:
        writer.join(30)
        assert not writer.is_alive()
    assert not let_in
    grown = {pid: (threads - before[pid][0], memory - before[pid][1]) for pid, (threads, memory) in after.items()}
    assert len(grown) >= 2, "nobody was looked at"
    print(f"threads and bytes by which processes grew: {sorted(grown.values())}, {len(tried)} ports")
    assert all(threads <= MORE_THREADS and memory < MORE_MEMORY for threads, memory in grown.values()), grown
    assert not [address for address in tried if address[0] in ("0.0.0.0", "::")], tried
    assert not is_alone or all(address[0] in ("127.0.0.1", "::1") for address in tried), tried
    assert not (tmp_path / "bomb").exists()
    assert not [line for program in programs for line in errors(program)]
    said = [(tmp_path / "run/train.log").read_text(), *(program.err for program in programs)]
    refused = r"port (\d+): a connection from \S+ did not prove that it belongs to this run"
    ports = [re.findall(refused, one) for one in said]
    assert all(len(found) == len(set(found)) for found in ports), "one warning for a port"
