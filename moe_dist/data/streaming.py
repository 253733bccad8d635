"""Packing a corpus that is too large for memory: samples in stream order, with an exact resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_dist.data.corpus import Corpus, SkippedDocument
from moe_dist.data.packing import Sample, make_sample
from moe_dist.data.pieces import Piece, labels_of, token_dtype, tokenize
from moe_dist.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class StreamPoint:
    """A point between two samples. The arrays are never written to, so a point costs no copy."""

    samples: int
    documents: int
    passes: int
    corpus: dict[str, Any] | None  # None: at the start of a pass
    tokens: npt.NDArray[Any]
    document_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]


class StreamingPackedDataset:
    """An iterator over samples (as `PackedDataset.sample` gives them) in the order of the corpus.

    Each document is tokenised when its turn comes and joined to what the last sample left over. With `repeat`
    the corpus starts again when it ends and the stream is endless; without, the incomplete tail is dropped,
    or padded with `keep_tail`; conversations are not cut, and a tail of them is always padded. `packed` False: each
    document has samples of its own. Document ids count the documents of the stream from 0. Iterating again goes on
    where the stream stands; `reset` starts afresh.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        max_seq_length: int,
        repeat: bool = True,
        keep_tail: bool = False,
        packed: bool = True,
    ) -> None:
        if max_seq_length < 1:
            raise ValueError(f"max_seq_length is {max_seq_length}; give at least 1 token")
        if corpus.pairs:
            raise ValueError("preferences are not read as a stream: pack them")
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._repeat = repeat
        self._keep_tail = keep_tail
        self._packed = packed
        self.max_seq_length = max_seq_length
        self.pad_id = tokenizer.pad_id
        self._skipped: dict[str, SkippedDocument] = {}
        self.reset()

    def reset(self) -> None:
        """Go back to the first sample."""
        empty = np.empty(0, dtype=token_dtype(self._tokenizer.vocab_size))
        none = np.empty(0, dtype=np.int32)
        self._start_at(StreamPoint(0, 0, 0, None, empty, none, none))

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        if not self._fill():
            raise StopIteration
        length = self._front()
        # The label of its last token may be the token after it.
        end = length + 1 if length == self.max_seq_length else length
        parts = self._tokens[:end], self._document_ids[:end]
        sample = make_sample(*parts, self.max_seq_length, self.pad_id, self._labels[:end])
        self._advance()
        return sample

    def _front(self) -> int:
        """How many tokens of the buffer the next sample has: conversations are not cut."""
        documents = self._document_ids
        length = min(self.max_seq_length, len(documents))
        if not self._packed:
            return int((documents[:length] == documents[0]).sum())
        if self._corpus.whole and length < len(documents) and documents[length - 1] == documents[length]:
            return int(np.argmax(documents == documents[length])) or length
        return length

    def skip(self, count: int) -> None:
        """Pass over `count` samples; raises ValueError when the stream ends before."""
        for done in range(count):
            if not self._fill():
                raise ValueError(f"cannot skip {count} samples: the stream ended after {done} of them")
            self._advance()

    @property
    def samples(self) -> int:
        """Number of samples produced or skipped since the start."""
        return self._samples

    @property
    def passes(self) -> int:
        """Number of times the corpus has been read to its end."""
        return self._passes

    @property
    def truncated(self) -> list[SkippedDocument]:
        """Documents that were cut off to fit, in this pass."""
        return list(self._corpus.truncated)

    @property
    def skipped(self) -> list[SkippedDocument]:
        """Documents that could not be read so far, each once."""
        self._remember_skipped()
        return list(self._skipped.values())

    def _remember_skipped(self) -> None:
        self._skipped |= {document.id: document for document in self._corpus.skipped}

    def point(self) -> StreamPoint:
        """Where the stream stands; cheap enough to take at every step."""
        return StreamPoint(
            self._samples,
            self._documents,
            self._passes,
            self._corpus_state,
            self._tokens,
            self._document_ids,
            self._labels,
        )

    def state_dict(self, point: StreamPoint | None = None) -> dict[str, Any]:
        """Where the stream stands (or stood at `point`), in plain Python values.

        Holds `samples` produced, `documents` consumed, `passes` finished, the position of the `corpus` and
        the packing buffer. The same on every replica, whatever their number.
        """
        at = self.point() if point is None else point
        # Most streams bring no labels of their own: then the tokens are.
        labels = {} if (at.labels == at.tokens).all() else {"buffer_labels": at.labels.tolist()}
        return labels | {
            "samples": at.samples,
            "documents": at.documents,
            "passes": at.passes,
            "corpus": at.corpus,
            "buffer_tokens": at.tokens.tolist(),
            "buffer_documents": at.document_ids.tolist(),
            "max_seq_length": self.max_seq_length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly after the sample that `state_dict` was taken at.

        A `datasets.IterableDataset` is positioned by its own state; where it has none that is exact (shuffle
        buffers), and for local files, the corpus is read again up to the point without tokenising.
        Raises ValueError for a state taken with another sample length.
        """
        if state["max_seq_length"] != self.max_seq_length:
            raise ValueError(
                f"the stream was saved with max_seq_length {state['max_seq_length']} and cannot go on with "
                f"{self.max_seq_length}: keep the length, or start the data afresh"
            )
        self._start_at(
            StreamPoint(
                state["samples"],
                state["documents"],
                state["passes"],
                state["corpus"],
                np.array(state["buffer_tokens"], dtype=token_dtype(self._tokenizer.vocab_size)),
                np.array(state["buffer_documents"], dtype=np.int32),
                np.array(state.get("buffer_labels", state["buffer_tokens"]), dtype=np.int32),
            )
        )

    def _start_at(self, point: StreamPoint) -> None:
        self._samples, self._documents, self._passes = point.samples, point.documents, point.passes
        self._tokens, self._document_ids, self._labels = point.tokens, point.document_ids, point.labels
        self._corpus_state = point.corpus
        self._pieces = self._tokenized(point.corpus)

    def _tokenized(self, corpus_state: dict[str, Any] | None) -> Iterator[Piece]:
        # One document at a time: were the corpus ahead of the buffer, its state would lose documents.
        for document in self._corpus.iter_from(corpus_state):
            for piece in tokenize(iter((document,)), self._tokenizer):
                self._corpus_state = self._corpus.state_dict()
                yield piece

    def _fill(self) -> bool:
        """Have S tokens in the buffer, if the stream still has so many; False when no sample is left.

        S are enough although the last label is the token after them: the buffer ends at the end of a
        document, and there the label is -100 in any case.
        """
        pieces, numbers, labels, length = [self._tokens], [self._document_ids], [self._labels], len(self._tokens)
        documents_before_pass = -1
        while length < self.max_seq_length:
            piece = next(self._pieces, None)
            if piece is not None:
                pieces.append(piece.tokens)
                numbers.append(np.full(len(piece.tokens), self._documents, dtype=np.int32))
                labels.append(labels_of(piece.tokens, piece.labels))
                self._documents += 1
                length += len(piece.tokens)
                continue
            if self._documents == 0 or self._documents == documents_before_pass:
                raise ValueError(
                    f"nothing to pack: the stream has no token ("
                    f"{len(self._corpus.skipped)} documents could not be read)"
                )
            if not self._repeat:
                break
            self._passes += 1
            self._corpus_state = None
            self._remember_skipped()  # the corpus forgets them when it begins again
            documents_before_pass = self._documents
            self._pieces = self._tokenized(None)
        if len(pieces) > 1:
            self._tokens, self._document_ids = np.concatenate(pieces), np.concatenate(numbers)
            self._labels = np.concatenate(labels)
        if length >= self.max_seq_length:
            return True
        return (self._keep_tail or self._corpus.whole or not self._packed) and length > 0

    def _advance(self) -> None:
        length = self._front()
        self._tokens = self._tokens[length:]
        self._document_ids = self._document_ids[length:]
        self._labels = self._labels[length:]
        self._samples += 1
