"""Whole training steps on two ranks beside other trainers, on one host and over a cable of a limited rate.

    python tools/bench/train_step.py [--quick] [--json FILE] [--links loopback,1gbit,100mbit]

The same decoder everywhere, Qwen3-MoE of two layers, hidden size 512, 1,024 tokens a rank, AdamW, clipping:

- `ours`: experts over both ranks, the rest replicated; `ours_late`: the same, gradients summed after backward;
- `ddp`: `transformers` with its grouped matmuls in DistributedDataParallel, every expert on both ranks;
- `deepspeed`: `transformers` with the layer of `deepspeed.moe`, experts over both ranks; capacity 1.0: it drops tokens.

Contenders take turns, step by step; figures are medians of the slower rank. Before anything is timed, the first losses
of `ours` and of `ddp`, which start from the same weights, must agree.

Top-level keys of the JSON: `ratio_to_best_peer` (time of the fastest peer / ours: above 1, ours is faster) and
`milliseconds`, by link, shape and precision.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from links import LOOPBACK, is_possible, link, on_both_hosts

SHAPES = {"16 experts top-2": (16, 2, 1024), "64 experts top-8": (64, 8, 256)}
"""Experts, how many of them a token has, their width."""
SIZES = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 64}
SIZES |= {"num_key_value_heads": 4}
LENGTH, SEQUENCES, RATE = 512, 2, 1e-4
PEERS = ("ddp", "deepspeed")
Step = Callable[[Any], float]
"""Token ids (sequences, length) to the loss, after one update."""


def model_keys(shape: str) -> dict[str, int]:
    experts, top_k, width = SHAPES[shape]
    return SIZES | {"num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width}


def config_of(shape: str, bf16: bool, late: bool) -> Any:
    from moe_dist.config import load_mapping

    return load_mapping(
        {
            "model": model_keys(shape),
            "data": {"max_seq_length": LENGTH},
            "parallel": {"ep_size": 2, "overlap_grad_reduce": not late},
            "balance": {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "bias_update_rate": 0.0},
            "train": {"bf16": bf16},
        }
    )


def ours(shape: str, bf16: bool, late: bool) -> Step:
    import torch
    import torch.distributed as dist

    from moe_dist.data.batch import Batch
    from moe_dist.parallel.engines.registry import build_engine
    from moe_dist.parallel.layout import Layout
    from moe_dist.parallel.mesh import Mesh
    from moe_dist.train.balance import Balancer
    from moe_dist.train.build import build_model
    from moe_dist.train.step import TrainStep

    config = config_of(shape, bf16, late)
    mesh = Mesh.create(Layout(world_size=2, pp_size=1, ep_size=2), torch.device("cpu"))
    model = build_model(config, mesh)
    run = TrainStep(model, mesh, build_engine(model, config, mesh), Balancer(model, mesh, 0.0), config)

    def step(ids: torch.Tensor) -> float:
        tokens = SEQUENCES * LENGTH
        batch = Batch(ids[:, :-1], ids[:, 1:], None, None, tokens, tokens, [0, 1], dist.get_rank())
        return run([batch], 0, RATE).loss

    return step


def of_transformers(shape: str) -> Any:
    """Its model with the weights that ours begins with."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe_dist.models.huggingface import to_huggingface
    from moe_dist.parallel.mesh import Mesh
    from moe_dist.train.build import build_model

    config = config_of(shape, bf16=False, late=False)
    theirs = Qwen3MoeConfig(
        **model_keys(shape),
        max_position_embeddings=config.model.max_position_embeddings,
        rope_theta=config.model.rope_theta,
        rms_norm_eps=config.model.rms_norm_eps,
        norm_topk_prob=config.model.norm_topk_prob,
        tie_word_embeddings=config.model.tie_word_embeddings,
        experts_implementation="grouped_mm",
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = Qwen3MoeForCausalLM(theirs)
    weights = to_huggingface(build_model(config, Mesh.single()), config.model, fused=True)
    model.load_state_dict(weights)
    return model


def loss_of(model: Any, ids: Any, bf16: bool) -> Any:
    import torch
    import torch.nn.functional as F

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def ddp(shape: str, bf16: bool) -> Step:
    import torch

    model = torch.nn.parallel.DistributedDataParallel(of_transformers(shape), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step(ids: torch.Tensor) -> float:
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model, ids, bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def deepspeed(shape: str, bf16: bool) -> Step:
    import deepspeed as package
    import torch
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

    experts, top_k, width = SHAPES[shape]
    model = of_transformers(shape)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            expert = Qwen3MoeMLP(model.config, intermediate_size=width)
            self.moe = MoE(SIZES["hidden_size"], expert, experts, ep_size=2, k=top_k, capacity_factor=1.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.moe(x)[0]

    for layer in model.model.layers:
        layer.mlp = Layer()
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    settings = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
    }
    engine, *_ = package.initialize(model=model, optimizer=optimizer, config=settings)

    def step(ids: torch.Tensor) -> float:
        loss = loss_of(engine, ids, bf16)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


def measure(shape: str, bf16: bool, rounds: int, without: list[str]) -> dict[str, Any]:
    """In one rank: seconds of every step by contender."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Step]] = {
        "ours": lambda: ours(shape, bf16, late=False),
        "ours_late": lambda: ours(shape, bf16, late=True),
        "ddp": lambda: ddp(shape, bf16),
        "deepspeed": lambda: deepspeed(shape, bf16),
    }
    steps = {name: make() for name, make in makers.items() if name not in without}
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, SIZES["vocab_size"], (SEQUENCES, LENGTH + 1), generator=generator)
    times: dict[str, list[float]] = {name: [] for name in steps}
    first = {}
    for number in range(rounds + 1):
        for name, step in steps.items():
            dist.barrier()
            began = time.perf_counter()
            loss = step(ids)
            seconds = time.perf_counter() - began
            if number:
                times[name].append(seconds)
            else:
                whole = torch.tensor(loss) / 2  # theirs is of one rank, ours of both
                dist.all_reduce(whole)
                first[name] = float(whole)
    assert abs(first["ours"] - first["ddp"]) < (2e-2 if bf16 else 1e-4), first
    dist.destroy_process_group()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one precision, three rounds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--links", default="loopback,1gbit,100mbit")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--without", default="", help="contenders to leave out: ours_late, deepspeed")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    rounds = asked.rounds or (3 if asked.quick else 7)
    without = [name for name in asked.without.split(",") if name]
    if asked.rank:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(sys.stderr):
            times = measure(asked.shape, asked.precisions == "bf16", rounds, without)
        print(json.dumps(times))
        return
    ratio: dict[str, Any] = {}
    milliseconds: dict[str, Any] = {}
    for rate in asked.links.split(","):
        if rate != LOOPBACK and not is_possible():
            print(f"{rate}: not measured: hosts need root, ip and tc")
            continue
        for precision in ["fp32"] if asked.quick else asked.precisions.split(","):
            for shape in SHAPES:
                arguments = ["--shape", shape, "--precisions", precision, "--rounds", str(rounds)]
                with link(rate) as place:
                    both = on_both_hosts(place, __file__, [*arguments, "--without", asked.without])
                medians = {
                    name: statistics.median(max(pair) for pair in zip(*(rank[name] for rank in both), strict=True))
                    for name in both[0]
                }
                best = min(medians[name] for name in PEERS if name in medians) / medians["ours"]
                ratio.setdefault(rate, {}).setdefault(precision, {})[shape] = round(best, 3)
                rounded = {name: round(1e3 * seconds, 1) for name, seconds in medians.items()}
                milliseconds.setdefault(rate, {}).setdefault(precision, {})[shape] = rounded
                told = "  ".join(f"{name} {ms:8.1f} ({ms / rounded['ours']:.2f})" for name, ms in rounded.items())
                print(f"{rate:9}{precision:5}{shape:18}{told}   best peer / ours {best:.2f}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"ratio_to_best_peer": ratio, "milliseconds": milliseconds}, indent=1))


if __name__ == "__main__":
    main()
