"""The loss of a model that knows only how often each token comes: what training must beat."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_dist.data.packing import PackedDataset


def unigram_loss(train: PackedDataset, validation: PackedDataset, vocab_size: int) -> float:
    """Cross-entropy, in nats a token, of the valid labels of `validation` under token frequencies of `train`.

    Frequencies are over all training tokens, the end of document counted, with one added to each of the
    `vocab_size` counts (Laplace). Raises ValueError for ids outside the vocabulary or no valid label.
    """
    labels = validation.valid_labels()
    if len(labels) == 0:
        raise ValueError("the validation set has no valid label: it needs a document of at least one token")
    for name, tokens in (("training", train.tokens), ("validation", validation.tokens)):
        if int(tokens.max()) >= vocab_size:
            raise ValueError(f"a {name} token id is {int(tokens.max())}, but vocab_size is {vocab_size}")
    counts = _count(train.tokens, vocab_size) + 1
    log_probabilities = np.log(counts) - np.log(counts.sum())
    return float(-(_count(labels, vocab_size) @ log_probabilities) / len(labels))


def _count(tokens: npt.NDArray[Any], vocab_size: int) -> npt.NDArray[np.int64]:
    """How often each id occurs, (vocab_size,) int64; in pieces, as bincount makes an int64 copy."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for begin in range(0, len(tokens), 1 << 24):
        counts += np.bincount(tokens[begin : begin + (1 << 24)], minlength=vocab_size)
    return counts
