"""The one global order of samples.
 A pure function of (number of samples, seed): an endless stream in which each epoch is one permutation of all
samples. No rank, micro-batch or accumulation count enters, which is what makes a resume at another size
exact.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of samples in `epoch`, (num_samples,) int64.

    Sorts the raw output of Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): numpy
    keeps that stable between its versions, which it does not promise for `Generator.permutation`.
    """
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    return np.argsort(keys, kind="stable")


class GlobalOrder:
    """Sample ids at positions of the endless stream; safe to ask from several threads."""

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        if num_samples < 1:
            raise ValueError("the dataset has no sample")
        if seed < 0:
            raise ValueError(f"the data seed is {seed}; give 0 or more")
        self._num_samples = num_samples
        self._shuffle = shuffle
        # Two epochs are held, for steps that lie across the end of one.
        self._permutation = lru_cache(maxsize=2)(lambda epoch: epoch_permutation(num_samples, seed, epoch))

    def take(self, position: int, count: int) -> npt.NDArray[np.int64]:
        """Sample ids at the stream positions [position, position + count), (count,) int64."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(position, self._num_samples)
            length = min(count, self._num_samples - offset)
            if self._shuffle:
                pieces.append(self._permutation(epoch)[offset : offset + length])
            else:
                pieces.append(np.arange(offset, offset + length))
            position += length
            count -= length
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
