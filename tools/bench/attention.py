"""Attention of rows in which documents are packed: with one mask of all tokens, and document by document.

    python tools/bench/attention.py [--quick] [--json FILE] [--rounds 5] [--threads 1]

One layer, forward and backward, in float32, 2,048 tokens in a row cut into 1 to 64 documents. Contenders: `mask`, as on
a GPU; `one by one`, as on a CPU; `separate`: as if every document had been a pass of its own, nothing cut or put
together, which is the limit. They take turns; figures are medians of CPU seconds. `time_over_mask` and
`memory_over_mask` below 1: one by one takes less; `memory`: largest number of bytes at a time, by torch's allocator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from moe_dist.config import ModelConfig  # noqa: E402
from moe_dist.models.attention import build_attention  # noqa: E402
from moe_dist.models.attention_mask import Mask, masks_of  # noqa: E402
from moe_dist.models.rotary import rotary_table  # noqa: E402
from tools.bench.allocator import kept_and_peak  # noqa: E402

LENGTH, HIDDEN = 2048, 512
MODEL = ModelConfig(hidden_size=HIDDEN, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=LENGTH)


def contenders(documents: int) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    attention = build_attention(MODEL, 0)
    for parameter in attention.parameters():
        parameter.data.normal_(0, 0.02)
    length = LENGTH // documents
    ids = (torch.arange(LENGTH) // length)[None]
    cos, sin = (table[:, None] for table in rotary_table((torch.arange(LENGTH) % length)[None], MODEL))
    x = torch.randn(1, LENGTH, HIDDEN, requires_grad=True)

    def run(x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> None:
        attention(x, (cos, sin), mask).sum().backward()

    def masked(splits: bool) -> Callable[[], None]:
        return lambda: run(x, cos, sin, masks_of([None], LENGTH, ids, x.device, splits)[None])

    def separate() -> None:
        for part, c, s in zip(x.split(length, 1), cos.split(length, 2), sin.split(length, 2), strict=True):
            run(part, c, s, None)

    return {"mask": masked(False), "one by one": masked(True), "separate": separate}


def measure(documents: int, rounds: int) -> dict[str, Any]:
    runs = contenders(documents)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - start)
    took = {name: statistics.median(each) for name, each in seconds.items()}
    memory = {}
    for name, run in runs.items():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
        _, memory[name] = kept_and_peak(profiled)
    return {
        "documents": documents,
        "ms": {name: took[name] * 1e3 for name in runs},
        "mb": {name: memory[name] / 1e6 for name in runs},
        "time_over_mask": took["one by one"] / took["mask"],
        "time_over_limit": took["one by one"] / took["separate"],
        "memory_over_mask": memory["one by one"] / memory["mask"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print("documents  mask ms  one by one  separate  time/mask  time/limit  memory/mask")
    for documents in (1, 16) if arguments.quick else (1, 4, 16, 64):
        row = measure(documents, 1 if arguments.quick else arguments.rounds)
        rows.append(row)
        ms = row["ms"]
        print(
            f"{documents:9}  {ms['mask']:7.0f}  {ms['one by one']:10.0f}  {ms['separate']:8.0f}"
            f"  {row['time_over_mask']:9.2f}  {row['time_over_limit']:10.2f}  {row['memory_over_mask']:11.2f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"tokens": LENGTH, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
