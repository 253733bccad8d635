"""LoRA on attention and experts beside `transformers` with `peft`: time of a step and peak memory.

    python tools/bench/finetune.py [--quick] [--json FILE] [--rounds 3] [--threads 1]

Qwen3-MoE of four layers, hidden size 512, with 16 and with 64 experts, float32, adapters of rank 16 on q, k, v, o and
on both matrices of every expert, AdamW, clipping, the same base weights and tokens. `ours`: as a run is; `peft`: its
`target_parameters` for experts, over `transformers` with its grouped matmuls. The two take turns, each in processes
of its own; before anything is compared their first losses, of the base alone, must agree.

`cpu ms`: processor time of a step, which other work on the machine hardly moves, `ms`: of the clock; each of the
cheapest step but the first, median of processes; `peak`: largest resident memory of the process, imports
included; `above`: of it what came after the model stood there with its adapters: activations, gradients, moments, and
what a step makes for a moment. Top-level keys of the JSON, by shape: `speed_over_peft` (by processor time; above 1:
ours is faster), `peak_over_peft` and `above_over_peft` (below 1: ours takes less).
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

SHAPES = {"16 experts top-2": (16, 2, 1024), "64 experts top-8": (64, 8, 256)}
"""Experts, how many of them a token has, their width."""
SIZES: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "head_dim": 64}
LENGTH, SEQUENCES, RANK, RATE = 512, 2, 16, 1e-4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
Step = Callable[[], float]


def config_of(shape: str) -> Any:
    from moe_dist.config import load_mapping

    experts, top_k, width = SHAPES[shape]
    sizes = {"num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width}
    return load_mapping(
        {
            "model": SIZES | sizes,
            "data": {"max_seq_length": LENGTH},
            "lora": {"r": RANK, "alpha": 2 * RANK, "target_modules": [*ATTENTION, "experts"]},
            "balance": {"router_aux_loss_coef": 0.0},
        }
    )


def tokens() -> tuple[Any, Any]:
    """(B, S) ids and the labels of each position."""
    import torch

    ids = torch.randint(0, SIZES["vocab_size"], (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def ours(shape: str) -> Step:
    from moe_dist.data.batch import Batch
    from moe_dist.parallel.engines.registry import build_engine
    from moe_dist.parallel.mesh import Mesh
    from moe_dist.train.balance import Balancer
    from moe_dist.train.build import build_model
    from moe_dist.train.step import TrainStep

    config, mesh = config_of(shape), Mesh.single()
    model = build_model(config, mesh)
    step = TrainStep(model, mesh, build_engine(model, config, mesh), Balancer(model, mesh, 0.0), config)
    ids, labels = tokens()
    batch = Batch(ids, labels, None, None, labels.numel(), labels.numel(), [0], 0)
    return lambda: step([batch], 0, RATE).loss


def peft(shape: str) -> Step:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe_dist.models.huggingface import to_huggingface
    from moe_dist.models.transformer import Transformer

    config = config_of(shape)
    model = config.model
    theirs = Qwen3MoeConfig(
        **SIZES,
        num_experts=model.num_experts,
        num_experts_per_tok=model.num_experts_per_tok,
        moe_intermediate_size=model.moe_intermediate_size,
        max_position_embeddings=model.max_position_embeddings,
        rope_theta=model.rope_theta,
        rms_norm_eps=model.rms_norm_eps,
        norm_topk_prob=model.norm_topk_prob,
        tie_word_embeddings=model.tie_word_embeddings,
        experts_implementation="grouped_mm",
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device("meta"):
        base, built = Transformer(model), Qwen3MoeForCausalLM(theirs)
    base.initialize(config.train.seed)
    # Assigned, so that no copy of the weights counts as a peak of theirs. Rotary frequencies are made anew.
    built.load_state_dict(to_huggingface(base, model, fused=True), assign=True)
    built.model.rotary_emb = type(built.model.rotary_emb)(theirs)
    built.requires_grad_(False)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(
        built,
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=ATTENTION, target_parameters=parameters),
    ).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    ids, labels = tokens()

    def step() -> float:
        optimizer.zero_grad()
        loss = adapted(input_ids=ids, shift_labels=labels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


CONTENDERS: dict[str, Callable[[str], Step]] = {"ours": ours, "peft": peft}


def child(contender: str, shape: str, steps: int, threads: int) -> None:
    """Train, and print one line of JSON."""
    import torch

    from moe_dist.models.malloc_tuning import keep_freed_memory

    torch.set_num_threads(threads)
    if contender == "ours":
        keep_freed_memory()
    step = CONTENDERS[contender](shape)
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    seconds, cpu, losses = [], [], []
    for _ in range(steps):
        started, used = time.perf_counter(), time.process_time()
        losses.append(step())
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    fastest = {"seconds": min(seconds[1:]), "cpu": min(cpu[1:])}
    print(json.dumps({"peak": peak, "above": peak - held, **fastest, "losses": losses}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round: under 3 minutes")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, help="processes of each contender; default 3, or 1 with --quick")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps = 4
    if arguments.child:
        child(*arguments.child, steps, arguments.threads)
        return
    result: dict[str, Any] = {
        "speed_over_peft": {}, "peak_over_peft": {}, "above_over_peft": {}, "seconds": {}, "cpu": {}, "peak_bytes": {}
    }  # fmt: skip
    print(f"{SEQUENCES * LENGTH:,} tokens, rank {RANK}, {arguments.threads} thread(s)")
    columns = ["cpu ms", "it / ours", "ms", "it / ours", "peak MB", "ours / it", "above MB", "ours / it"]
    print(" " * 26 + "".join(f"{column:>{width}}" for column, width in zip(columns, (9, 11) * 4, strict=True)))
    for shape in SHAPES:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        for _ in range(arguments.rounds or (1 if arguments.quick else 3)):
            for name in CONTENDERS:
                command = [sys.executable, __file__, "--child", name, shape, "--threads", str(arguments.threads)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
        first = {name: values[0]["losses"][0] for name, values in found.items()}
        assert abs(first["ours"] - first["peft"]) < 1e-4, first
        median = {
            key: {name: statistics.median(one[key] for one in values) for name, values in found.items()}
            for key in ("cpu", "seconds", "peak", "above")
        }
        for name in CONTENDERS:
            ratios = {key: median[key]["ours"] / median[key][name] for key in median}
            print(
                f"{shape:<20}{name:<6}{1e3 * median['cpu'][name]:>9,.0f}{1 / ratios['cpu']:>11.2f}"
                f"{1e3 * median['seconds'][name]:>9,.0f}{1 / ratios['seconds']:>11.2f}"
                f"{median['peak'][name] / 1e6:>9,.0f}{ratios['peak']:>11.2f}"
                f"{median['above'][name] / 1e6:>9,.0f}{ratios['above']:>11.2f}"
            )
        result["speed_over_peft"][shape] = median["cpu"]["peft"] / median["cpu"]["ours"]
        result["peak_over_peft"][shape] = median["peak"]["ours"] / median["peak"]["peft"]
        result["above_over_peft"][shape] = median["above"]["ours"] / median["above"]["peft"]
        result["seconds"][shape], result["cpu"][shape] = median["seconds"], median["cpu"]
        result["peak_bytes"][shape] = median["peak"]
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
