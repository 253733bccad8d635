"""Experts change ranks: their weights, optimizer state and whatever else belongs to each, and the tokens after them.

Between steps only. What is in a slot moves, names and shapes do not: to all that knows nothing of placement, slot p
of rank r holds expert r * e + p. That is true again `at_home`, where checkpoints are written and read.

Shape suffixes: T tokens, K top-k, D hidden, E experts, e of them on a rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_dist.config import ConfigError
from moe_dist.models.experts import ExpertList, Experts
from moe_dist.models.moe import Dispatcher, MoE
from moe_dist.models.routing import Routing
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.engines.base import Engine
from moe_dist.parallel.engines.optimizer import local
from moe_dist.parallel.expert_copies import ExpertCopies
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.placement import Exchange
from moe_dist.parallel.row_exchange import start_rows

Slots = Mapping[int, Sequence[int]]
"""By layer: which expert is in each slot (`placement.py`)."""
SlotTensors = list[Tensor]
"""One tensor of each slot of this rank, in order: of an expert a weight, a moment, ..."""


class PlacedDispatcher:
    """Any dispatcher, for experts that may be elsewhere than in the order of their ids. Routers, and all that is
    counted, know experts by their ids; only the way of a token is by slots."""

    def __init__(self, inner: Dispatcher, num_experts: int, device: torch.device) -> None:
        self.inner = inner
        self.slot_of_expert = torch.arange(num_experts + 1, device=device)
        """(E + 1,) int64: the last is E, for no expert."""

    def begin_dispatch(self, x_TD: Tensor, routing: Routing, num_pieces: int = 1) -> list[Any]:
        slots_TK = self.slot_of_expert[routing.expert_ids_TK]
        return self.inner.begin_dispatch(x_TD, replace(routing, expert_ids_TK=slots_TK), num_pieces)

    def end_dispatch(self, departed: Any) -> tuple[Tensor, Any]:
        return self.inner.end_dispatch(departed)

    def begin_combine(self, rows_RD: Tensor, plan: Any) -> Any:
        return self.inner.begin_combine(rows_RD, plan)

    def end_combine(self, returning: Any) -> Tensor:
        return self.inner.end_combine(returning)

    def set_slots(self, slots: Sequence[int]) -> None:
        """From now on expert `slots[s]` is in slot s."""
        found = torch.tensor([*slots, len(slots)])
        self.slot_of_expert.copy_(found.argsort())


class ExpertPlacement:
    """Where the experts of all layers are; every rank has one, and calls its methods at the same time.

    Raises ConfigError for experts whose state cannot be moved one by one.
    """

    def __init__(self, model: Transformer, engine: Engine, mesh: Mesh, num_experts: int, layers: Sequence[int]) -> None:
        """`layers`: all that have experts, also those of other pipeline stages."""
        self.model, self.engine, self.mesh = model, engine, mesh
        self.home = {layer: list(range(num_experts)) for layer in layers}
        self.slots = dict(self.home)
        self._layers = {moe.layer: moe for moe in model.moe_layers()}
        self._dispatchers: dict[int, PlacedDispatcher] = {}
        for layer, moe in self._layers.items():
            self._dispatchers[layer] = PlacedDispatcher(moe.dispatcher, num_experts, mesh.device)
            moe.reach_experts_by(self._dispatchers[layer])
        _refuse_cut_stacks(model, engine)
        mine = [sum(tensors[0].nbytes for tensors in layer) for layer in self._state().values()]
        self.expert_bytes = max(mesh.from_all(max(mine, default=0)))
        """Of one expert on a rank: weights, moments, masters, adapters."""

    def move(self, slots: Slots) -> int:
        """Bring experts into these slots (collective); returns the bytes that this rank has sent to others."""
        moving = {layer: list(after) for layer, after in slots.items() if list(after) != self.slots[layer]}
        here = {layer: after for layer, after in moving.items() if layer in self._layers}
        state = self._state() if here else {}
        sent = 0
        for layer, after in here.items():
            exchange = Exchange.between(self.slots[layer], after, self.mesh.ep_rank, self.mesh.layout.ep_size)
            sent += sum(self._exchange(tensors, exchange) for tensors in state[layer])
            self._dispatchers[layer].set_slots(after)
            if isinstance(copies := self._layers[layer].copies, ExpertCopies):
                copies.set_slots(after)
            experts = self._layers[layer].experts
            experts.held = after[experts.first_expert : experts.first_expert + experts.num_local]
        self.slots |= moving
        return sent

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Inside, experts are in the order of their ids; afterwards where they were (collective)."""
        before = {layer: list(slots) for layer, slots in self.slots.items()}
        self.move(self.home)
        yield
        self.move(before)

    @torch.no_grad()
    def _exchange(self, tensors: SlotTensors, exchange: Exchange) -> int:
        """As bytes: whatever the dtype, nothing is rounded."""
        group, like = self.mesh.group("ep"), tensors[0]
        assert group is not None
        if not like.numel():
            return 0
        rows = like.new_empty(len(exchange.leaving), like.numel())
        for row, slot in zip(rows, exchange.leaving, strict=True):
            row.copy_(tensors[slot].flatten())
        rows = rows.view(torch.uint8).to(self.mesh.device)
        received = rows.new_empty(len(exchange.arriving), like.nbytes)
        for work in start_rows(received, rows, exchange.receive_splits, exchange.send_splits, group):
            work.wait()
        for row, slot in zip(received, exchange.arriving, strict=True):
            tensors[slot].copy_(row.view(like.dtype).view(like.shape))
        return like.nbytes * (len(rows) - exchange.send_splits[group.rank()])

    def _state(self) -> dict[int, list[SlotTensors]]:
        """All that belongs to single experts, by layer: held parameters, masters, buffers, optimizer state."""
        held = self.engine.held_parameters()
        tensors: list[tuple[str, list[Tensor], bool]] = []
        tensors += [(name, [parameter.detach()], False) for name, parameter in held.items()]
        tensors += [(f"{name}.master", [master], False) for name, master in self.model.masters.items()]
        for name, key, parts, split in self.engine.named_state():
            if key != "step":  # the same for all experts
                tensors.append((f"{name}.{key}", parts, split))
        found: dict[int, list[SlotTensors]] = {}
        for layer, prefix, experts in self._prefixes():
            mine = [(name.removeprefix(prefix), *rest) for name, *rest in tensors if name.startswith(prefix)]
            if isinstance(experts, Experts):
                found[layer] = _of_stack(mine)
            else:
                mine += [(name, [buffer], False) for name, buffer in experts.named_buffers()]
                found[layer] = _of_list(mine)
        return found

    def _prefixes(self) -> Iterator[tuple[int, str, Experts | ExpertList]]:
        for name, module in self.model.named_modules():
            if isinstance(module, MoE):
                yield module.layer, f"{name}.experts.", module.experts


