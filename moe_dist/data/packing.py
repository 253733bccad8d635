"""Packing: documents end to end in one flat array, cut into samples of equal length.

Shapes: S tokens a sample (`max_seq_length`), N tokens in all, D documents.

    tokens     a a a e b b e c c c c e        e: end of document, appended to each
    sample 0   a a a e b b                    labels  a a e _ b e      _: -100, no label
    sample 1   e c c c c e                    labels  _ c c c e _

A label is the token that follows. It is -100 where that token belongs to another document (nothing foretells
the first token of the next one) and at padding, so no loss ever reaches across documents; and where the data says so:
a document that came tokenised may bring the labels of its tokens (`tokenised.py`).

Conversations are not cut: a sample holds whole ones, as many as fit of those that come next, and padding. Without
packing it holds one document. A sample of preferences has two rows, `PreferenceDataset`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moe_dist.data import cache
from moe_dist.data.corpus import Corpus, SkippedDocument
from moe_dist.data.pieces import labels_of, token_dtype, tokenize
from moe_dist.data.tokenised import IGNORE_INDEX
from moe_dist.data.tokenizer import Tokenizer

PADDING_DOCUMENT = -1
logger = logging.getLogger("moe_dist")

Sample = dict[str, npt.NDArray[Any]]


def make_sample(
    tokens: npt.NDArray[Any],
    documents: npt.NDArray[Any],
    max_seq_length: int,
    pad_id: int,
    token_labels: npt.NDArray[Any] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """The sample at the front of `tokens`.

    `tokens`, `documents` (n,): token ids and document numbers, up to S + 1 of them looked at; fewer than S
    are padded. `token_labels` (n,): the label of each token, where it is not the token. Returns `input_ids` (S,)
    int64, `labels` (S,) int64 (already shifted: labels[t] is the target at position t), `document_ids` (S,) int32
    with -1 at padding.
    """
    length = min(max_seq_length, len(tokens))
    num_targets = min(max_seq_length, len(tokens) - 1)
    input_ids = np.full(max_seq_length, pad_id, dtype=np.int64)
    labels = np.full(max_seq_length, IGNORE_INDEX, dtype=np.int64)
    document_ids = np.full(max_seq_length, PADDING_DOCUMENT, dtype=np.int32)
    input_ids[:length] = tokens[:length]
    document_ids[:length] = documents[:length]
    if num_targets > 0:
        same = documents[1 : num_targets + 1] == documents[:num_targets]
        targets = (tokens if token_labels is None else token_labels)[1 : num_targets + 1]
        labels[:num_targets] = np.where(same, targets.astype(np.int64), IGNORE_INDEX)
    return {"input_ids": input_ids, "labels": labels, "document_ids": document_ids}


class SampleDataset(Protocol):
    """What the loader needs of a dataset; `PackedDataset` is the one in this package."""

    max_seq_length: int
    pad_id: int
    rows_per_sample: int

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...


def sample_begins(
    document_starts: npt.NDArray[np.int64], num_tokens: int, max_seq_length: int, alone: bool
) -> npt.NDArray[np.int64]:
    """Where samples of whole documents begin, and after them `num_tokens`; `alone`: a document in each.

    A document of more than `max_seq_length` tokens is cut.
    """
    begins: list[int] = []
    for start, end in zip(document_starts.tolist(), [*document_starts[1:].tolist(), num_tokens], strict=True):
        if alone or not begins or end - begins[-1] > max_seq_length:
            begins.append(start)
        while end - begins[-1] > max_seq_length:
            begins.append(begins[-1] + max_seq_length)
    return np.array([*begins, num_tokens], dtype=np.int64)


class PackedDataset:
    """Samples of S tokens cut from a flat token array.

    `tokens` (N,) unsigned; `document_starts` (D,) int64, where each document begins; `skipped` lists the
    documents that could not be read; `domains` names the sources, `domain_of` (D,) tells that of each document;
    `labels` (N,) int32 has the label of each token, -100 where it is not learned (None: each is its own).
    Sample i holds the tokens [i * S, (i + 1) * S). The tail shorter than S is dropped, unless `keep_tail`
    is set (evaluation: nothing may be missing) or it would be the only sample: then it is padded with `pad_id`.
    `whole`: no document is cut between samples, and what is left of a sample is padding; `packed` False: each document
    has samples of its own. `truncated` lists the documents that were cut off to fit.
    """

    rows_per_sample = 1

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        document_starts: npt.NDArray[np.int64],
        *,
        max_seq_length: int,
        pad_id: int,
        keep_tail: bool = False,
        skipped: Sequence[SkippedDocument] = (),
        domains: Sequence[str] = (),
        domain_of: npt.NDArray[np.uint8] | None = None,
        labels: npt.NDArray[np.int32] | None = None,
        whole: bool = False,
        packed: bool = True,
        truncated: Sequence[SkippedDocument] = (),
    ) -> None:
        if max_seq_length < 1:
            raise ValueError(f"max_seq_length is {max_seq_length}; give at least 1 token")
        if len(tokens) == 0:
            raise ValueError(
                f"nothing to pack: the corpus has no token ({len(skipped)} documents could not be read"
                + (f", the first: {skipped[0].reason})" if skipped else "); check its path, limit and split")
            )
        self.tokens, self.labels = tokens, labels
        self.document_starts = document_starts
        self.max_seq_length = max_seq_length
        self.pad_id = pad_id
        self.skipped, self.truncated = list(skipped), list(truncated)
        self.domains, self._domain_of = tuple(domains), domain_of
        self._begins = self._cut(whole, packed, keep_tail)
        self._num_samples = len(self._begins) - 1

    def _cut(self, whole: bool, packed: bool, keep_tail: bool) -> npt.NDArray[np.int64]:
        """Where in the flat array samples begin, and after them where the last ends."""
        if whole or not packed:
            return sample_begins(self.document_starts, len(self.tokens), self.max_seq_length, not packed)
        full, tail = divmod(len(self.tokens), self.max_seq_length)
        begins = np.arange(full + 1, dtype=np.int64) * self.max_seq_length
        return np.append(begins, len(self.tokens)) if tail and (keep_tail or full == 0) else begins

    def __len__(self) -> int:
        """Number of samples."""
        return self._num_samples

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the flat array, end-of-document tokens counted, padding not."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Number of documents that gave at least one token."""
        return len(self.document_starts)

    def sample(self, index: int) -> Sample:
        """Sample `index`: `input_ids` (S,) int64, `labels` (S,) int64, `document_ids` (S,) int32.

        A document id is the number of the document in the dataset; padding has -1. With several named sources also
        `domain_ids` (S,) uint8, anything at padding. Raises IndexError.
        """
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} is out of range: the dataset has {self._num_samples} samples")
        begin, end = (int(offset) for offset in self._begins[index : index + 2])
        if end - begin == self.max_seq_length:  # the label of its last token may be the token after it
            end = min(end + 1, len(self.tokens))
        first = int(np.searchsorted(self.document_starts, begin, side="right")) - 1
        last = int(np.searchsorted(self.document_starts, end, side="left"))
        borders = np.concatenate([[begin], self.document_starts[first + 1 : last], [end]])
        documents = np.repeat(np.arange(first, last, dtype=np.int32), np.diff(borders))
        labels = None if self.labels is None else self.labels[begin:end]
        made = make_sample(self.tokens[begin:end], documents, self.max_seq_length, self.pad_id, labels)
        if self._domain_of is not None:
            made["domain_ids"] = self._domain_of[made["document_ids"]]
        return made

    def valid_labels(self, num_samples: int | None = None) -> npt.NDArray[Any]:
        """Every label of the samples (of the first `num_samples`) that is not -100, in order, (num_labels,)."""
        end = self.end_of(num_samples)
        is_target = np.ones(end, dtype=bool)
        is_target[self.document_starts[self.document_starts < end]] = False
        if self.labels is None:
            return self.tokens[:end][is_target]
        labels = self.labels[:end][is_target]
        return labels[labels != IGNORE_INDEX]

    def num_labels(self, num_samples: int | None = None) -> int:
        """Number of them; quick where the data brings no labels of its own."""
        if self.labels is not None:
            return len(self.valid_labels(num_samples))
        end = self.end_of(num_samples)
        return end - int(np.searchsorted(self.document_starts, end))

    def end_of(self, num_samples: int | None) -> int:
        """The token after those that the labels of the first samples are."""
        samples = len(self) if num_samples is None else min(num_samples, len(self))
        return min(len(self.tokens), int(self._begins[samples]) + 1)


