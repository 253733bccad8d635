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
        each = list(ids.new_empty(self.group.size(), 1))
        dist.all_gather(each, ids.new_tensor([len(ids)]), group=self.group)
        counts = torch.cat(each).tolist()
        most = max(counts)
        # Of n ranks each gets n - 1 times so many rows, and the whole matrix in pieces of a sum 2 (n - 1) / n times:
        # less than half of that pays for taking the rows out and adding them up.
        if most * len(counts) > len(self.matrix_VD) and not self.always:
            return None
        sent_ids = torch.zeros(most, dtype=ids.dtype, device=ids.device)
        sent_ids[: len(ids)] = ids
        sent = self.matrix_VD[sent_ids].to(self.reduce_dtype)
        all_ids = list(sent_ids.new_empty(len(counts), most))
        rows = list(sent.new_empty(len(counts), *sent.shape))
        works = []
        for everyones, mine in ((all_ids, sent_ids), (rows, sent)) if most else ():
            work = dist.all_gather(everyones, mine, group=self.group, async_op=True)
            assert work is not None
            works.append(work)

        def finish() -> None:
            self.matrix_VD[ids] = 0.0
            for its_ids, its_rows, count in zip(all_ids, rows, counts, strict=True):
                added = its_rows[:count].to(self.matrix_VD.dtype)  # past them it has sent what is not to be added
                self.matrix_VD.index_add_(0, its_ids[:count], added)

        return Started(works, finish)
