"""One optimizer step: micro-batches, one reduction of gradients, one norm, one decision, one update."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.data.batch import Batch
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.deepspeed import DeepSpeedEngine
from moe_dist.parallel.gradients import Gradients
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.sharding import ShardedGradients
from moe_dist.train.balance import Balancer
from moe_dist.train.loss import cross_entropy_sum
from moe_dist.train.optimizer import Optimizer


@dataclass(frozen=True)
class StepResult:
    """`loss` nats per valid token of the global batch, `grad_norm` before clipping, both the same on every rank.

    `num_tokens`: tokens of the global batch. `skipped`: a loss or gradient was not finite and nothing was updated.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    skipped: bool


class TrainStep:
    """Runs one global batch through the model and updates it; every rank calls it with its own micro-batches."""

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        gradients: Gradients | ShardedGradients | DeepSpeedEngine,
        optimizer: Optimizer | DeepSpeedEngine,
        balancer: Balancer,
        config: Config,
    ) -> None:
        self.model, self.mesh, self.gradients = model, mesh, gradients
        self.optimizer, self.balancer, self.config = optimizer, balancer, config

    def __call__(self, batches: list[Batch], step: int, rate: float) -> StepResult:
        """`step`: number of this step from 0, `rate`: its learning rate."""
        self.model.train()
        counts = self._count_tokens(batches)
        batches = [batch.to(self.mesh.device, non_blocking=True) for batch in batches]
        self.gradients.zero()
        loss = self.accumulate(batches, counts, step)
        self.gradients.reduce()
        norm = self.gradients.norm()
        # Both numbers are sums over all ranks, so every rank takes the same branch below.
        loss_value, norm_value, num_tokens = torch.stack((loss, norm, counts[1].double())).tolist()
        finite = bool(torch.isfinite(torch.tensor((loss_value, norm_value))).all())
        if finite:
            if self.config.train.max_grad_norm:
                self.gradients.clip(norm, self.config.train.max_grad_norm)
            self.optimizer.set_learning_rate(rate)
            self.optimizer.step()
            self.balancer.update_bias()
        return StepResult(loss_value, norm_value, int(num_tokens), skipped=not finite)

    def accumulate(self, batches: list[Batch], counts: Tensor, step: int) -> Tensor:
        """Gradients of this rank's micro-batches; returns the loss of the global batch, 0-dim float64.

        `counts`: valid labels and tokens of the global batch.
        """
        scale = 1.0 / counts[0].clamp(min=1).float()
        token_scale = 1.0 / counts[1].clamp(min=1).float()
        if self._needs_load_first(batches):
            with torch.no_grad():
                for batch in batches:
                    self._forward(batch, token_scale, step)
            self.balancer.fix_global_load()
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for number, batch in enumerate(batches, 1):
            self.gradients.before_backward(is_last=number == len(batches))
            logits = self._forward(batch, token_scale, step)
            loss = cross_entropy_sum(logits, batch.labels, self.config.train.label_smoothing_factor) * scale
            self.gradients.backward(loss)
            total += loss.detach()
        self.balancer.release_global_load()
        return self.mesh.sum_over("dp", total)

    def _forward(self, batch: Batch, token_scale: Tensor, step: int) -> Tensor:
        # Noise (dropout, jitter) depends on the step and the micro-batch's place in it, never on the rank.
        torch.manual_seed(noise_seed(self.config.train.seed, step, batch.index))
        with torch.autocast(self.mesh.device.type, dtype=torch.bfloat16, enabled=self.config.train.bf16):
            return forward(self.model, batch, token_scale, document_mask=self.config.data.document_mask)

    def _needs_load_first(self, batches: list[Batch]) -> bool:
        """The global-batch load is known only after all micro-batches; with one, a reduction on the way will do."""
        balance = self.config.balance
        return len(batches) > 1 and balance.aux_loss_scope == "global_batch" and balance.aux_loss_coef > 0

    def _count_tokens(self, batches: list[Batch]) -> Tensor:
        """[valid labels, tokens] of the global batch, int64 on the device."""
        local = [sum(batch.num_valid for batch in batches), sum(batch.num_tokens for batch in batches)]
        return self.mesh.sum_over("dp", torch.tensor(local, dtype=torch.int64, device=self.mesh.device))


def forward(
    model: Transformer, batch: Batch, token_scale: float | Tensor = 1.0, *, document_mask: bool = True
) -> Tensor:
    """Logits (B, S, V) of one micro-batch."""
    documents = batch.document_ids
    valid = documents >= 0 if documents is not None and batch.num_tokens < documents.numel() else None
    if not document_mask:
        return model(batch.input_ids, valid=valid, token_scale=token_scale)
    return model(batch.input_ids, batch.position_ids, documents, valid, token_scale)


def noise_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of everything random inside one micro-batch."""
    digest = hashlib.sha256(f"noise/{seed}/{step}/{micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
