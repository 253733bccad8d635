"""Keys and values of earlier tokens in blocks, as virtual memory has pages (Kwon et al. 2023, PagedAttention).

A sequence owns a list of blocks, its table; sequences of one prefix share its full blocks. Block 0 belongs to nobody:
padding is written there, and tables are filled up with it.

Shape suffixes: B rows, S new tokens of a row, L places of a table, H heads, C head width, N slots (tokens) of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 16
"""Tokens of a block."""
_FIRST_BLOCKS = 16


class BlockPool:
    """Blocks of all layers; memory grows as they are taken, up to `max_blocks`."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values (N, H, C) by layer number."""
        self._users = [1]  # of every block; nobody can give back block 0
        self._free: list[int] = []

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return len(self._users) - 1 - len(self._free)

    def take(self, count: int) -> list[int]:
        """So many blocks, neighbours where it can be."""
        taken = sorted(self._free)[:count]
        self._free = sorted(set(self._free) - set(taken))
        fresh = range(len(self._users), len(self._users) + count - len(taken))
        assert fresh.stop - 1 <= self.max_blocks, "more blocks than were reserved"
        self._users += [0] * len(fresh)
        taken += fresh
        for block in taken:
            self._users[block] = 1
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        """One user less of each."""
        for block in blocks:
            self._users[block] -= 1
            if not self._users[block]:
                self._free.append(block)

    def fork(self, table: Sequence[int], length: int) -> list[int]:
        """A second table with the same first `length` tokens: full blocks are shared, the last one is copied."""
        shared = list(table[: length // BLOCK])
        for block in shared:
            self._users[block] += 1
        rest = table[len(shared) :]
        copies = self.take(len(rest))
        if length % BLOCK:
            old, new = rest[0] * BLOCK, copies[0] * BLOCK
            for number, pair in list(self.layers.items()):
                for states in self._with_room(number, *pair):
                    states[new : new + BLOCK] = states[old : old + BLOCK]
        return shared + copies

    def layer(self, number: int, k_BHSC: Tensor, v_BHSC: Tensor) -> tuple[Tensor, Tensor]:
        """Memory of a layer, of the kind of these states, for all blocks that have been taken."""
        if number not in self.layers:
            # Zeros: what no query looks at is multiplied by zero, which NaN would survive.
            shapes = [(states.shape[1], states.shape[3]) for states in (k_BHSC, v_BHSC)]
            self.layers[number] = (k_BHSC.new_zeros(0, *shapes[0]), v_BHSC.new_zeros(0, *shapes[1]))
        return self._with_room(number, *self.layers[number])

    def _with_room(self, number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        wanted = len(self._users) * BLOCK
        if len(keys) < wanted:
            num_slots = max(min(2 * wanted, (self.max_blocks + 1) * BLOCK), wanted, _FIRST_BLOCKS * BLOCK)
            more = [states.new_zeros(num_slots - len(states), *states.shape[1:]) for states in (keys, values)]
            self.layers[number] = (torch.cat((keys, more[0])), torch.cat((values, more[1])))
        return self.layers[number]


class StepCache:
    """The rows of one forward pass: row b adds `counts[b]` tokens at `starts[b]` to the sequence of `tables[b]`.

    Rows are filled up to the longest, S. `positions` (B, S) int64 and `valid` (B, S) bool say where tokens are.
    """

    def __init__(
        self,
        pool: BlockPool,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
    ) -> None:
        self.pool = pool
        num_blocks = max(-(-(start + count) // BLOCK) for start, count in zip(starts, counts, strict=True))
        rows = [[*table[:num_blocks], *[0] * (num_blocks - len(table))] for table in tables]
        self.table = torch.tensor(rows, device=device)
        steps = torch.arange(max(counts), device=device)
        self.valid = steps < torch.tensor(counts, device=device)[:, None]
        self.positions = (torch.tensor(starts, device=device)[:, None] + steps).where(self.valid, 0)
        blocks = self.table.gather(1, self.positions // BLOCK)
        self.slots = (blocks * BLOCK + self.positions % BLOCK).where(self.valid, 0).flatten()
        first = rows[0][0]
        is_run = len(rows) == 1 and rows[0] == list(range(first, first + num_blocks))
        self.run = slice(first * BLOCK, (first + num_blocks) * BLOCK) if is_run else None
        """Where one row's blocks are neighbours: its slots, which need no gathering."""
        self._masks: dict[int | None, Tensor] = {}

    def of_layer(self, layer: int) -> LayerOfStep:
        return LayerOfStep(self, layer)

    def mask(self, window: int | None) -> Tensor:
        if window not in self._masks:
            keys = torch.arange(self.table.shape[1] * BLOCK, device=self.table.device)
            queries = self.positions[:, None, :, None]
            seen = keys <= queries
            self._masks[window] = seen if window is None else seen & (keys > queries - window)
        return self._masks[window]


class LayerOfStep:
    """`models.cache.LayerCache` of a `StepCache`."""

    def __init__(self, step: StepCache, layer: int) -> None:
        self.step, self.layer = step, layer

    def extend(self, k_BHSC: Tensor, v_BHSC: Tensor) -> tuple[Tensor, Tensor]:
        step = self.step
        keys, values = step.pool.layer(self.layer, k_BHSC, v_BHSC)
        found = []
        for memory_NHC, new_BHSC in ((keys, k_BHSC), (values, v_BHSC)):
            memory_NHC.index_copy_(0, step.slots, new_BHSC.transpose(1, 2).flatten(0, 1).to(memory_NHC.dtype))
            if step.run is not None:
                whole = memory_NHC[step.run][None]
            else:
                blocks = memory_NHC.unflatten(0, (-1, BLOCK)).index_select(0, step.table.flatten())
                whole = blocks.view(len(step.table), -1, *memory_NHC.shape[1:])
            found.append(whole.transpose(1, 2).to(new_BHSC.dtype))
        return found[0], found[1]
