"""When experts change ranks, and by what: smoothed counts of the rows that each expert gets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.config import Config
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.dispatch_choice import ranks_on_a_host
from moe_dist.parallel.engines.base import Engine
from moe_dist.parallel.engines.expert_moves import ExpertPlacement
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.placement import Cost, better_slots, tax
from moe_dist.train.balance import Balancer
from moe_dist.train.callbacks import Callback, RunState

DECAY = 0.5
"""What is left at a decision of the counts that the one before it knew."""


class Placing(Callback):
    """Moves experts every `parallel.placement_interval` steps (`parallel.expert_placement`); nothing where that is off,
    or where every rank has all experts.

    Every rank counts, decides and moves alike, from the same sums.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        model: Transformer,
        engine: Engine,
        balancer: Balancer,
        say: Callable[[str], None],
    ) -> None:
        """`say` tells people on rank 0 (collective)."""
        self.mesh, self.balancer, self.say = mesh, balancer, say
        self.interval = config.parallel.placement_interval
        self.placement: ExpertPlacement | None = None
        self._restored: dict[int, list[int]] = {}
        if config.parallel.expert_placement == "off" or mesh.group("ep") is None:
            return
        self.layers, num_experts = config.model.moe_layers, config.model.num_experts
        self.placement = ExpertPlacement(model, engine, mesh, num_experts, self.layers)
        self._counts = torch.zeros(len(self.layers), num_experts, dtype=torch.int64, device=mesh.device)
        """Of this rank's tokens since the last decision."""
        self._steps = 0
        self._smoothed = torch.zeros(len(self.layers), num_experts, dtype=torch.float64)
        self._smoothed_steps = 0.0
        self.cost = cost_of(config, mesh, self.placement.expert_bytes)

    @property
    def slots(self) -> Mapping[int, Sequence[int]]:
        """By layer, where the experts are; empty where they cannot move."""
        return {} if self.placement is None else self.placement.slots

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Inside, every expert is where it would be without placement (collective)."""
        if self.placement is None:
            yield
            return
        with self.placement.at_home():
            yield

    def on_run_begin(self, run: RunState) -> None:
        """Experts go where they were when the checkpoint was written."""
        if self.placement is not None:
            self.placement.move(self._restored)

    def on_step_end(self, run: RunState) -> None:
        """Count, and decide when it is time."""
        if self.placement is None:
            return
        for layer, facts in self.balancer.facts.items():
            self._counts[self.layers.index(layer)] += facts.pairs_E
        self._steps += 1
        if run.step % self.interval == 0:
            self._decide(run.step)

    def _decide(self, step: int) -> None:
        assert self.placement is not None
        self._smoothed = DECAY * self._smoothed + self._pending()
        self._smoothed_steps = DECAY * self._smoothed_steps + self._steps
        self._counts.zero_()
        self._steps = 0
        loads, before = self._smoothed / self._smoothed_steps, dict(self.placement.slots)
        ep_size, began = self.mesh.layout.ep_size, time.perf_counter()
        after = {
            layer: better_slots(load_E, before[layer], ep_size, self.cost)
            for layer, load_E in zip(self.layers, loads, strict=True)
        }
        moved = {layer for layer in self.layers if after[layer] != before[layer]}
        if not moved:
            return
        sent = self.mesh.sum_over("world", torch.tensor([self.placement.move(after)], device=self.mesh.device))
        then, now = (
            fmean(tax(load_E, slots[layer], ep_size) for layer, load_E in zip(self.layers, loads, strict=True))
            for slots in (before, after)
        )
        number = sum(old != new for layer in moved for old, new in zip(before[layer], after[layer], strict=True))
        self.say(
            f"step {step}: {number} experts of {len(moved)} layers have changed ranks ({int(sent) / 1e6:.1f} MB, "
            f"{time.perf_counter() - began:.2f} s); rows of the busiest rank / mean: {then:.3f} before, {now:.3f} after"
        )

    def _pending(self) -> Tensor:
        """Pairs of all ranks since the last decision, (L, E) float64 on the host (collective)."""
        return self.mesh.sum_over("world", self._counts.clone()).cpu().double()

    def state_dict(self) -> dict[str, Any] | None:
        """For a checkpoint (collective); None where experts cannot move."""
        if self.placement is None:
            return None
        return {
            "ep_size": self.mesh.layout.ep_size,
            "slots": {str(layer): slots for layer, slots in self.placement.slots.items()},
            "smoothed": self._smoothed.tolist(),
            "smoothed_steps": self._smoothed_steps,
            "counts": self._pending().long().tolist(),
            "steps": self._steps,
        }

    def load_state_dict(self, saved: dict[str, Any] | None) -> None:
        """Go on with these counts, and once the run begins with this map, where the expert group has as many ranks.

        Raises CheckpointError for what is no map.
        """
        if self.placement is None or saved is None:
            return
        slots = {layer: list(saved["slots"][str(layer)]) for layer in self.layers}
        for layer, home in self.placement.home.items():
            if sorted(slots[layer]) != home:
                raise CheckpointError(f"placement: the slots of layer {layer} do not hold every expert once")
        self._restored = slots if saved["ep_size"] == self.mesh.layout.ep_size else {}
        counts, smoothed = torch.tensor(saved["counts"]), torch.tensor(saved["smoothed"], dtype=torch.float64)
        if not counts.shape == smoothed.shape == self._smoothed.shape:
            raise CheckpointError(f"placement: counts of {list(counts.shape)}, needed {list(self._smoothed.shape)}")
        self._smoothed, self._smoothed_steps = smoothed, float(saved["smoothed_steps"])
        self._counts.zero_()
        if self.mesh.rank == 0:  # the sum over ranks is what it was
            self._counts += counts.to(self.mesh.device)
        self._steps = int(saved["steps"])


def cost_of(config: Config, mesh: Mesh, expert_bytes: int) -> Cost:
    """What a move costs, and what it spares, in this run."""
    row = config.model.hidden_size * (2 if config.train.bf16 or config.train.pure_bf16 else 4)
    there = ranks_on_a_host(config, None if mesh.hosts is None else mesh.hosts.within.size())
    # To the expert and home, forward and backward.
    return Cost(4.0 * row, float(expert_bytes), config.parallel.placement_interval, there)
