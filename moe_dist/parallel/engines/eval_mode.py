"""A model that is only looked at: what evaluation leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_dist.models.transformer import Transformer
from moe_dist.parallel.engines.optimizer import reshard


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """No gradients, no dropout, no counting; afterwards the random state as it was, and what was sharded sharded."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        model.train(was_training)
        reshard(model)
