"""Bugs in what happens between steps: resumes, saves, evaluations, steps that are skipped."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from moe_dist.checkpoint import state
from moe_dist.checkpoint.manager import Checkpoints
from moe_dist.checkpoint.state import LogicalState
from moe_dist.checkpoint.writing import Writer
from moe_dist.data.loader import GlobalLoader
from moe_dist.parallel.engines import eval_mode, fsdp
from moe_dist.parallel.engines.optimizer import LogicalOptimizer
from moe_dist.parallel.mesh import Mesh
from moe_dist.train import loop
from moe_dist.train.checkpointing import Persistence
from moe_dist.train.placing import Placing
from moe_dist.train.step import StepResult, TrainStep
from moe_dist.train.stopping import Stopping
from moe_dist.verify.injected_bugs.planting import Replace


def rate_late_after_a_resume(replace: Replace) -> None:
    """The schedule goes on from the step that was saved, not from the one after."""
    load, position = Stopping.load_state_dict, Stopping.position
    resumed: set[int] = set()

    def remember(self: Stopping, *arguments: Any) -> None:
        load(self, *arguments)
        resumed.add(id(self))

    def wrong(self: Stopping, number: int, samples: int) -> tuple[float, int | None]:
        now, end = position(self, number, samples)
        return (max(0.0, now - 1) if id(self) in resumed else now), end

    replace(Stopping, "load_state_dict", remember)
    replace(Stopping, "position", wrong)


def noise_starts_anew_after_a_resume(replace: Replace) -> None:
    """Dropout is seeded by the number of steps since the start, not by that of the run."""
    train = TrainStep.__call__
    first: dict[TrainStep, int] = {}

    def wrong(self: TrainStep, batches: list, number: int, rate: float) -> StepResult:
        return train(self, batches, number - first.setdefault(self, number), rate)

    replace(TrainStep, "__call__", wrong)


def tokens_forgotten_by_a_resume(replace: Replace) -> None:
    """The run has seen only the tokens since its last start."""
    go_on = Persistence._go_on_from

    def wrong(self: Persistence, found: Any, counters: Any, message: Any) -> Any:
        loaded = go_on(self, found, counters, message)
        counters.tokens = 0
        return loaded

    replace(Persistence, "_go_on_from", wrong)


def data_position_of_one_replica(replace: Replace) -> None:
    """Samples are counted on one replica, and taken for those of all."""
    load = GlobalLoader.load_state_dict

    def wrong(self: GlobalLoader, saved: dict[str, Any]) -> None:
        load(self, saved | {"samples_consumed": saved["samples_consumed"] // self._num_replicas})

    replace(GlobalLoader, "load_state_dict", wrong)


def selection_bias_not_restored(replace: Replace) -> None:
    """Only parameters and moments are read, no buffers."""
    read = Persistence._read

    def wrong(self: Persistence, *arguments: Any) -> None:
        read(self, *arguments)
        for layer in self.model.moe_layers():
            layer.router.bias_E.zero_()

    replace(Persistence, "_read", wrong)


def _not_saved(replace: Replace, *keys: str) -> None:
    """A resume starts with zeros in their place."""
    state_of = LogicalOptimizer.named_state

    def wrong(self: LogicalOptimizer) -> Any:
        return [item for item in state_of(self) if item[1] not in keys]

    replace(LogicalOptimizer, "named_state", wrong)


def first_moment_not_saved(replace: Replace) -> None:
    _not_saved(replace, "exp_avg")


def momentum_not_saved(replace: Replace) -> None:
    """Only AdamW's names are known."""
    _not_saved(replace, "momentum_buffer")


def factors_not_saved(replace: Replace) -> None:
    """Moments have the shape of their parameter, or are not taken for moments."""
    _not_saved(replace, "exp_avg_sq_row", "exp_avg_sq_col")


def masters_from_rounded_weights(replace: Replace) -> None:
    """After a resume the optimizer goes on from what the model computes with."""
    read = Persistence._read

    def wrong(self: Persistence, *arguments: Any) -> None:
        read(self, *arguments)
        for name, parameter in self.model.named_parameters():
            if name in self.model.masters:
                self.model.masters[name].copy_(parameter)

    replace(Persistence, "_read", wrong)


