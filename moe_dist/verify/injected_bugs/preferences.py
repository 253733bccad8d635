"""Bugs of preference tuning: the reference, what counts of an answer, and the mean over pairs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from moe_dist.train import dpo
from moe_dist.train.loss import IGNORE
from moe_dist.train.step import TrainStep
from moe_dist.verify.injected_bugs.planting import Replace


def reference_with_adapters_on(replace: Replace) -> None:
    """The reference is the model that is trained: the margin is nothing, whatever has been learned."""
    replace(dpo, "adapters_off", lambda model: nullcontext())


def prompt_tokens_counted(replace: Replace) -> None:
    """The log-probability of an answer has that of its prompt in it."""
    right = dpo.head_log_probs

    def wrong(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return right(hidden, weight, labels.masked_fill(labels == IGNORE, 0), **options)

    replace(dpo, "head_log_probs", wrong)


def preferences_weighed_by_rank(replace: Replace) -> None:
    """A mean of means: a rank with few pairs counts as much as one with many."""
    count = TrainStep._count_tokens

    def wrong(self: TrainStep, batches: list) -> Tensor:
        counts = count(self, batches)
        counts[0] = torch.tensor(sum(batch.num_terms for batch in batches) * self.mesh.layout.dp_size)
        return counts

    replace(TrainStep, "_count_tokens", wrong)
