"""Load facts of all layers, summed on the device step by step and over ranks once per logging interval; numbers of
every rank on the way.

Shape suffixes: L mixture-of-experts layers, l the layers given to one call, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moe_dist.models.auxiliary import ROUTER_SUMS, LoadFacts
from moe_dist.monitor.expert_stats import layer_record
from moe_dist.monitor.records import LayerRecord

Slots = Mapping[int, Sequence[int]]
"""By layer: the experts in the order in which the ranks of their group hold them, equally many each; a layer that is
not there: in the order of their ids."""


class Collector:
    """Sums LoadFacts over the steps of an interval, then over ranks.

    Counts are summed in int64 on each rank. For the reduction they travel as float64 beside the float sums,
    in one tensor: integers up to 2^53 (9e15 pairs of one expert in one interval, over all ranks) are exact in
    float64 and so are their sums, in any order; a NaN among the float sums stays in its own field.
    """

    def __init__(
        self,
        moe_layer_numbers: Sequence[int],
        num_experts: int,
        top_k: int,
        device: torch.device | str,
        reduce: Callable[[Tensor], Tensor] = lambda packed: packed,
        *,
        ep_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        num_domains: int = 0,
        slots: Callable[[], Slots] = dict,
        copied: Callable[[], Slots] = dict,
    ) -> None:
        """`moe_layer_numbers`: global numbers of ALL expert layers, the same on every rank. `ep_size` ranks share them.

        `reduce` sums a 1-dim float64 tensor, in place or not, over the ranks that hold other tokens or other
        layers; a layer that is not on a rank counts as zero there. `num_domains` sources are counted apart. `slots`
        and `copied` experts, by layer: of the moment.
        """
        self.moe_layer_numbers = list(moe_layer_numbers)
        self.num_experts, self.top_k, self.device = num_experts, top_k, torch.device(device)
        self._reduce = reduce
        self.ep_size, self.rank, self.world_size = ep_size, rank, world_size
        self._slots, self._copied = slots, copied
        num_layers = len(self.moe_layer_numbers)
        self._columns = {"pairs_E": num_experts, "dropped_E": num_experts, "tokens": 1, "fallbacks": 1}
        """Field of LoadFacts -> its columns of `_counts`, in this order."""
        self._counts = torch.zeros(num_layers, sum(self._columns.values()), dtype=torch.int64, device=self.device)
        self._sums = torch.zeros(num_layers, len(ROUTER_SUMS), dtype=torch.float64, device=self.device)
        self._domains = torch.zeros(num_layers, num_domains, num_experts, dtype=torch.int64, device=self.device)
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def add(self, facts_by_layer: Mapping[int, LoadFacts]) -> None:
        """Add the facts of one step, by global layer number; no host synchronisation.

        The facts are read and left as they are: whoever owns them zeroes them before the next step.
        Raises ValueError for a layer that is not among `moe_layer_numbers`.
        """
        if not facts_by_layer:
            return
        facts = list(facts_by_layer.values())
        rows_l = self._rows_of(tuple(facts_by_layer))
        columns = [torch.stack([getattr(one, name) for one in facts]).view(len(facts), -1) for name in self._columns]
        counts = torch.cat(columns, dim=1)
        self._counts.index_add_(0, rows_l, counts)
        self._sums.index_add_(0, rows_l, torch.stack([one.sums for one in facts]).to(self._sums.dtype))
        by_domain = [one.pairs_NE for one in facts if one.pairs_NE is not None]
        if by_domain:
            self._domains.index_add_(0, rows_l, torch.stack(by_domain))

    def take(self) -> list[LayerRecord]:
        """Records of all layers since the last take: one reduction, one transfer to the host, then reset.

        A collective: every rank of the reduction calls it at the same step. Empty, and no reduction, when the
        model has no expert layer.
        """
        return self.take_all(())[0] if self.moe_layer_numbers else []

    def take_all(self, row: Sequence[float]) -> tuple[list[LayerRecord], list[list[float]]]:
        """As `take`, with `row`, numbers of this rank, in the same reduction; the rows of all ranks come out."""
        wide = torch.float64
        packed = torch.cat((self._counts.to(wide), self._sums, self._domains.flatten(1).to(wide)), dim=1)
        # One row a rank, zero but for its own: the sum is what an all-gather would give.
        rows = torch.zeros(self.world_size, len(row), dtype=torch.float64)
        rows[self.rank] = torch.tensor(row, dtype=torch.float64)
        host = self._reduce(torch.cat((packed.flatten(), rows.flatten().to(self.device)))).cpu()
        gathered = host[packed.numel() :].view(rows.shape).tolist()
        host = host[: packed.numel()].view(packed.shape)
        self._counts.zero_()
        self._sums.zero_()
        self._domains.zero_()
        widths = (self._counts.shape[1], self._sums.shape[1], self._domains.shape[1] * self.num_experts)
        counts, sums, domains = host.split(widths, dim=1)
        by_domain = domains.to(torch.int64).view(self._domains.shape).numpy() if widths[2] else None
        slots, copied = self._slots(), self._copied()
        count = {name: part.numpy() for name, part in self._by_name(counts.to(torch.int64)).items()}
        layers = [
            layer_record(
                layer,
                count["pairs_E"][index],
                int(count["dropped_E"][index].sum()),
                int(count["tokens"][index, 0]),
                dict(zip(ROUTER_SUMS, total, strict=True)),
                self.top_k,
                self.ep_size,
                None if by_domain is None else by_domain[index],
                count["dropped_E"][index],
                int(count["fallbacks"][index, 0]),
                slots.get(layer),
                copied.get(layer, ()),
            )
            for index, (layer, total) in enumerate(zip(self.moe_layer_numbers, sums.tolist(), strict=True))
        ]
        return layers, gathered

    def pending(self) -> dict[int, list[int]]:
        """Pairs since the last take, by layer and expert, of all ranks (collective); they stay where they are."""
        if not self.moe_layer_numbers:
            return {}
        mine = self._by_name(self._counts)["pairs_E"].to(torch.float64).flatten()
        pairs = self._reduce(mine).to(torch.int64).view(len(self.moe_layer_numbers), -1).tolist()
        return dict(zip(self.moe_layer_numbers, pairs, strict=True))

    def _by_name(self, counts: Tensor) -> dict[str, Tensor]:
        """The columns of counts, (L, ...) each, by field of LoadFacts."""
        return dict(zip(self._columns, counts.split([*self._columns.values()], dim=1), strict=True))

    def _rows_of(self, layers: tuple[int, ...]) -> Tensor:
        """Rows of the layers, (l,) int64 on the device; kept, a copy each step would be a wait."""
        if layers not in self._rows:
            for layer in layers:
                if layer not in self.moe_layer_numbers:
                    raise ValueError(f"layer {layer}: not one of the expert layers {self.moe_layer_numbers}")
            rows = [self.moe_layer_numbers.index(layer) for layer in layers]
            self._rows[layers] = torch.tensor(rows, device=self.device)
        return self._rows[layers]