def annealing_starts_anew_after_a_resume(replace: Replace) -> None:
    """The routers' temperature follows the steps of this start."""
    train, set_temperature = TrainStep.__call__, TrainStep.set_temperature
    first: dict[TrainStep, int] = {}

    def remember(self: TrainStep, batches: list, number: int, rate: float) -> StepResult:
        first.setdefault(self, number)
        return train(self, batches, number, rate)

    def wrong(self: TrainStep, step: int) -> None:
        set_temperature(self, step - first.get(self, step))

    replace(TrainStep, "__call__", remember)
    replace(TrainStep, "set_temperature", wrong)


def data_position_read_ahead(replace: Replace) -> None:
    """Samples are counted when a worker begins to prepare them."""
    save = GlobalLoader.state_dict

    def wrong(self: GlobalLoader) -> dict[str, Any]:
        found = save(self)
        return found | {"samples_consumed": found["samples_consumed"] + len(self._ahead) * self.global_batch_size}

    replace(GlobalLoader, "state_dict", wrong)


def gate_and_up_swapped_in_a_moment(replace: Replace) -> None:
    """Reading into another layout takes the halves of `w_gate_up` in the other order, in one tensor of its state."""
    read = state.read_into

    def wrong(found: LogicalState, *arguments: Any) -> None:
        read(found, *arguments)
        for name, tensor in found.tensors.items():
            if name.endswith("w_gate_up.exp_avg_sq"):
                part = fsdp.local(tensor)
                part.copy_(torch.cat(part.chunk(2, dim=-1)[::-1], dim=-1))

    replace(state, "read_into", wrong)


def weights_left_whole_by_an_evaluation(replace: Replace) -> None:
    """FSDP has gathered them for a forward pass without a backward one; the save after it takes one rank's moments."""
    replace(fsdp, "reshard", lambda model: None)
    replace(eval_mode, "reshard", lambda model: None)

    def wrong(self: fsdp.FSDPEngine, every_name: bool = False) -> dict[str, Any]:
        return dict(self.model.named_parameters(remove_duplicate=not every_name))

    replace(fsdp.FSDPEngine, "held_parameters", wrong)


def stacks_cut_twice_over_experts(replace: Replace) -> None:
    """Stacks of vectors are cut along the experts by `edp` inside what `ep` has cut, and saved as if it were the other
    way round.
    """
    like = state.like_parameter

    def wrong(tensor: Tensor, parameter: Tensor, stacked: bool, mesh: Mesh) -> Tensor:
        if not (stacked and isinstance(parameter, DTensor) and parameter.placements[0] == Shard(0)):
            return like(tensor, parameter, stacked, mesh)
        assert mesh.sparse is not None
        return DTensor.from_local(fsdp.local(tensor), mesh.sparse["edp", "ep"], [Shard(0), Shard(0)])

    replace(fsdp, "stack_placement", lambda parameter, size: Shard(1) if parameter.ndim == 3 else None)
    replace(state, "like_parameter", wrong)


def skipped_step_moves_the_bias(replace: Replace) -> None:
    """Weights stay where they are when a loss is not a number, the selection bias does not."""
    train = TrainStep.__call__

    def wrong(self: TrainStep, *arguments: Any) -> StepResult:
        result = train(self, *arguments)
        if result.skipped:
            self.balancer.update_bias()
        return result

    replace(TrainStep, "__call__", wrong)


def experts_saved_where_they_are(replace: Replace) -> None:
    """Experts that have changed ranks are written under the numbers of those that were there at the start."""
    replace(Placing, "at_home", lambda self: nullcontext())


def save_behind_takes_the_next_weights(replace: Replace) -> None:
    """What is written behind training is copied when the writer gets to it, after one more step."""
    begin, start, settle, agree = Checkpoints.begin, Writer.start, Checkpoints.settle, loop.agree
    waiting: list[tuple[Checkpoints, LogicalState]] = []

    def late_begin(self: Checkpoints, number: int, found: LogicalState, *more: Any) -> None:
        with patch.object(Writer, "start", lambda writer: waiting.append((self, found))):
            begin(self, number, found, *more)

    def write() -> None:
        for checkpoints, found in waiting:
            assert checkpoints._plan is not None
            for shard in checkpoints._shards or ():
                for piece, view in zip(shard.pieces, shard.views, strict=True):
                    view.copy_(checkpoints._plan.tensor(found, piece))
            assert checkpoints._writer is not None
            start(checkpoints._writer)
        waiting.clear()

    def late_settle(self: Checkpoints, *arguments: Any) -> Any:
        write()
        return settle(self, *arguments)

    def late_agree(*arguments: Any) -> Any:
        write()
        return agree(*arguments)

    replace(Checkpoints, "begin", late_begin)
    replace(Checkpoints, "settle", late_settle)
    replace(loop, "agree", late_agree)
