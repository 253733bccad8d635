"""Peak memory of a training step: with a large vocabulary beside `transformers`, and of a rank with four times its
share of rows beside one with its share. Each in processes of its own.

    python tools/bench/memory.py [--quick] [--json FILE] [--rounds 3] [--threads 1]

Contenders: `ours`, as a run is; `all logits`: with `train.loss_chunk_tokens: 0`, as runs were before the loss came in
chunks; `transformers`: Qwen3-MoE of the same sizes with its own loss. All train in float32 with fused AdamW and
clipping, on the same tokens. `peak`: largest resident memory of the process, imports included; `held`: weights,
gradients and optimizer state by arithmetic; `ms`: the fastest step but the first. Figures are medians of processes that
took turns; a ratio below 1: ours takes less.

Then the skewed layer (`memory_skew.py`), as it is and with all rows in one chunk: `train.expert_chunk_factor: 0`.

Top-level keys of the JSON: `peak_over_transformers`, `peak_over_today`, `skew_over_even` (peak of the rank with four
times its share / peak of one with its share), and bytes and seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memory_skew

CONTENDERS = ("ours", "all logits", "transformers")
VOCABULARY, TOKENS, LENGTH = 151_936, 2048, 512
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": LENGTH,
}


def ours(chunk: int | str) -> Callable[[], float]:
    from moe_dist.config import load_mapping
    from moe_dist.data.batch import Batch
    from moe_dist.parallel.engines.registry import build_engine
    from moe_dist.parallel.mesh import Mesh
    from moe_dist.train.balance import Balancer
    from moe_dist.train.build import build_model
    from moe_dist.train.step import TrainStep

    config = load_mapping(
        {"model": MODEL, "data": {"max_seq_length": LENGTH}, "train": {"loss_chunk_tokens": chunk}, "optimizer": {}}
    )
    mesh = Mesh.single()
    model = build_model(config, mesh)
    step = TrainStep(model, mesh, build_engine(model, config, mesh), Balancer(model, mesh, 0.0), config)
    ids, labels = tokens()
    batch = Batch(ids, labels, None, None, labels.numel(), labels.numel(), [0], 0)
    return lambda: step([batch], 0, 1e-3).loss


def transformers() -> Callable[[], float]:
    import torch
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**MODEL, tie_word_embeddings=False, output_router_logits=True, router_aux_loss_coef=0.01)
    config._experts_implementation, config._attn_implementation = "grouped_mm", "sdpa"
    model = Qwen3MoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids, labels = tokens()

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, shift_labels=labels, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def tokens() -> tuple[Any, Any]:
    """(B, S) ids and the labels of each position."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (TOKENS // LENGTH, LENGTH + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def child(contender: str, steps: int, threads: int) -> None:
    """Train, and print one line of JSON."""
    import torch

    from moe_dist.models.malloc_tuning import keep_freed_memory

    torch.set_num_threads(threads)
    if contender != "transformers":
        keep_freed_memory()
    step = transformers() if contender == "transformers" else ours("auto" if contender == "ours" else 0)
    seconds, losses = [], []
    for _ in range(steps):
        started = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": min(seconds[1:]), "losses": losses}))


def held_bytes() -> int:
    """Weights, gradients and two moments in float32."""
    import torch

    from moe_dist.config import load_mapping
    from moe_dist.models.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(load_mapping({"model": MODEL, "data": {"max_seq_length": LENGTH}}).model)
    return 16 * sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round: under 3 minutes")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, help="processes of each contender; default 3, or 1 with --quick")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps = 3
    if arguments.child:
        child(arguments.child, steps, arguments.threads)
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.rounds or (1 if arguments.quick else 3)):
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--child", name, "--threads", str(arguments.threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    peaks = {name: statistics.median(one["peak"] for one in values) for name, values in found.items()}
    seconds = {name: statistics.median(one["seconds"] for one in values) for name, values in found.items()}
    held = held_bytes()
    print(f"vocabulary {VOCABULARY:,}, {TOKENS:,} tokens, {arguments.threads} thread(s); held {held / 1e6:,.0f} MB")
    print(f"{'':<14}{'peak MB':>9}{'ours / it':>11}{'ms':>9}{'ours / it':>11}{'loss of step 3':>16}")
    for name in CONTENDERS:
        ratios = peaks["ours"] / peaks[name], seconds["ours"] / seconds[name]
        print(
            f"{name:<14}{peaks[name] / 1e6:>9,.0f}{ratios[0]:>11.2f}{1e3 * seconds[name]:>9,.0f}{ratios[1]:>11.2f}"
            f"{found[name][0]['losses'][-1]:>16.4f}"
        )
    skew = memory_skew.measure()
    print(f"\n{memory_skew.RANKS} ranks, {memory_skew.TOKENS:,} tokens each, {memory_skew.EXPERTS} experts top-2")
    print(f"{'rank 0':<20}{'held MB':>9}{'step MB':>9}{'peak MB':>9}{'it / even':>11}")
    skew_peaks = {name: one["held"] + one["step"] for name, one in skew.items()}
    skew_over_even = {name: peak / skew_peaks["even"] for name, peak in skew_peaks.items() if name != "even"}
    for name, one in skew.items():
        figures = one["held"] / 1e6, one["step"] / 1e6, skew_peaks[name] / 1e6
        print(f"{name:<20}{''.join(f'{mb:>9,.0f}' for mb in figures)}{skew_peaks[name] / skew_peaks['even']:>11.2f}")
    result = {
        "peak_over_transformers": peaks["ours"] / peaks["transformers"],
        "peak_over_today": peaks["ours"] / peaks["all logits"],
        "skew_over_even": skew_over_even["skewed"],
        "skew_bytes": skew,
        "peak_bytes": peaks,
        "held_bytes": held,
        "seconds": seconds,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
