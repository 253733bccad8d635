"""Save and load beside PyTorch's own ways and the disk itself, in one run on two gloo ranks.

    python tools/bench_checkpoint.py                  # 200 MB and 1 GB of state
    python tools/bench_checkpoint.py --megabytes 200 --rounds 5 --json

Every round does each of these once, one after the other, on the same sharded tensors (each rank holds half):
our save (BLAKE3 of every byte, fsync, rename), `torch.distributed.checkpoint` save and async_save (which fsync too),
`torch.save` and fsync of each rank's half, and a plain write and fsync of as many bytes. Then both load; ours reads
every byte twice, once to verify it. Medians over rounds after one that warms up. Ratios are ours to the peer's; for
seconds less is better, for GB/s more is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from moe_dist.checkpoint.manager import Checkpoints
from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.config import CheckpointConfig
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.mesh import Mesh

RANKS = 2
TENSORS = 24
BYTES_PER_WEIGHT = 12
"""Weight and two moments in float32."""
STEP_TOKENS = 4096
SETTLE = 0.5
"""Seconds of rest for the disk between two ways."""


class State:
    """Tensors by name, as the manager takes them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.model_shapes: dict[str, tuple[int, ...]] = {}

    def wrong_shapes(self) -> list[str]:
        return []

    def finish_reading(self) -> None:
        pass


