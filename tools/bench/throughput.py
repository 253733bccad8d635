"""Rows per second through experts alone, as hivemind's own benchmark counts them, beside hivemind in the same run.

    python tools/bench/throughput.py [--preset default|ffn_forward] [--hivemind PYTHON] [--quick] [--json FILE]

16 experts of hidden size 1,024 and four times that inside, batches of 2,048 rows. `default` is forward, backward and an
update of the experts that were used; `ffn_forward` is forward alone. Two lines: `one` sends each batch whole to one
expert, `routed` sends each row to the expert that a random router has chosen. Ours are SwiGLU experts of as many
parameters, in one process; hivemind's are a server and clients that speak over local sockets
(`throughput_hivemind.py`), for which `--hivemind` names the Python of an environment that has it:
`pip install hivemind`. Both have all cores, and take turns.

The published figures of that benchmark on a GTX 1080 Ti are 28,581 rows a second (`default`) and 97,604
(`ffn_forward`): with `--device cuda` those are the lines to pass.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.models.experts import Experts
from moe_dist.models.malloc_tuning import keep_freed_memory
from moe_dist.models.permute import rows_from_tokens, sort_by_expert, tokens_from_rows

KINDS = ("one", "routed")
PUBLISHED = {"default": 28_581, "ffn_forward": 97_604}


class Ours:
    """Experts and their optimizer. One stack, of which a batch that goes whole to one expert uses that one alone."""

    def __init__(self, sizes: argparse.Namespace, backward: bool, device: torch.device) -> None:
        self.sizes, self.backward, self.device = sizes, backward, device
        # Two matrices of 4 x hidden have as many parameters as three of 8/3 x hidden.
        width = -(-8 * sizes.hidden // 3 // 16) * 16
        self.stack = Experts(sizes.experts, sizes.hidden, width)
        self.singles = [Experts(1, sizes.hidden, width) for _ in range(sizes.experts)]
        for module in (self.stack, *self.singles):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            module.to(device)
        fused: dict[str, Any] = {"fused": True, "lr": 1e-3}
        self.optimizers = {
            module: torch.optim.Adam(module.parameters(), **fused) for module in (self.stack, *self.singles)
        }

    def batch(self, kind: str) -> None:
        """One batch through one expert, or through those that a random router chooses."""
        count = self.sizes.experts
        rows = torch.randn(self.sizes.batch, self.sizes.hidden, device=self.device, requires_grad=self.backward)
        with torch.set_grad_enabled(self.backward):
            if kind == "one":
                module = self.singles[int(torch.randint(count, ()))]
                out = module(rows, torch.full((1,), len(rows), device=self.device))
            else:
                module = self.stack
                ids = torch.randint(count, (len(rows), 1), device=self.device)
                order = sort_by_expert(ids, count, None)
                parts = module(rows_from_tokens(rows, order), order.rows_per_expert)
                out = tokens_from_rows(parts, torch.ones(len(rows), 1, device=self.device), order)
            if self.backward:
                out.sum().backward()
                self.optimizers[module].step()
                self.optimizers[module].zero_grad()
        assert torch.isfinite(out).all()

    def run(self, kind: str, batches: int) -> float:
        started = time.perf_counter()
        for _ in range(batches):
            self.batch(kind)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def cpu(self) -> float:
        return time.process_time()

    def check(self) -> None:
        """Rows come back from the experts that they were sent to."""
        rows = torch.randn(64, self.sizes.hidden, device=self.device)
        ids = torch.randint(self.sizes.experts, (64, 1), device=self.device)
        order = sort_by_expert(ids, self.sizes.experts, None)
        with torch.no_grad():
            parts = self.stack(rows_from_tokens(rows, order), order.rows_per_expert)
            out = tokens_from_rows(parts, torch.ones(64, 1, device=self.device), order)
            expected = torch.stack([self._alone(row, int(i)) for row, i in zip(rows, ids[:, 0], strict=True)])
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)

    def _alone(self, row: Tensor, expert: int) -> Tensor:
        gate, up = (row @ self.stack.w_gate_up[expert]).chunk(2)
        return (torch.nn.functional.silu(gate) * up) @ self.stack.w_down[expert]


class Hivemind:
    """hivemind in processes of its own. Raises RuntimeError where it fails."""

    def __init__(self, python: str, sizes: argparse.Namespace, backward: bool, log: Path) -> None:
        self.clients = sizes.clients
        command = [python, str(Path(__file__).with_name("throughput_hivemind.py"))]
        command += [f"--{name}={getattr(sizes, name)}" for name in ("experts", "hidden", "batch", "clients")]
        self._log = log
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [*command, *(["--backward"] if backward else [])], **pipes, stderr=file, start_new_session=True
            )
        told = self._answer()
        self.startup, self.version = told["startup"], told["version"]

    def run(self, kind: str, batches: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind} {batches // self.clients}\n")
        self._process.stdin.flush()
        told = self._answer()
        if told["wrong"]:
            raise RuntimeError(f"hivemind: {told['wrong'][0]}")
        return told["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        tail = self._log.read_text(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"hivemind ended with exit code {self._process.wait()}: {' | '.join(tail)}")

    def _stats(self) -> list[list[str]]:
        """Of every process of its session: what stands behind the name in /proc/PID/stat."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                words = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(words[3]) == self._process.pid:
                found.append(words)
        return found

    def cpu(self) -> float:
        """Seconds of all its processes, those that have ended too."""
        return sum(sum(map(int, words[11:15])) for words in self._stats()) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Bytes of all its processes; what they share is counted in each."""
        return sum(int(words[21]) for words in self._stats()) * os.sysconf("SC_PAGESIZE")

    def close(self) -> int:
        """Its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(60)


