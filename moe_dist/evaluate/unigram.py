"""The baseline of any model: the best that can be said of a text by how often each of its tokens comes in it.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import time

import torch

from moe_dist.data.loader import Chosen, eval_batches
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.evaluate.measure import Measured, Totals
from moe_dist.train.loss import IGNORE


def measure_unigram(samples: Chosen, tokenizer: Tokenizer, vocab_size: int, *, batch_size: int = 1) -> Measured:
    """As `measure`, of the frequencies of the labels of these samples themselves: no model without context has a lower
    loss on them. In one process. Raises ValueError when no token has a label.
    """
    started = time.perf_counter()
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    for batch in eval_batches(samples, batch_size, 1, 0):
        counts_V += batch.labels[batch.labels != IGNORE].bincount(minlength=vocab_size)
    logs_V = (counts_V / counts_V.sum()).log()  # what never comes has -inf
    totals = Totals(samples, torch.device("cpu"))
    for batch in eval_batches(samples, batch_size, 1, 0):
        totals.add(logs_V.expand(*batch.labels.shape, -1), batch, tokenizer)
    return totals.measured({}, time.perf_counter() - started)