def make_state(mesh: Mesh, num_bytes: int) -> dict[str, Tensor]:
    """Stacks of experts cut over the ranks."""
    assert mesh.sparse is not None
    experts, width = 8, 512
    rows = num_bytes // (TENSORS * experts * width * 4)
    generator = torch.Generator().manual_seed(mesh.rank)
    return {
        f"model.layers.{index}.moe.experts.w_down": DTensor.from_local(
            torch.randn(experts // RANKS, rows, width, generator=generator), mesh.sparse["ep"], [Shard(0)]
        )
        for index in range(TENSORS)
    }


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the slowest rank is done, and the result."""
    dist.barrier()
    began = time.perf_counter()
    result = work()
    own = time.perf_counter() - began
    seconds = torch.tensor([own], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds), result


def write_plain(path: Path, content: memoryview) -> None:
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(content), 8 * 2**20):
            file.write(content[start : start + 8 * 2**20])
        os.fsync(file.fileno())


def save_plain(path: Path, tensors: dict[str, Tensor]) -> None:
    with open(path, "wb") as file:
        torch.save({name: tensor.to_local() for name, tensor in tensors.items()}, file)  # type: ignore[attr-defined]
        file.flush()
        os.fsync(file.fileno())


def step_seconds(num_bytes: int) -> float:
    """A training step of STEP_TOKENS tokens of a dense model of this size, by the matmul rate of this moment."""
    a = torch.randn(512, 512)
    count = 0
    began = time.perf_counter()
    while time.perf_counter() - began < 0.3:
        a @ a
        count += 1
    rate = torch.tensor([count * 2 * 512**3 / (time.perf_counter() - began)], dtype=torch.float64)
    dist.all_reduce(rate)
    return 6 * num_bytes / BYTES_PER_WEIGHT * STEP_TOKENS / float(rate)


def one_round(folder: Path, index: int, checkpoints: Checkpoints, state: State, num_bytes: int) -> dict[str, float]:
    """Seconds of everything, each way in a folder of its own that is gone afterwards."""
    rank, tensors = dist.get_rank(), state.tensors
    found: dict[str, float] = {}

    def clear() -> None:
        dist.barrier()
        if rank == 0:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.sync()  # nobody pays for what the one before has left to the disk
            time.sleep(SETTLE)
        dist.barrier()

    def ours() -> None:
        began = time.perf_counter()
        checkpoints.begin(index, state, {"config": {}}, {})  # type: ignore[arg-type]
        found["ours blocked"] = time.perf_counter() - began
        outcome = checkpoints.settle()
        assert outcome.error is None, outcome.error

    def load_ours() -> None:
        step = checkpoints.find(str(index), lambda text: None)
        assert step is not None
        checkpoints.read_tensors(checkpoints.read_state(step), state)  # type: ignore[arg-type]

    def asynchronous() -> None:
        began = time.perf_counter()
        future = dcp.async_save(tensors, checkpoint_id=folder / "async")
        found["dcp async blocked"] = time.perf_counter() - began
        future.result()

    def save() -> None:
        found["ours save"], _ = timed(ours)

    def load() -> None:
        found["ours load"], _ = timed(load_ours)

    def dcp_save() -> None:
        found["dcp save"], _ = timed(lambda: dcp.save(tensors, checkpoint_id=folder / "dcp"))

    def dcp_load() -> None:
        found["dcp load"], _ = timed(lambda: dcp.load(tensors, checkpoint_id=folder / "dcp"))

    def dcp_async() -> None:
        found["dcp async save"], _ = timed(asynchronous)

    def torch_save() -> None:
        found["torch.save"], _ = timed(lambda: save_plain(folder / f"plain-{rank}", tensors))

    def disk() -> None:
        body = torch.full((num_bytes // RANKS,), rank, dtype=torch.uint8)
        found["disk"], _ = timed(lambda: write_plain(folder / f"disk-{rank}", body.numpy().data))

    ways: list[list[Callable[[], None]]] = [[save, load], [dcp_save, dcp_load], [dcp_async], [torch_save], [disk]]
    for way in ways[index % len(ways) :] + ways[: index % len(ways)]:  # nobody is always first
        for part in way:
            part()
        clear()
    found["step"] = step_seconds(num_bytes)
    return found


def work(rank: int, port: int, folder: Path, sizes: list[int], rounds: int, results: Any) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    mesh = Mesh.create(Layout(RANKS, 1, RANKS), torch.device("cpu"), None)
    for size in sizes:
        checkpoints = Checkpoints(LocalStorage(folder), mesh, CheckpointConfig(), run="be")
        state = State(make_state(mesh, size))
        rows = [one_round(folder, index, checkpoints, state, size) for index in range(rounds + 1)]
        if rank == 0:
            results.put((size, {name: [row[name] for row in rows[1:]] for name in rows[0]}))
    dist.barrier()
    dist.destroy_process_group()


def summary(size: int, rows: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, rates in GB/s, and ratios of ours to each peer."""
    seconds = {name: statistics.median(values) for name, values in rows.items()}
    rates = {name: size / seconds[name] / 1e9 for name in seconds if "blocked" not in name and name != "step"}
    return {
        "bytes": size,
        "rounds": len(rows["step"]),
        "seconds": seconds,
        "gigabytes_per_second": rates,
        "blocked_share_of_step": seconds["ours blocked"] / seconds["step"],
        "ratios": {
            "blocked, ours / async_save": seconds["ours blocked"] / seconds["dcp async blocked"],
            "save rate, ours / DCP save": rates["ours save"] / rates["dcp save"],
            "save rate, ours / DCP async_save": rates["ours save"] / rates["dcp async save"],
            "save rate, ours / torch.save": rates["ours save"] / rates["torch.save"],
            "save rate, ours / disk": rates["ours save"] / rates["disk"],
            "load rate, ours verified / DCP load": rates["ours load"] / rates["dcp load"],
        },
    }


def show(found: dict[str, Any]) -> None:
    console = Console(highlight=False, width=100)
    seconds, rates = found["seconds"], found["gigabytes_per_second"]
    console.print(f"{found['bytes'] / 1e6:.0f} MB on {RANKS} ranks, medians of {found['rounds']} rounds")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("", "blocked", "whole", "GB/s"):
        table.add_column(column, header_style="dim", justify="left" if not column else "right")
    names = {"ours save": "ours blocked", "dcp async save": "dcp async blocked"}
    for name in ("ours save", "dcp save", "dcp async save", "torch.save", "disk", "ours load", "dcp load"):
        label = {"disk": "write + fsync", "ours load": "ours verify + load"}.get(name, name)
        blocked = seconds[names.get(name, name)]
        table.add_row(label, f"{blocked * 1e3:.0f} ms", f"{seconds[name] * 1e3:.0f} ms", f"{rates[name]:.2f}")
    console.print(table)
    share = found["blocked_share_of_step"]
    console.print(f"blocked: {share:.1%} of a step of {STEP_TOKENS} tokens ({seconds['step']:.1f} s by matmul rate)")
    for name, ratio in found["ratios"].items():
        console.print(f"{name:38} {ratio:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the temporary folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=options.folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        context = multiprocessing.get_context("spawn")
        results = context.SimpleQueue()
        sizes = [count * 10**6 for count in options.megabytes]
        multiprocessing.spawn(work, (port, folder, sizes, options.rounds, results), RANKS)
        found = [summary(*results.get()) for _ in sizes]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for one in found:
            show(one)
    return 0


if __name__ == "__main__":
    sys.exit(main())