class PreferenceDataset(PackedDataset):
    """Samples of two rows of S tokens: chosen answers in the first, and below each pair's chosen one the rejected one.

    Documents 2 p and 2 p + 1 of the flat array are the chosen and the rejected answer of pair p, each with its prompt.
    A sample holds whole pairs, as many as fit of those that come next: a pair is always in one micro-batch. `reference`
    (P, 2) float64: log-probabilities of all pairs under the reference, of which a sample has its own.
    """

    rows_per_sample = 2
    reference: npt.NDArray[np.float64] | None = None

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.document_starts) // 2

    @property
    def num_documents(self) -> int:
        """Of these a pair is one."""
        return self.num_pairs

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of the chosen and the rejected side of each pair (P, 2)."""
        return np.diff(np.append(self.document_starts, len(self.tokens))).reshape(-1, 2)

    def _cut(self, whole: bool, packed: bool, keep_tail: bool) -> npt.NDArray[np.int64]:
        begins: list[int] = []
        used = [0, 0]
        for start, sides in zip(self.document_starts[::2].tolist(), self.lengths.tolist(), strict=True):
            if max(sides) > self.max_seq_length:
                raise ValueError(
                    f"a pair has {max(sides)} tokens on one side, and max_seq_length is {self.max_seq_length}"
                )
            fits = all(had + more <= self.max_seq_length for had, more in zip(used, sides, strict=True))
            if not (begins and packed and fits):
                begins.append(start)
                used = [0, 0]
            used = [had + more for had, more in zip(used, sides, strict=True)]
        return np.array([*begins, len(self.tokens)], dtype=np.int64)

    def sample(self, index: int) -> Sample:
        """Sample `index`: as of a `PackedDataset`, of two rows (2, S); `reference` (pairs here, 2) where it is known.

        Raises IndexError.
        """
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} is out of range: the dataset has {self._num_samples} samples")
        first, last = np.searchsorted(self.document_starts, self._begins[index : index + 2]).tolist()
        rows = [self._row(range(first + side, last, 2)) for side in (0, 1)]
        made = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if self._domain_of is not None:
            made["domain_ids"] = self._domain_of[made["document_ids"]]
        if self.reference is not None:
            made["reference"] = self.reference[first // 2 : last // 2]
        return made

    def _row(self, numbers: range) -> Sample:
        """These documents end to end."""
        ends = np.append(self.document_starts[1:], len(self.tokens))
        spans = [slice(int(self.document_starts[number]), int(ends[number])) for number in numbers]
        documents = np.repeat(np.array(numbers, dtype=np.int32), [span.stop - span.start for span in spans])
        labels = None if self.labels is None else np.concatenate([self.labels[span] for span in spans])
        tokens = np.concatenate([self.tokens[span] for span in spans])
        return make_sample(tokens, documents, self.max_seq_length, self.pad_id, labels)


def pack(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    keep_tail: bool = False,
    packed: bool = True,
    cache_dir: str | Path | None = None,
) -> PackedDataset:
    """Tokenise `corpus` and lay its documents end to end, in corpus order, in memory.

    `keep_tail`: pad the last, incomplete sample rather than drop it (for evaluation). `packed`: several documents may
    share a sample. `cache_dir`: keep the
    token array there and map it from disk when the same files and tokenizer come again; it serves every
    `max_seq_length`, and is left aside for a corpus or tokenizer without fingerprint (texts in memory,
    streams) or with several named sources. Raises ValueError for a corpus without a token, or token ids outside
    the vocabulary.
    """
    entry = _cache_entry(corpus, tokenizer, cache_dir)
    stored = entry.load() if entry is not None else None
    domain_of: npt.NDArray[np.uint8] | None = None
    if stored is None:
        pieces = list(tokenize(iter(corpus), tokenizer))
        lengths = np.array([len(piece.tokens) for piece in pieces], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        empty = np.empty(0, dtype=token_dtype(tokenizer.vocab_size))
        tokens = np.concatenate([piece.tokens for piece in pieces]) if pieces else empty
        labels: npt.NDArray[np.int32] | None = None
        if any(piece.labels is not None for piece in pieces):
            labels = np.concatenate([labels_of(piece.tokens, piece.labels) for piece in pieces])
        skipped, truncated = list(corpus.skipped), list(corpus.truncated)
        if corpus.domains:
            domain_of = np.array([piece.domain for piece in pieces], dtype=np.uint8)
        if entry is not None:
            try:
                entry.save(tokens, starts, skipped, labels, truncated)
            except OSError as error:
                logger.warning("tokens are not kept for the next start: %s", error)
    else:
        tokens, starts, skipped, labels, truncated = stored
    kind = PreferenceDataset if corpus.pairs else PackedDataset
    return kind(
        tokens,
        starts,
        max_seq_length=max_seq_length,
        pad_id=tokenizer.pad_id,
        keep_tail=keep_tail,
        skipped=skipped,
        domains=corpus.domains,
        domain_of=domain_of,
        labels=labels,
        whole=corpus.whole,
        packed=packed,
        truncated=truncated,
    )


def _cache_entry(corpus: Corpus, tokenizer: Tokenizer, cache_dir: str | Path | None) -> cache.CacheEntry | None:
    encoding = getattr(tokenizer, "fingerprint", None)
    # The cache does not know domains: a corpus that has some is tokenised each time.
    if cache_dir is None or corpus.fingerprint is None or encoding is None or corpus.domains:
        return None
    # An array that an earlier version has made does not know the labels that rows bring.
    made_of = f"labels|{corpus.fingerprint}|{encoding}|eos={tokenizer.eos_id}"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:32]
    return cache.CacheEntry(Path(cache_dir).expanduser(), key)
