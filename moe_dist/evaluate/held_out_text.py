"""The text a model is measured on: files a person names, or what its run holds out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_dist.config import Config
from moe_dist.data.corpus import load_documents
from moe_dist.data.packing import PackedDataset, Sample, pack
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.train.build import build_validation

_KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


class Chosen:
    """Some samples of a dataset, by their numbers."""

    rows_per_sample = 1

    def __init__(self, samples: PackedDataset, numbers: Sequence[int]) -> None:
        self._samples, self._numbers = samples, numbers
        self.max_seq_length, self.pad_id, self.domains = samples.max_seq_length, samples.pad_id, samples.domains

    def __len__(self) -> int:
        return len(self._numbers)

    def sample(self, index: int) -> Sample:
        """As `PackedDataset.sample`."""
        return self._samples.sample(self._numbers[index])


def held_out_text(
    config: Config, tokenizer: Tokenizer, files: Sequence[str] = (), max_samples: int | None = None
) -> Chosen:
    """Samples of `data.max_seq_length` tokens, the last one too. Each file is a named source: NAME=PATH, or by the
    name of the file; .jsonl and .parquet have a document in every row, others are one document. `max_samples` are
    spread evenly over all text; without it and without files those are taken that the run itself measures.

    Raises ValueError where there is nothing to measure on, or files are of several kinds.
    """
    found = _all(config, tokenizer, files)
    total = len(found)
    if max_samples is not None and max_samples < total:
        return Chosen(found, [index * total // max_samples for index in range(max_samples)])
    limit = None if files or max_samples is not None else config.num_evaluated
    return Chosen(found, range(total if limit is None else min(limit, total)))


def _all(config: Config, tokenizer: Tokenizer, files: Sequence[str]) -> PackedDataset:
    if not files:
        found = build_validation(config)
        if found is None:
            raise ValueError(
                "the run holds out no text (data.validation_split, data.validation_path): give --data FILE"
            )
        return found
    named = {}
    for file in files:
        name, equals, path = file.partition("=")
        path = path if equals else file
        name = name if equals else Path(file).name.removesuffix(".gz").rpartition(".")[0] or Path(file).name
        if name in named:
            raise ValueError(f"--data {file}: two sources are called {name}; give NAME=PATH")
        named[name] = path
    kinds = {_KINDS.get(Path(path.removesuffix(".gz")).suffix, "text") for path in named.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"--data: files of several kinds ({', '.join(sorted(kinds))}); measure them one after the other"
        )
    corpus = load_documents(kinds.pop(), path=named, text_field=config.data.text_field, on_error="fail")
    length = min(config.data.max_seq_length, config.model.max_position_embeddings)
    return pack(corpus, tokenizer, max_seq_length=length, keep_tail=True)
