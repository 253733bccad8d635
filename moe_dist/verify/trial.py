"""A few training steps on global batches that are hard on a trainer, told in logical tensors that layouts share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_dist.config import Config
from moe_dist.data.batch import Batch
from moe_dist.parallel.gradients import Gradients
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.balance import Balancer
from moe_dist.train.build import build_gradients, build_model, build_optimizer
from moe_dist.train.step import TrainStep
from moe_dist.verify.plants import planted

ROWS = 2
TOLERANCE = 1e-5
BF16_TOLERANCE = {"losses": 0.05, "norms": 0.25, "gradients": 0.5}
"""For matmuls in bfloat16 against float32, of the tensor that differs most: two digits, and another expert here and
there. What follows an update is told, not judged. A bug of a factor 2 is above it, a small one is not."""
COMPARED = ("initial", "losses", "gradients", "norms", "weights", "biases")
"""What `deviations` compares: the first step's gradients, all steps' losses and norms, the weights at the end."""


def micro_batches(config: Config, count: int, step: int = 0) -> list[Batch]:
    """`count` micro-batches of one global batch: uneven valid labels, packed documents, padding, one all padding."""
    vocabulary, length = config.model.vocab_size, config.data.max_seq_length
    batches = []
    for index in range(count):
        generator = torch.Generator().manual_seed(1000 * step + index)
        ids = torch.randint(0, vocabulary, (ROWS, length), generator=generator)
        labels = torch.randint(0, vocabulary, (ROWS, length), generator=generator)
        # A different share of valid labels in each micro-batch: 1, 1/2, 1/3, ...
        labels[torch.rand(ROWS, length, generator=generator) > 1.0 / (index + 1)] = -100
        documents = torch.zeros(ROWS, length, dtype=torch.int32)
        documents[:, length // 3 :] = 1
        if index % 3 == 1:
            documents[1, length // 2 :] = -1
        if index == 2:
            documents[:] = -1
        labels[documents < 0] = -100
        positions = torch.arange(length).expand(ROWS, length).clone()
        positions[:, length // 3 :] -= length // 3
        num_valid, num_tokens = int((labels >= 0).sum()), int((documents >= 0).sum())
        batches.append(Batch(ids, labels, positions, documents, num_valid, num_tokens, [index], index))
    return batches


class Trial:
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

    def share(self, batches: list[Batch]) -> list[Batch]:
        """This rank's micro-batches: number a * dp + r belongs to replica r, as in `GlobalLoader`."""
        return batches[self.mesh.dp_rank :: self.mesh.layout.dp_size]

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logical tensors of the whole model, in host memory: this rank's copies, and of its `ep` and `pp` peers what
        it holds no copy of.
        """
        gathered = {name: self._whole(name, tensor.detach()).cpu() for name, tensor in tensors.items()}
        group = self.mesh.group("ep")
        single = {name: tensor for name, tensor in gathered.items() if ".experts.experts." in name}
        if group is not None and single:  # experts with names of their own live on one rank of the group each
            parts: list[dict[str, Tensor]] = [{} for _ in range(group.size())]
            dist.all_gather_object(parts, single, group=group)
            for part in parts:
                gathered |= part
        return dict(sorted(self._of_all_stages(gathered).items()))

    def _of_all_stages(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of all ranks of a pipeline; no name may be on two of them."""
        group = self.mesh.group("pp")
        if group is None:
            return tensors
        parts: list[dict[str, Tensor]] = [{} for _ in range(group.size())]
        dist.all_gather_object(parts, tensors, group=group)
        gathered = {name: tensor for part in parts for name, tensor in part.items()}
        assert len(gathered) == sum(map(len, parts))
        return gathered

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        group = self.mesh.group("ep")
        if group is None or ".experts.experts." in name or name not in self.model.expert_parameter_names():
            return tensor.clone()
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.whole(dict(self.model.named_parameters()))

    @property
    def biases(self) -> dict[str, Tensor]:
        return self._of_all_stages({str(moe.layer): moe.router.bias_E.cpu().clone() for moe in self.model.moe_layers()})

    @contextmanager
    def unclipped(self) -> Iterator[dict[str, Tensor]]:
        """Filled, by a step inside, with the gradients as they are before clipping."""
        seen: dict[str, Tensor] = {}
        norm = self.gradients.norm

        def keep() -> Tensor:
            seen.update(self.whole(self.gradients.logical))
            return norm()

        self.gradients.norm = keep  # type: ignore[method-assign]
        try:
            yield seen
        finally:
            self.gradients.norm = norm  # type: ignore[method-assign]


@dataclass
class Told:
    """What a trial tells. `gradients` are those of the first step, before clipping."""

    initial: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)


def run_trial(
    config: Config, mesh: Mesh, num_micro_batches: int, steps: int = 3, rate: float = 1e-2, plant: str | None = None
) -> Told:
    """Train on this rank's share of fixed global batches; every rank is told the same if replicas agree."""
    with planted(plant) if plant else nullcontext():
        trial = Trial(config, mesh)
        told = Told(initial=trial.weights)
        for step in range(steps):
            with trial.unclipped() if step == 0 else nullcontext(told.gradients) as told.gradients:
                result = trial.step(trial.share(micro_batches(config, num_micro_batches, step)), step, rate)
            told.losses.append(result.loss)
            told.norms.append(result.grad_norm)
            trial.balancer.clear()
        told.weights, told.biases = trial.weights, trial.biases
    return told


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest relative difference (L2) of any tensor; infinite when names or shapes differ."""
    if found.keys() != wanted.keys():
        return float("inf")
    worst = 0.0
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            return float("inf")
        relative = float((found[name].cpu() - tensor.cpu()).norm() / tensor.norm().cpu().clamp(min=1e-12))
        worst = max(worst, relative) if relative == relative else float("inf")
    return worst


def deviations(found: Told, wanted: Told) -> dict[str, float]:
    """Largest relative differences by what was compared; initial weights and biases must be equal exactly."""
    worst = {
        name: difference(getattr(found, name), getattr(wanted, name))
        for name in ("initial", "gradients", "weights", "biases")
    }
    for name in ("losses", "norms"):
        pairs = zip(getattr(found, name), getattr(wanted, name), strict=True)
        worst[name] = max(abs(a - b) / max(abs(b), 1e-12) if a == a else float("inf") for a, b in pairs)
    return worst


def passes(worst: dict[str, float], bf16: bool = False) -> bool:
    """Whether a layout computes what one process computes, in float32 or (`bf16`) nearly."""
    tolerances = BF16_TOLERANCE if bf16 else dict.fromkeys(COMPARED, TOLERANCE)
    return worst["initial"] == 0.0 and all(worst[name] < tolerance for name, tolerance in tolerances.items())