def _of_stack(tensors: Sequence[Any]) -> list[SlotTensors]:
    """Row s of every tensor is of slot s; with `split` there is a tensor for each."""
    return [
        [local(part) for part in parts] if split else list(local(parts[0]).unbind(0)) for _, parts, split in tensors
    ]


def _of_list(tensors: Sequence[Any]) -> list[SlotTensors]:
    """Names begin with the number of the slot's own expert: `experts.5.layers.0.weight`."""
    found: dict[str, SlotTensors] = defaultdict(list)
    for name, parts, _ in tensors:
        _, _, of_expert = name.split(".", 2)
        found[of_expert].append(local(parts[0]))
    return list(found.values())


def _refuse_cut_stacks(model: Transformer, engine: Engine) -> None:
    """Where FSDP cuts a stack between experts, a rank has other experts than its peers have parts of."""
    held = engine.held_parameters()
    for name in sorted(model.stacked_names()):
        placements = getattr(held[name], "placements", ())
        if any(placement.is_shard(0) for placement in placements):
            raise ConfigError(
                f"parallel.expert_placement=balanced: {name} has no dimension that its replicas divide, so "
                "parallel.zero_stage cuts it between experts, which then cannot move one by one; set it to off, or "
                "parallel.zero_stage=0"
            )
