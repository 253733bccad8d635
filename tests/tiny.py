"""A model small enough to train in milliseconds, and the mesh of the ranks a test runs on."""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist

from moe_dist.config import Config, load_mapping
from moe_dist.data.batch import Batch
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.mesh import Mesh
from moe_dist.verify import trial

VOCAB, LENGTH = 64, 16


def tiny_config(*overrides: str) -> Config:
    """Three layers (the middle one dense), 8 experts top-2, grouped-query attention, shared expert."""
    tree = {
        "model": {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [1],
            "shared_expert_intermediate_size": 16,
            "initializer_range": 0.2,  # far from balanced: gradients of every loss are large
        },
        "data": {"max_seq_length": LENGTH},
        # AdamW divides by the gradient's own size: entries near zero would show rounding as a full step.
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_epsilon": 1e-6},
        "balance": {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01, "bias_update_rate": 0.01},
        "train": {"max_grad_norm": 0.5},
        "monitor": {"tensorboard": False, "progress": "none"},
    }
    return load_mapping(tree, overrides, notice=lambda text: None)


def micro_batches(count: int, step: int = 0) -> list[Batch]:
    """Hard micro-batches for the tiny model."""
    return trial.micro_batches(tiny_config(), count, step)


@cache
def mesh_of(ep_size: int, shard_size: int | None = None, pp_size: int = 1) -> Mesh:
    """This rank's mesh over all started ranks, or a single process. Kept: every process group has threads."""
    if not dist.is_initialized():
        return Mesh.single()
    return Mesh.create(Layout(dist.get_world_size(), pp_size, ep_size), torch.device("cpu"), shard_size)
