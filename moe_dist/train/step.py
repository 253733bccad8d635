"""One optimizer step: micro-batches, one reduction of gradients, one norm, one decision, one update."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.data.batch import Batch
from moe_dist.models.context import RoutingContext
from moe_dist.models.precision import full
from moe_dist.models.transformer import HeadFunction, Transformer
from moe_dist.parallel.engines.base import Engine
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.status import Status
from moe_dist.train.balance import Balancer
from moe_dist.train.dpo import Dpo, Rewards, rewards_of
from moe_dist.train.loss import head_cross_entropy
from moe_dist.train.passes import model_inputs

if TYPE_CHECKING:
    from moe_dist.parallel.pipeline import PipelinedTransformer


@dataclass(frozen=True)
class StepResult:
    """`loss` nats per valid token of the global batch, `grad_norm` before clipping, both the same on every rank.

    `num_tokens`, `num_labels`: tokens and valid labels of the global batch; without a label `loss` is 0. `skipped`: a
    loss or gradient was not finite and nothing was updated. Of preferences `loss` is per pair, `num_labels` counts
    pairs, and there are `rewards`.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    num_labels: int
    skipped: bool
    rewards: Rewards | None = None


class TrainStep:
    """Runs one global batch through the model and updates it; every rank calls it with its own micro-batches."""

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        engine: Engine,
        balancer: Balancer,
        config: Config,
        status: Status | None = None,
    ) -> None:
        self.status = status or Status()
        self.model, self.mesh, self.engine = model, mesh, engine
        self.balancer, self.config = balancer, config
        self.dpo = Dpo(model, config, mesh.device) if config.learns_preferences else None
        self._micro_batch = ""

    def where(self) -> str:
        """What this rank is doing, for its other threads: `step 1: micro-batch 3 of 8`."""
        status = self.status.position
        return f"step {status.step}: {self._micro_batch or status.phase}"

    def __call__(self, batches: list[Batch], step: int, rate: float) -> StepResult:
        """`step`: number of this step from 0, `rate`: its learning rate."""
        self.model.train()
        self.balancer.clear()
        self.set_temperature(step)
        self.status.at("agreeing on the next step")
        counts = self._count_tokens(batches)
        batches = [batch.to(self.mesh.device, non_blocking=True) for batch in batches]
        self.engine.zero_grad()
        self.status.at("computing")
        if self.dpo is not None:
            batches = self._with_reference(batches, self.dpo)
        loss, *rewards = self.accumulate(batches, counts, step)
        self.status.at("reducing gradients")
        self.engine.reduce()
        norm = self.engine.norm()
        # All are sums over all ranks, so every rank takes the same branch below.
        values = torch.stack((loss, norm, *counts.double(), *rewards)).tolist()
        loss_value, norm_value, num_labels, num_tokens, *sums = values
        finite = bool(torch.isfinite(torch.tensor((loss_value, norm_value))).all())
        if finite:
            self.status.at("updating weights")
            if self.config.train.max_grad_norm:
                self.engine.clip(norm, self.config.train.max_grad_norm)
            self.engine.step(rate)
            self.status.at("agreeing on the next step")
            self.balancer.update_bias()
        self.set_temperature(step + 1)
        found = rewards_of(sums, num_labels) if sums else None
        return StepResult(loss_value, norm_value, int(num_tokens), int(num_labels), not finite, found)

    def start_at(self, step: int) -> None:
        """Before the first step of a start, `step` were done: for what looks at the model until then."""
        self.set_temperature(step)

    def set_temperature(self, step: int) -> None:
        """The routers' temperature after `step` steps, for training and for whatever looks at the model then."""
        temperature = self.config.balance.temperature_at(step)
        for moe in self.model.moe_layers():
            moe.router.set_temperature(temperature)

    def accumulate(self, batches: list[Batch], counts: Tensor, step: int) -> Tensor:
        """Gradients of this rank's micro-batches; returns the loss of the global batch, (1,) float64.

        Of preferences what `Dpo.take_sums` gives is behind it, (4,).

        `counts`: valid labels (of preferences, pairs) and tokens of the global batch.
        """
        scale = 1.0 / full(counts[0].clamp(min=1))
        token_scale = 1.0 / full(counts[1].clamp(min=1))
        context = RoutingContext(token_scale=token_scale, reduce_load=self._sum_load)
        if self._needs_load_first(batches):
            with torch.no_grad():
                for number, batch in enumerate(batches):
                    self._micro_batch = f"routing micro-batch {number + 1} of {len(batches)}"
                    self._forward(batch, context, step, _no_loss)
            context = replace(context, global_load=self.balancer.take_global_load())

        losses_of = [self._loss_of(batch, scale) for batch in batches]
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if self.mesh.layout.pp_size > 1:
            inputs = [self._inputs(batch, context, step, loss) for batch, loss in zip(batches, losses_of, strict=True)]
            model = cast("PipelinedTransformer", self.model)
            for loss in model.run(inputs, self.engine.before_last_backward):
                total += loss
        else:
            for number, batch in enumerate(batches):
                self.status.at("computing")
                self._micro_batch = f"micro-batch {number + 1} of {len(batches)}"
                self.engine.before_backward(is_last=number == len(batches) - 1)
                loss = self._forward(batch, context, step, losses_of[number])
                self.engine.backward(loss)
                total += loss.detach()
        self._micro_batch = ""
        self.status.at("reducing gradients")
        sums = total[None] if self.dpo is None else torch.cat((total[None], self.dpo.take_sums()))
        return self.mesh.sum_over("world", sums)  # only last stages have added to it

    def _with_reference(self, batches: list[Batch], dpo: Dpo) -> list[Batch]:
        """What the reference says of all micro-batches, before the first of them trains."""
        found = []
        for number, batch in enumerate(batches):
            self._micro_batch = f"the reference of micro-batch {number + 1} of {len(batches)}"
            found.append(dpo.with_reference(batch))
        return found

    def _loss_of(self, batch: Batch, scale: Tensor) -> HeadFunction:
        if self.dpo is not None:
            return self.dpo.loss_of(batch, scale)
        train, labels = self.config.train, batch.labels

        def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
            options: dict[str, Any] = {"scale": scale, "chunk_tokens": train.loss_chunk_tokens}
            return head_cross_entropy(hidden, weight, labels, train.label_smoothing_factor, **options)

        return loss_of

    def _forward(self, batch: Batch, context: RoutingContext, step: int, head_function: HeadFunction) -> Tensor:
        with torch.autocast(self.mesh.device.type, dtype=torch.bfloat16, enabled=self.config.train.bf16):
            return self.model(**self._inputs(batch, context, step, head_function))

    def _inputs(self, batch: Batch, context: RoutingContext, step: int, head_function: HeadFunction) -> dict[str, Any]:
        inputs = model_inputs(batch, context, document_mask=self.config.data.document_mask)
        # Noise (dropout, jitter) depends on the step and the micro-batch's index in it, never on the rank.
        noise = noise_seed(self.config.train.seed, step, batch.index)
        return inputs | {"noise": noise, "head_function": head_function}

    def _sum_load(self, layer: int, counts: Tensor) -> Tensor:
        """Over all token holders; a wait for others, in the middle of computing."""
        before = self.status.inside("reducing gradients", layer)
        summed = self.mesh.sum_over("dp", counts)
        self.status.back(before)
        return summed

    def _needs_load_first(self, batches: list[Batch]) -> bool:
        """The global-batch load is known only after all micro-batches; with one, a reduction on the way will do."""
        balance = self.config.balance
        return len(batches) > 1 and balance.aux_loss_scope == "global_batch" and balance.aux_loss_coef > 0

    def _count_tokens(self, batches: list[Batch]) -> Tensor:
        """[valid labels, of preferences pairs; tokens] of the global batch, int64 on the device."""
        local = [sum(batch.num_terms for batch in batches), sum(batch.num_tokens for batch in batches)]
        return self.mesh.sum_over("dp", torch.tensor(local, dtype=torch.int64, device=self.mesh.device))


def _no_loss(hidden: Tensor, weight: Tensor) -> Tensor:
    """Of a pass that only counts what routers choose."""
    return hidden.new_zeros(())


def noise_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of everything random inside one micro-batch."""
    digest = hashlib.sha256(f"noise/{seed}/{step}/{micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
