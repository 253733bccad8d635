"""A micro-batch of samples as tensors. B: rows (`micro_batch_size`), S: tokens a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moe_dist.data.packing import IGNORE_INDEX, PADDING_DOCUMENT, Sample


@dataclass(frozen=True)
class Pairs:
    """The P preference pairs of a micro-batch.

    - `sequence_ids` (B, S) int64: 2 p at tokens of the chosen answer of pair p and of its prompt, 2 p + 1 at those of
      the rejected one, 2 P at padding.
    - `numbers` (P,) int64: of each pair in its dataset.
    - `reference` (P, 2) float64: log-probabilities of both answers under the reference; None: not known yet.
    """

    sequence_ids: torch.Tensor
    numbers: torch.Tensor
    reference: torch.Tensor | None = None

    def __len__(self) -> int:
        """P."""
        return len(self.numbers)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Pairs:
        """The same with its tensors on `device`."""
        moved = (
            self.sequence_ids.to(device, non_blocking=non_blocking),
            self.numbers.to(device, non_blocking=non_blocking),
        )
        reference = self.reference
        return Pairs(*moved, None if reference is None else reference.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    - `input_ids` (B, S) int64.
    - `labels` (B, S) int64, already shifted: labels[b, t] is the target at position t, -100 where there is
      none.
    - `position_ids` (B, S) int64, counted from the start of each document inside the row; None when every row
      is the plain 0 .. S-1.
    - `document_ids` (B, S) int32, equal exactly for tokens of one document, -1 at padding; None when no row
      holds a boundary or padding, so that plain causal attention is right.
    - `num_valid`: number of labels that are not -100; `num_tokens`: number of tokens that are not padding.
    - `sample_ids`: the samples in the first rows (rows after them are filling without labels).
    - `domain_ids` (B, S) uint8: the named source of each token, anything at padding; None unless there are several.
    - `index`: number of the micro-batch in its step, a * num_replicas + r.
    - `pairs`: of preferences, whose chosen answers are in even rows, the rejected ones in odd rows.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None
    document_ids: torch.Tensor | None
    num_valid: int
    num_tokens: int
    sample_ids: list[int]
    index: int
    domain_ids: torch.Tensor | None = None
    pairs: Pairs | None = None

    @property
    def num_terms(self) -> int:
        """What a loss is a mean over: labels, or pairs."""
        return self.num_valid if self.pairs is None else len(self.pairs)

    def with_reference(self, reference: torch.Tensor) -> Batch:
        """The same, its pairs with these log-probabilities (P, 2)."""
        assert self.pairs is not None
        return replace(self, pairs=replace(self.pairs, reference=reference))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same micro-batch with its tensors on `device`."""

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            position_ids=move(self.position_ids),
            document_ids=move(self.document_ids),
            domain_ids=move(self.domain_ids),
            pairs=None if self.pairs is None else self.pairs.to(device, non_blocking),
        )


def position_ids_of(document_ids: np.ndarray) -> np.ndarray:
    """Positions (B, S) int64 that start at 0 with each run of equal `document_ids` (B, S)."""
    column = np.broadcast_to(np.arange(document_ids.shape[1]), document_ids.shape)
    begins = np.zeros(document_ids.shape, dtype=bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)


def filling_sample(max_seq_length: int, pad_id: int, rows: int = 1) -> Sample:
    """A sample of padding only, without a label; `rows`: of each sample, 2 of preferences."""
    shape = max_seq_length if rows == 1 else (rows, max_seq_length)
    return {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "labels": np.full(shape, IGNORE_INDEX, dtype=np.int64),
        "document_ids": np.full(shape, PADDING_DOCUMENT, dtype=np.int32),
    }


def pairs_of(samples: Sequence[Sample]) -> Pairs:
    """The pairs of samples of two rows each. A pair may come twice, where an epoch ends and the next begins."""
    ids, numbers = [], [np.empty(0, dtype=np.int64)]
    count = 0
    for sample in samples:
        documents = sample["document_ids"].astype(np.int64)  # 2 p above, 2 p + 1 below, in the same order
        found = np.unique(documents[0][documents[0] != PADDING_DOCUMENT]) // 2
        ids.append(
            np.where(documents == PADDING_DOCUMENT, -1, documents + 2 * (count - int(found[0]) if len(found) else 0))
        )
        numbers.append(found)
        count += len(found)
    sequence_ids = np.concatenate(ids)
    sequence_ids[sequence_ids < 0] = 2 * count
    reference = None
    if any("reference" in sample for sample in samples):
        reference = torch.from_numpy(
            np.concatenate([sample["reference"] for sample in samples if "reference" in sample])
        )
    return Pairs(torch.from_numpy(sequence_ids), torch.from_numpy(np.concatenate(numbers)), reference)


def collate(samples: Sequence[Sample], sample_ids: Sequence[int], index: int, pin_memory: bool = False) -> Batch:
    """The rows of `samples` stacked; pinned for copies that do not block, where an accelerator is there to copy to."""
    pin = pin_memory and torch.cuda.is_available()

    def tensor(array: np.ndarray) -> torch.Tensor:
        made = torch.from_numpy(array)
        return made.pin_memory() if pin else made

    def rows(name: str) -> np.ndarray:
        return np.concatenate([np.atleast_2d(sample[name]) for sample in samples])

    labels, documents = rows("labels"), rows("document_ids")
    num_tokens = int((documents != PADDING_DOCUMENT).sum())
    named = any("domain_ids" in sample for sample in samples)
    nowhere = np.zeros(
        samples[0]["labels"].shape, dtype=np.uint8
    )  # of what fills a batch of an evaluation: of no source
    has_boundary = num_tokens < documents.size or bool((documents[:, 1:] != documents[:, :-1]).any())
    return Batch(
        input_ids=tensor(rows("input_ids")),
        labels=tensor(labels),
        position_ids=tensor(position_ids_of(documents)) if has_boundary else None,
        document_ids=tensor(documents) if has_boundary else None,
        num_valid=int((labels != IGNORE_INDEX).sum()),
        num_tokens=num_tokens,
        sample_ids=list(sample_ids),
        index=index,
        domain_ids=tensor(np.concatenate([np.atleast_2d(sample.get("domain_ids", nowhere)) for sample in samples]))
        if named
        else None,
        pairs=pairs_of(samples) if samples[0]["labels"].ndim == 2 else None,
    )
