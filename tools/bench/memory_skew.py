"""Peak of a rank whose experts get four times their share: child processes of `memory.py`.

Four ranks share 16 experts, a token has two of them, one layer. Even: every expert is chosen equally often; skewed:
every token of every rank goes to two of rank 0's four. A step of training as it is, but that the router's choice is
written over; what rank 0 holds, and its allocator's peak above that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

RANKS, TOKENS, LENGTH, EXPERTS = 4, 2048, 512, 16
MODEL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 1024,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "router": "fixed",
}
CASES = {"even": (EXPERTS, 2.0), "skewed": (EXPERTS // RANKS, 2.0), "skewed, one chunk": (EXPERTS // RANKS, 0.0)}
"""How many experts are chosen, all on the first ranks, and `train.expert_chunk_factor`."""


def rank_peaks() -> dict[str, dict[str, int]]:
    """On one of the ranks, by case: bytes held between steps, and the peak of a step above them."""
    import torch
    import torch.distributed as dist

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from moe_dist.config import load_mapping
    from moe_dist.models.router import Router, Routing, register_router
    from moe_dist.parallel.layout import Layout
    from moe_dist.parallel.mesh import Mesh
    from moe_dist.parallel.state_bytes import state_bytes
    from tools.bench.allocator import measured_step

    class Fixed(Router):
        num_chosen = EXPERTS

        def forward(self, x_TD: torch.Tensor) -> Routing:
            routing = super().forward(x_TD)
            pairs = torch.arange(routing.expert_ids_TK.numel()).view_as(routing.expert_ids_TK)
            return replace(routing, expert_ids_TK=pairs % Fixed.num_chosen)

    register_router("fixed")(Fixed)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    layout = Layout(RANKS, 1, RANKS)
    mesh = Mesh.create(layout, torch.device("cpu"))
    found = {}
    for name, (Fixed.num_chosen, factor) in CASES.items():
        train = {"per_device_train_batch_size": TOKENS // LENGTH, "expert_chunk_factor": factor}
        keys = {"model": MODEL, "data": {"max_seq_length": LENGTH}, "parallel": {"ep_size": RANKS}, "train": train}
        config = load_mapping(keys)
        found[name] = {"held": state_bytes(config, layout)[0].total, "step": measured_step(config, mesh)[1]}
    dist.destroy_process_group()
    return found


def measure() -> dict[str, dict[str, int]]:
    """`rank_peaks` of rank 0, in processes of their own."""
    surroundings = {**os.environ, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    surroundings |= {"MASTER_PORT": str(21000 + os.getpid() % 20000), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__], env={**surroundings, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    said = [rank.communicate(timeout=600)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank has failed")
    found: dict[str, dict[str, int]] = json.loads(said[0].splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(rank_peaks()))
