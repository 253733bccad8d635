"""A micro-batch of samples as tensors. B: rows (`micro_batch_size`), S: tokens a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moe_dist.data.packing import IGNORE_INDEX, PADDING_DOCUMENT, Sample


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
        )


def position_ids_of(document_ids: np.ndarray) -> np.ndarray:
    """Positions (B, S) int64 that start at 0 with each run of equal `document_ids` (B, S)."""
    column = np.broadcast_to(np.arange(document_ids.shape[1]), document_ids.shape)
    begins = np.zeros(document_ids.shape, dtype=bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)


def filling_sample(max_seq_length: int, pad_id: int) -> Sample:
    """A sample of padding only, without a label."""
    return {
        "input_ids": np.full(max_seq_length, pad_id, dtype=np.int64),
        "labels": np.full(max_seq_length, IGNORE_INDEX, dtype=np.int64),
        "document_ids": np.full(max_seq_length, PADDING_DOCUMENT, dtype=np.int32),
    }


def collate(samples: Sequence[Sample], sample_ids: Sequence[int], index: int, pin_memory: bool = False) -> Batch:
    """`samples` stacked; pinned for copies that do not block, where an accelerator is there to copy to."""
    pin = pin_memory and torch.cuda.is_available()

    def tensor(array: np.ndarray) -> torch.Tensor:
        made = torch.from_numpy(array)
        return made.pin_memory() if pin else made

    labels = np.stack([sample["labels"] for sample in samples])
    documents = np.stack([sample["document_ids"] for sample in samples])
    num_tokens = int((documents != PADDING_DOCUMENT).sum())
    named = any("domain_ids" in sample for sample in samples)
    nowhere = np.zeros(labels.shape[1], dtype=np.uint8)  # of what fills a batch of an evaluation: it is of no source
    has_boundary = num_tokens < documents.size or bool((documents[:, 1:] != documents[:, :-1]).any())
    return Batch(
        input_ids=tensor(np.stack([sample["input_ids"] for sample in samples])),
        labels=tensor(labels),
        position_ids=tensor(position_ids_of(documents)) if has_boundary else None,
        document_ids=tensor(documents) if has_boundary else None,
        num_valid=int((labels != IGNORE_INDEX).sum()),
        num_tokens=num_tokens,
        sample_ids=list(sample_ids),
        index=index,
        domain_ids=tensor(np.stack([sample.get("domain_ids", nowhere) for sample in samples])) if named else None,
    )
