"""What a long run leaves behind: a log of 94 layers x 128 experts is written, then read by the doctor and the report.

python tools/bench/long_run.py                      # a million steps, 100,000 lines, about two minutes
python tools/bench/long_run.py --lines 2000 --every 500
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from moe_dist.models.auxiliary import ROUTER_SUMS
from moe_dist.monitor.expert_stats import layer_record
from moe_dist.monitor.rank_facts import PHASE_KEYS
from moe_dist.monitor.records import EvalRecord, LayerRecord, RanksRecord, RunInfo, TrainRecord
from moe_dist.monitor.sinks.jsonl import JsonlSink

READ = """
import json, re, sys, time
started = time.perf_counter()
from moe_dist.monitor.health.doctor import findings
from moe_dist.monitor.run_log import read_run
if sys.argv[2] == "doctor":
    told = len(findings(read_run(sys.argv[1])))
else:
    from moe_dist.monitor.report.page import write_report
    told = write_report([sys.argv[1]]).stat().st_size
# Not ru_maxrss, which begins with what the process that started this one had.
peak = int(re.search("VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"told": told, "seconds": time.perf_counter() - started, "peak_bytes": peak}))
"""


def write(folder: Path, lines: int, every: int, num_layers: int, num_experts: int, top_k: int = 8) -> int:
    """A log of so many lines, `every` steps apart, by the sink that writes it in real runs; its bytes."""
    source = np.random.default_rng(0)
    weights = np.exp(0.3 * source.standard_normal(num_experts))

    def layers() -> list[LayerRecord]:
        loads = source.multinomial(400 * num_experts, weights / weights.sum(), size=num_layers)
        sums = dict.fromkeys(ROUTER_SUMS, 50.0 * num_experts)
        return [layer_record(layer, load, 0, 50 * num_experts, sums, top_k) for layer, load in enumerate(loads)]

    some = [layers() for _ in range(8)]
    sink = JsonlSink(folder / "metrics.jsonl")
    sink.open(RunInfo("A long run.", [], 1, 1, 1, "", str(folder), 8, "cuda", ["host"] * 8, [0] * 8, [0] * num_layers))
    each = [1.23456789 + 1e-3 * number for number in range(10)]
    ranks = RanksRecord([0.9] * 8, dict.fromkeys(PHASE_KEYS, [0.1] * 8), [10**6] * 8, [10**9] * 8, [10**11] * 8)
    for number in range(1, lines + 1):
        step = number * every
        sink.train(
            TrainRecord(
                step=step, max_steps=lines * every, epoch=number / lines, loss=2.0 + 4.0 / number + 1e-3 * (number % 7),
                learning_rate=3e-4, grad_norm=0.9, tokens=10**6 * step, tokens_per_second=1e6 + number % 97,
                step_seconds=1.0, all_to_all_share=0.1, data_wait_share=0.01, skipped_steps=0, elapsed_seconds=step,
                remaining_seconds=float(lines * every - step), memory_bytes=10**11, layers=some[number % 8],
                phase_seconds=dict.fromkeys(PHASE_KEYS, 1.0), ranks=ranks,
                steps=dict.fromkeys(("loss", "learning_rate", "grad_norm", "tokens_per_second"), each),
            )
        )  # fmt: skip
        if number % 100 == 0:
            sink.evaluation(EvalRecord(step, 2.1 + 4.0 / number, 9.0, 10**6, 10.0))
    sink.close()
    return (folder / "metrics.jsonl").stat().st_size


def read(folder: Path, how: str) -> dict[str, float]:
    """What `doctor` or `report` takes, in a process of its own."""
    command = [sys.executable, "-c", READ, str(folder), how]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=10, help="steps between two lines")
    parser.add_argument("--layers", type=int, default=94)
    parser.add_argument("--experts", type=int, default=128)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        size = write(Path(folder), given.lines, given.every, given.layers, given.experts)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(f"written: {size / 1e6:,.0f} MB in {time.perf_counter() - started:.0f} s ({peak:,.0f} MiB of memory)")
        for how in ("doctor", "report"):
            found = read(Path(folder), how)
            told = f"{found['told']:.0f} findings" if how == "doctor" else f"a page of {found['told'] / 1e6:.1f} MB"
            print(f"{how}: {told}, {found['seconds']:.1f} s, {found['peak_bytes'] / 2**20:,.0f} MiB of memory")


if __name__ == "__main__":
    main()
