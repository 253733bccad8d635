"""When experts change ranks or get copies, and by what: smoothed counts of the rows that each expert gets."""

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
from moe_dist.parallel.expert_copies import ExpertCopies
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.placement import Cost, better_slots, hottest, tax
from moe_dist.train.balance import Balancer
from moe_dist.train.callbacks import Callback, RunState

DECAY = 0.5
"""What is left at a decision of the counts that the one before it knew."""


class Placing(Callback):
    """Every `parallel.placement_interval` steps moves experts (`parallel.expert_placement`) and chooses those that all
    ranks compute (`parallel.replicated_experts`); nothing where both are off, or where every rank has all experts.

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
        self.copied: Mapping[int, Sequence[int]] = {}
        """By layer, experts that every rank computes for its own tokens."""
        self.layers, self.num_experts = config.model.moe_layers, config.model.num_experts
        self.num_copies = 0 if mesh.group("ep") is None else config.parallel.replicated_experts
        if mesh.group("ep") is not None and config.parallel.expert_placement != "off":
            self.placement = ExpertPlacement(model, engine, mesh, self.num_experts, self.layers)
        self.decides = self.placement is not None or self.num_copies > 0
        if not self.decides:
            return
        self._copies = {moe.layer: moe.copies for moe in model.moe_layers() if isinstance(moe.copies, ExpertCopies)}
        self._counts = torch.zeros(len(self.layers), self.num_experts, dtype=torch.int64, device=mesh.device)
        """Of this rank's tokens since the last decision."""
        self._steps = 0
        self._smoothed = torch.zeros(len(self.layers), self.num_experts, dtype=torch.float64)
        self._smoothed_steps = 0.0
        self.cost = cost_of(config, mesh, 0 if self.placement is None else self.placement.expert_bytes)

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

    def copy(self, experts: Mapping[int, Sequence[int]]) -> None:
        """From now on these are computed by every rank, by layer."""
        self.copied = experts
        for layer, copies in self._copies.items():
            copies.set_experts(experts.get(layer, ()))

    def on_run_begin(self, run: RunState) -> None:
        """Experts go where they were when the checkpoint was written."""
        if self.placement is not None:
            self.placement.move(self._restored)
        if self.num_copies:
            self.copy(self._hottest())  # the same as from the last decision on: counts have changed only there

    def on_step_end(self, run: RunState) -> None:
        """Count, and decide when it is time."""
        if not self.decides:
            return
        for layer, facts in self.balancer.facts.items():
            self._counts[self.layers.index(layer)] += facts.pairs_E
        self._steps += 1
        if run.step % self.interval == 0:
            self._decide(run.step)

    def _decide(self, step: int) -> None:
        self._smoothed = DECAY * self._smoothed + self._pending()
        self._smoothed_steps = DECAY * self._smoothed_steps + self._steps
        self._counts.zero_()
        self._steps = 0
        loads = dict(zip(self.layers, self._smoothed / self._smoothed_steps, strict=True))
        before = self._tax(loads)
        if self.num_copies:
            copied, copied_before = self._hottest(), self.copied
            self.copy(copied)
            if copied != copied_before:
                self._say_copies(step, loads, before)
                before = self._tax(loads)
        if self.placement is not None:
            self._move(self.placement, step, loads, before)

    def _move(self, placement: ExpertPlacement, step: int, loads: Mapping[int, Tensor], tax_before: float) -> None:
        before, ep_size, began = dict(placement.slots), self.mesh.layout.ep_size, time.perf_counter()
        after = {}
        for layer, load_E in loads.items():
            travels_E = load_E.clone()
            travels_E[list(self.copied.get(layer, ()))] = 0.0
            after[layer] = better_slots(travels_E, before[layer], ep_size, self.cost)
        moved = {layer for layer in self.layers if after[layer] != before[layer]}
        if not moved:
            return
        sent = self.mesh.sum_over("world", torch.tensor([placement.move(after)], device=self.mesh.device))
        number = sum(old != new for layer in moved for old, new in zip(before[layer], after[layer], strict=True))
        self.say(
            f"step {step}: {number} experts of {len(moved)} layers have changed ranks ({int(sent) / 1e6:.1f} MB, "
            f"{time.perf_counter() - began:.2f} s); rows of the busiest rank / mean: {tax_before:.3f} before, "
            f"{self._tax(loads):.3f} after"
        )

    def _say_copies(self, step: int, loads: Mapping[int, Tensor], tax_before: float) -> None:
        stay = sum(float(load_E[list(self.copied[layer])].sum()) for layer, load_E in loads.items())
        number = sum(map(len, self.copied.values()))
        self.say(
            f"step {step}: every rank computes {number} hot experts of {len(self.layers)} layers for its own tokens, "
            f"{stay / sum(float(load_E.sum()) for load_E in loads.values()):.0%} of all rows; rows of the busiest rank "
            f"/ mean: {tax_before:.3f} before, {self._tax(loads):.3f} after"
        )

    def _hottest(self) -> dict[int, list[int]]:
        """By layer; empty before anything has been counted."""
        return {
            layer: hottest(load_E, self.num_copies) for layer, load_E in zip(self.layers, self._smoothed, strict=True)
        }

    def _tax(self, loads: Mapping[int, Tensor]) -> float:
        """Mean of layers, as experts are now."""
        ep_size = self.mesh.layout.ep_size
        return fmean(
            tax(load_E, self.slots.get(layer, range(len(load_E))), ep_size, self.copied.get(layer, ()))
            for layer, load_E in loads.items()
        )

    def _pending(self) -> Tensor:
        """Pairs of all ranks since the last decision, (L, E) float64 on the host (collective)."""
        return self.mesh.sum_over("world", self._counts.clone()).cpu().double()

    def state_dict(self) -> dict[str, Any] | None:
        """For a checkpoint (collective); None where nothing is decided. Which experts have copies follows from the
        counts."""
        if not self.decides:
            return None
        return {
            "ep_size": self.mesh.layout.ep_size,
            "slots": {str(layer): slots for layer, slots in self.slots.items()},
            "smoothed": self._smoothed.tolist(),
            "smoothed_steps": self._smoothed_steps,
            "counts": self._pending().long().tolist(),
            "steps": self._steps,
        }

    def load_state_dict(self, saved: dict[str, Any] | None) -> None:
        """Go on with these counts, and once the run begins with this map, where the expert group has as many ranks.

        Raises CheckpointError for what is no map.
        """
        if not self.decides or saved is None:
            return
        if self.placement is not None and saved["slots"]:
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
