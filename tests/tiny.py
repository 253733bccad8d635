"""A model small enough to train in milliseconds, and global batches that are hard on a trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_dist.config import Config
from moe_dist.config_loading import load_mapping
from moe_dist.data.batch import Batch
from moe_dist.parallel.gradients import Gradients
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.balance import Balancer
from moe_dist.train.build import build_gradients, build_model, build_optimizer
from moe_dist.train.step import TrainStep

VOCAB, LENGTH, ROWS = 64, 16, 2


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
    """`count` micro-batches of one global batch: uneven valid labels, packed documents, padding, one all padding."""
    batches = []
    for index in range(count):
        generator = torch.Generator().manual_seed(1000 * step + index)
        ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
        labels = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
        # A different share of valid labels in each micro-batch: 1, 1/2, 1/3, ...
        labels[torch.rand(ROWS, LENGTH, generator=generator) > 1.0 / (index + 1)] = -100
        documents = torch.zeros(ROWS, LENGTH, dtype=torch.int32)
        documents[:, LENGTH // 3 :] = 1
        if index % 3 == 1:
            documents[1, LENGTH // 2 :] = -1
        if index == 2:
            documents[:] = -1
        labels[documents < 0] = -100
        positions = torch.arange(LENGTH).expand(ROWS, LENGTH).clone()
        positions[:, LENGTH // 3 :] -= LENGTH // 3
        num_valid, num_tokens = int((labels >= 0).sum()), int((documents >= 0).sum())
        batches.append(Batch(ids, labels, positions, documents, num_valid, num_tokens, [index], index))
    return batches


class Parts:
    """Everything a training step needs, built for one rank."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.model = build_model(config, mesh)
        self.gradients = build_gradients(self.model, config, mesh)
        if isinstance(self.gradients, Gradients):
            self.gradients.bucket_bytes = 1000  # many buckets, so their order matters
        self.optimizer: Any = build_optimizer(self.model, self.gradients, config)
        self.balancer = Balancer(self.model, mesh, config.balance.bias_update_rate)
        self.step = TrainStep(self.model, mesh, self.gradients, self.optimizer, self.balancer, config)

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logical tensors: stacked experts gathered over `ep`."""
        return {name: self._whole(name, tensor.detach()) for name, tensor in tensors.items()}

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        group = self.mesh.group("ep")
        if group is None or name not in self.model.expert_parameter_names():
            return tensor.clone()
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.whole(dict(self.model.named_parameters()))

    @property
    def biases(self) -> dict[str, Tensor]:
        return {str(moe.layer): moe.router.bias_E.clone() for moe in self.model.moe_layers()}


def mesh_of(ep_size: int, shard_size: int | None = None) -> Mesh:
    """This rank's mesh over all started ranks, or a single process."""
    if not dist.is_initialized():
        return Mesh.single()
    return Mesh.create(Layout(dist.get_world_size(), 1, ep_size), torch.device("cpu"), shard_size)


def train_and_tell(
    overrides: tuple[str, ...], ep_size: int, num_micro_batches: int, steps: int = 3, plant: str | None = None
) -> dict[str, Any]:
    """Train on this rank's share of fixed global batches; returns logical tensors, on every rank.

    Micro-batch number a * dp + r of each step belongs to rank r, as in `GlobalLoader`.
    """
    import plants

    config = tiny_config(f"parallel.ep_size={ep_size}", *overrides)
    mesh = mesh_of(ep_size, config.parallel.shard_size)
    with plants.planted(plant) if plant else nullcontext():
        parts = Parts(config, mesh)
        told: dict[str, Any] = {"initial": parts.weights, "losses": [], "norms": []}
        for step in range(steps):
            mine = micro_batches(num_micro_batches, step)[mesh.dp_rank :: mesh.layout.dp_size]
            with unclipped(parts) as seen:
                result = parts.step(mine, step, 1e-2)
            told.setdefault("gradients", seen["gradients"])
            told["losses"].append(result.loss)
            told["norms"].append(result.grad_norm)
            told["pairs"] = parts.balancer.global_pairs() if parts.balancer.layers else None
            parts.balancer.clear()
        told |= {"weights": parts.weights, "biases": parts.biases}
    return told


@contextmanager
def unclipped(parts: Parts) -> Iterator[dict[str, Any]]:
    """Keep the gradients as they are before clipping."""
    seen: dict[str, Any] = {}
    clip = parts.gradients.clip

    def keep(norm: Tensor, max_norm: float) -> None:
        seen["gradients"] = parts.whole(parts.gradients.logical)
        clip(norm, max_norm)

    parts.gradients.clip = keep  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        parts.gradients.clip = clip  # type: ignore[method-assign]


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest relative difference (L2) of any tensor."""
    assert found.keys() == wanted.keys()
    worst = 0.0
    for name, tensor in wanted.items():
        worst = max(worst, float((found[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)))
    return worst
