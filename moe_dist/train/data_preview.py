"""What a run will be trained on, before it is started: texts with what is learned of them, and their statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_dist.config import Config
from moe_dist.data.corpus import SkippedDocument
from moe_dist.data.packing import IGNORE_INDEX, PackedDataset, PreferenceDataset
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.train.build import build_datasets
from moe_dist.train.stopping import Pace, Stopping

OF_A_STREAM = 1000
"""Documents that are read of a stream."""


@dataclass(frozen=True)
class Stretch:
    """Tokens in a row that are all learned, or all not, as text."""

    text: str
    learned: bool


@dataclass(frozen=True)
class DataPreview:
    """The training data of a run. `lengths` (D,) int64: tokens of each document; `labels`: how many are learned."""

    tokenizer: Tokenizer
    train: PackedDataset
    lengths: npt.NDArray[np.int64]
    labels: int
    skipped: list[SkippedDocument]
    validation_documents: int
    batch: int
    steps_per_epoch: float | None
    """None: of a stream."""
    steps: int | None
    """None: time ends the run."""

    @property
    def fill(self) -> float:
        """Share of the samples that is not padding."""
        room = len(self.train) * self.train.rows_per_sample * self.train.max_seq_length
        return self.train.num_tokens / room

    @property
    def are_pairs(self) -> bool:
        """Whether documents 2 p and 2 p + 1 are the chosen and the rejected answer of pair p."""
        return isinstance(self.train, PreferenceDataset)

    @property
    def median(self) -> int:
        """Of the lengths, the upper one of two."""
        return int(np.sort(self.lengths)[len(self.lengths) // 2])

    def histogram(self) -> list[tuple[int, int, int]]:
        """(shortest, longest, number of documents), in powers of two."""
        powers = np.ceil(np.log2(self.lengths)).astype(int)
        return [
            (2 ** (power - 1) + 1 if power else 1, 2**power, int((powers == power).sum()))
            for power in range(int(powers.min()), int(powers.max()) + 1)
        ]

    def document(self, number: int) -> Iterator[Stretch]:
        """Document `number` as stretches of text."""
        begin = int(self.train.document_starts[number])
        ids = self.train.tokens[begin : begin + int(self.lengths[number])].astype(np.int64)
        learned = np.ones(len(ids), dtype=bool)
        if self.train.labels is not None:
            learned = self.train.labels[begin : begin + len(ids)] != IGNORE_INDEX
        learned[0] = False  # nothing comes before it
        for run in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(learned)) + 1):
            yield Stretch(self._text(ids[run]), bool(learned[run[0]]))

    def _text(self, ids: npt.NDArray[np.int64]) -> str:
        """With special tokens, which the template puts in."""
        inner = getattr(self.tokenizer, "inner", None)
        if inner is not None:
            return str(inner.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        pieces = np.split(ids, np.flatnonzero(np.diff(ids == self.tokenizer.eos_id)) + 1)
        return "".join(
            "<eos>" * len(piece) if piece[0] == self.tokenizer.eos_id else self.tokenizer.decode(piece)
            for piece in pieces
        )


def preview(config: Config, world_size: int) -> DataPreview:
    """What `config` trains on `world_size` ranks. Raises ValueError for data that cannot be used."""
    is_stream = config.data.streaming
    datasets = build_datasets(config, sample_of_stream=OF_A_STREAM)
    train = datasets.train
    assert isinstance(train, PackedDataset)
    batch = config.global_batch_size(world_size)
    pace = Pace(batch, None if is_stream else len(train))
    return DataPreview(
        datasets.tokenizer,
        train,
        np.diff(np.append(train.document_starts, train.num_tokens)),
        train.num_labels(),
        datasets.skipped,
        0 if datasets.validation is None else datasets.validation.num_documents,
        batch,
        None if is_stream else len(train) / batch,
        Stopping(config.train, pace).max_steps,
    )
