"""The gradient of an embedding, summed over replicas by the rows that their tokens have touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Started(NamedTuple):
    """Messages under way, and what is to be done when they are there."""

    works: list[dist.Work]
    finish: Callable[[], None]


class RowSum:
    """Sum over `group` of a matrix (V, D) of which each rank has filled some rows: these travel, with their numbers.

    Rows are added in the order of ranks, each number of `reduce_dtype`: the same bits everywhere. `always`: also where
    ranks have filled so much that the whole matrix would be less to send.
    """

    def __init__(self, matrix_VD: Tensor, group: ProcessGroup, reduce_dtype: torch.dtype, always: bool) -> None:
        self.matrix_VD, self.group, self.reduce_dtype, self.always = matrix_VD, group, reduce_dtype, always

    def start(self) -> Started | None:
        """None where the whole matrix is better summed. Every rank gives the same answer."""
        # A norm knows rows with NaN too, and needs no second matrix as a comparison would.
        ids = torch.linalg.vector_norm(self.matrix_VD, ord=float("inf"), dim=1).nonzero().flatten()
        everyone = ids.new_empty(self.group.size())
        dist.all_gather_into_tensor(everyone, ids.new_tensor([len(ids)]), group=self.group)
        counts = everyone.tolist()
        most = max(counts)
        # Of n ranks each gets n - 1 times so many rows, and the whole matrix in pieces of a sum 2 (n - 1) / n times:
        # less than half of that pays for taking the rows out and adding them up.
        if most * len(counts) > len(self.matrix_VD) and not self.always:
            return None
        sent_ids = torch.zeros(most, dtype=ids.dtype, device=ids.device)
        sent_ids[: len(ids)] = ids
        sent = self.matrix_VD[sent_ids].to(self.reduce_dtype)
        all_ids = sent_ids.new_empty(most * len(counts))
        rows = sent.new_empty(most * len(counts), sent.shape[1])
        works = []
        for everyones, mine in ((all_ids, sent_ids), (rows, sent)) if most else ():
            work = dist.all_gather_into_tensor(everyones, mine, group=self.group, async_op=True)
            assert work is not None
            works.append(work)

        def finish() -> None:
            self.matrix_VD[ids] = 0.0
            for rank, count in enumerate(counts):
                its = slice(rank * most, rank * most + count)  # past them it has sent what is not to be added
                self.matrix_VD.index_add_(0, all_ids[its], rows[its].to(self.matrix_VD.dtype))

        return Started(works, finish)
