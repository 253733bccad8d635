"""Pipeline parallelism: each rank holds some stages of the model, micro-batches pass through all of them.

Stages and schedules are those of `torch.distributed.pipelining`. A schedule only carries the numbers of the
micro-batches; each stage finds the rest (positions, documents, padding) by that number, so micro-batches may differ in
what they have. Losses are sums divided by the tokens of the global batch, so nothing is scaled by the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from moe_dist.config import Config
from moe_dist.models.precision import full_dtype
from moe_dist.models.transformer import Stage, Transformer
from moe_dist.parallel.layout import layers_by_pp_rank, pp_rank_of_stage
from moe_dist.parallel.mesh import Mesh

Inputs = dict[str, Any]
"""Arguments of `Stage.forward` for one micro-batch; `x` are its token ids."""

_SCHEDULES: dict[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleZBVZeroBubble,
    "dualpipe_v": ScheduleDualPipeV,
}


class PipelinePart(Stage):
    """Some layers of a model whose modules it shares, called with hidden states (the first part: with nothing of
    use) and the number of the micro-batch they belong to; without a number it is a plain `Stage`.
    """

    def __init__(self, model: Transformer, layers: range, device: str, bf16: bool, dtype: torch.dtype) -> None:
        num_layers = model.config.num_hidden_layers
        super().__init__(
            model.config,
            torch.nn.ModuleDict({str(layer): model.layers[str(layer)] for layer in layers}),
            model.embed_tokens if layers.start == 0 else None,
            model.norm if layers.stop == num_layers else None,
            model.lm_head if layers.stop == num_layers else None,
        )
        self.device_type, self.bf16, self.dtype = device, bf16, dtype
        self.micro_batches: list[Inputs] = []

    def forward(self, x: Tensor, *arguments: Any, number: Tensor | None = None, **options: Any) -> Tensor:
        if number is None:
            out = super().forward(x, *arguments, **options)
            return out if self.lm_head is not None else out.to(self.dtype)
        inputs = self.micro_batches[int(number)]
        if self.embed_tokens is None:
            inputs = {**inputs, "x": x}
        with torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.forward(**inputs)


class WatchedStage(PipelineStage):
    """A stage that tells when its last backward pass of a step begins."""

    before_last_backward: Callable[[], None] | None = None

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> None:
        if options.get("last_backward") and self.before_last_backward is not None:
            self.before_last_backward()
        super().backward_one_chunk(bwd_chunk_id, *arguments, **options)


class PipelinedTransformer(Transformer):
    """The stages of one rank. All ranks of a pipeline call `forward` and `run` together, with the same micro-batches.

    Build under `torch.device("meta")` as a `Transformer`. Only the rank of the last stage has logits and losses.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        group = mesh.group("pp")
        assert group is not None
        ranges = layers_by_pp_rank(config)[mesh.pp_rank]
        super().__init__(config.model, config.balance, [layer for layers in ranges for layer in layers])
        self.group, self.pp_rank, self.pp_ranks = group, mesh.pp_rank, pp_rank_of_stage(config)
        self.numbers = [stage for stage, pp_rank in enumerate(self.pp_ranks) if pp_rank == self.pp_rank]
        self.dtype = torch.bfloat16 if config.train.pure_bf16 else full_dtype()
        self.device, self.schedule_class = mesh.device, _SCHEDULES[config.parallel.schedule]
        # A plain list: the parts' modules are this model's, under their logical names.
        self._parts = [PipelinePart(self, layers, mesh.device.type, config.train.bf16, self.dtype) for layers in ranges]
        self._schedules: dict[tuple[int, ...], Any] = {}

    @property
    def stages(self) -> list[Stage]:
        return list(self._parts)

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """One micro-batch through all stages, forward only: logits (B, S, V), or what a `head_function` makes, on the
        rank of the last stage, an empty tensor elsewhere.
        """
        assert not torch.is_grad_enabled(), "training goes through `run`"
        ids, last = x, len(self.pp_ranks) - 1
        for stage, part in zip(self.numbers, self._parts, strict=True):
            if stage > 0 and self.pp_ranks[stage - 1] != self.pp_rank:
                x = torch.empty(*ids.shape, self.config.hidden_size, dtype=self.dtype, device=self.device)
                dist.recv(x, group=self.group, group_src=self.pp_ranks[stage - 1])
            x = part(x, *arguments, **options)
            if stage < last and self.pp_ranks[stage + 1] != self.pp_rank:
                dist.send(x.contiguous(), group=self.group, group_dst=self.pp_ranks[stage + 1])
        return x if last in self.numbers else x.new_empty(0)

    def run(self, micro_batches: list[Inputs], before_last_backward: Callable[[], None] | None = None) -> list[Tensor]:
        """All micro-batches forward and backward in the order of the schedule; their losses, none without the last
        stage. The `head_function` of each gives its loss, already divided by what the global batch has.

        `before_last_backward`: called when no other backward pass of this rank is left, where the schedule has such a
        moment: with one stage on a rank, whose backward passes are whole.
        """
        numbers = torch.arange(len(micro_batches))
        schedule = self._schedule(len(micro_batches), micro_batches[0]["x"].shape)
        losses: list[Tensor] = []
        for part in self._parts:
            part.micro_batches = micro_batches
        if len(self._parts) == 1:
            schedule._stage.before_last_backward = before_last_backward
        schedule.step(numbers, number=numbers, target=numbers, losses=losses, return_outputs=False)
        for part in self._parts:
            part.micro_batches = []
        return [loss.detach() for loss in losses]

    def _schedule(self, count: int, shape: torch.Size) -> Any:
        """The schedule for so many micro-batches of this shape."""
        key = (count, *shape)
        if key not in self._schedules:
            stages = [
                self._pipeline_stage(number, part, shape)
                for number, part in zip(self.numbers, self._parts, strict=True)
            ]
            several = len(self.pp_ranks) > self.group.size()
            # Losses are sums over tokens already divided by those of the global batch: the schedule must not scale.
            self._schedules[key] = self.schedule_class(
                stages if several else stages[0], count, loss_fn=_given_loss, scale_grads=False
            )
        return self._schedules[key]

    def _pipeline_stage(self, number: int, part: PipelinePart, shape: torch.Size) -> WatchedStage:
        # Shapes are given, or the first step would begin with a forward pass of its own, and the load be counted twice.
        with torch.device("meta"):
            first = torch.empty(1, dtype=torch.int64)
            hidden = torch.empty(*shape, self.config.hidden_size, dtype=self.dtype, requires_grad=True)
            loss = torch.empty((), dtype=full_dtype(), requires_grad=True)
        return WatchedStage(
            part,
            number,
            len(self.pp_ranks),
            self.device,
            input_args=first if number == 0 else hidden,
            output_args=loss if number == len(self.pp_ranks) - 1 else hidden,
            group=self.group,
        )


def _given_loss(loss: Tensor, number: Tensor) -> Tensor:
    """The last stage has computed it."""
    return loss