def measured(side: Any, kind: str, batches: int, rows: int) -> tuple[float, float]:
    """Rows per second, and CPU seconds per 1,000 rows."""
    cpu = side.cpu()
    seconds = side.run(kind, batches)
    return rows * batches / seconds, 1000 * (side.cpu() - cpu) / (rows * batches)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PUBLISHED), default="default")
    parser.add_argument("--hivemind", metavar="PYTHON", help="of an environment that has it; without: ours alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of ours; hivemind runs on the CPU")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under three minutes")
    parser.add_argument("--json", type=Path)
    for name, value in (("experts", 16), ("hidden", 1024), ("batch", 2048), ("clients", 2), ("rounds", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    found = parser.parse_args()
    if found.device == "cuda" and found.hivemind:
        parser.error("--hivemind beside --device cuda: they would not be measured on the same device")
    return found


def main() -> int:
    sizes = parsed()
    backward = sizes.preset == "default"
    rounds, batches = sizes.rounds or (2 if sizes.quick else 7), sizes.clients
    keep_freed_memory()
    started = time.perf_counter()
    ours = Ours(sizes, backward, torch.device(sizes.device))
    startup = {"ours": time.perf_counter() - started}
    ours.check()
    sides: dict[str, Any] = {"ours": ours}
    status, codes, memory = "Success", {}, {}
    log = Path(f"/tmp/throughput-hivemind-{os.getpid()}.log")
    figures: dict[str, dict[str, list[tuple[float, float]]]] = {kind: {} for kind in KINDS}
    try:
        if sizes.hivemind:
            sides["hivemind"] = Hivemind(sizes.hivemind, sizes, backward, log)
            startup["hivemind"] = sides["hivemind"].startup
        for number in range(rounds + 1):  # the first warms up
            for kind in KINDS:
                for name, side in sides.items():
                    found = measured(side, kind, batches, sizes.batch)
                    if number:
                        figures[kind].setdefault(name, []).append(found)
        memory = {"ours": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if "hivemind" in sides:
            memory["hivemind"] = sides["hivemind"].memory()
    except RuntimeError as error:
        status = f"Failure: {error}"
    if "hivemind" in sides:
        codes["hivemind"] = sides["hivemind"].close()
        if codes["hivemind"] and status == "Success":
            status = f"Failure: hivemind ended with exit code {codes['hivemind']}"
    log.unlink(missing_ok=True)
    ratio, cpu_ratio = report(sizes, figures, startup, memory, status)
    if sizes.json:
        told = {
            "preset": sizes.preset,
            "status": status,
            "exit_codes": codes,
            "ratio_to_hivemind": ratio,
            "cpu_ratio_to_hivemind": cpu_ratio,
        }
        told |= {"figures": figures, "startup_seconds": startup, "memory_bytes": memory, "torch": torch.__version__}
        sizes.json.write_text(json.dumps(told, indent=1))
    return int(status != "Success")


def report(
    sizes: argparse.Namespace, figures: Any, startup: dict[str, float], memory: dict[str, int], status: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Print what was found. Of every line ours / hivemind in rows per second, and in rows per CPU second: medians."""
    passes = "forward + backward + update" if sizes.preset == "default" else "forward"
    print(f"{sizes.experts} experts, hidden {sizes.hidden}, {sizes.batch} rows a batch, {passes}")
    print(f"device:{sizes.device} threads:{torch.get_num_threads()} clients:{sizes.clients} torch:{torch.__version__}")
    for name, seconds in startup.items():
        print(f"{name:<9} startup {seconds:.2f} s, memory {memory.get(name, 0) / 2**30:.2f} GiB")
    ratios: dict[str, float] = {}
    cpu_ratios: dict[str, float] = {}
    middle: Callable[[Any, int], float] = lambda pairs, place: statistics.median(pair[place] for pair in pairs)  # noqa: E731
    for kind, sides in figures.items():
        for name, pairs in sides.items():
            speed, cpu = middle(pairs, 0), middle(pairs, 1)
            print(f"{kind:<7} {name:<9} {speed:>12,.0f} samples/s {cpu:>9.3f} CPU s per 1,000 rows")
        if len(sides) == 2:
            each = sorted(a[0] / b[0] for a, b in zip(sides["ours"], sides["hivemind"], strict=True))
            ratios[kind] = statistics.median(each)
            less = sorted(b[1] / a[1] for a, b in zip(sides["ours"], sides["hivemind"], strict=True))
            cpu_ratios[kind] = statistics.median(less)
            print(
                f"{kind:<7} ours / hivemind: {ratios[kind]:.2f} ({each[0]:.2f} to {each[-1]:.2f}), "
                f"per CPU second {cpu_ratios[kind]:.2f} ({less[0]:.2f} to {less[-1]:.2f})"
            )
    print(f"published on a GTX 1080 Ti: {PUBLISHED[sizes.preset]:,} samples/s")
    print(f"status:{status}")
    return ratios, cpu_ratios


if __name__ == "__main__":
    sys.exit(main())
