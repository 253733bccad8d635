"""Documents as tokens, with the end of each, in arrays as narrow as the vocabulary allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_dist.data.corpus import Document
from moe_dist.data.tokenised import IGNORE_INDEX
from moe_dist.data.tokenizer import TokenIds, Tokenizer

DOCUMENTS_PER_BATCH = 256


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned dtype that holds every token id."""
    return np.min_scalar_type(vocab_size - 1)


class Piece(NamedTuple):
    """A document of n tokens; `labels` (n,) int32, None where each token is its own."""

    domain: int
    tokens: npt.NDArray[Any]
    labels: npt.NDArray[np.int32] | None


def labels_of(tokens: npt.NDArray[Any], labels: npt.NDArray[np.int32] | None) -> npt.NDArray[np.int32]:
    """The label of each token, written out."""
    return tokens.astype(np.int32) if labels is None else labels


def tokenize(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Each document with the end-of-document token at the end; documents without a token fall out.

    Of a preference the chosen answer and then the rejected one. An end that a document with labels of its own has not
    brought is not learned. Raises ValueError naming a document
    whose ids or labels are outside the tokenizer's vocabulary.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    encode_batch = getattr(tokenizer, "encode_batch", None)
    while batch := list(islice(documents, DOCUMENTS_PER_BATCH if encode_batch else 1)):
        texts = [document.text for document in batch if document.text is not None]
        encoded = iter(_encoded(batch, texts, tokenizer))
        for document in batch:
            ids = np.asarray(next(encoded) if document.text is not None else document.tokens)
            if ids.size == 0:
                continue
            for kind, found in (("token ids", ids), ("labels", document.labels)):
                learned = np.asarray(() if found is None else found)
                learned = learned[learned != IGNORE_INDEX] if kind == "labels" else learned
                if learned.size and (int(learned.min()) < 0 or int(learned.max()) >= tokenizer.vocab_size):
                    raise ValueError(
                        f"document {document.id!r} holds {kind} from {learned.min()} to {learned.max()}, but "
                        f"tokenizer {tokenizer.name!r} knows {tokenizer.vocab_size}: another one made them"
                    )
            # Documents that came tokenised may end in it already.
            closed = document.whole or ids[-1] == tokenizer.eos_id
            result = np.empty(len(ids) + (not closed), dtype=dtype)
            result[len(ids) :] = tokenizer.eos_id
            result[: len(ids)] = ids
            labels = None
            if document.labels is not None:
                labels = np.full(len(result), IGNORE_INDEX, dtype=np.int32)
                labels[: len(ids)] = document.labels
            yield Piece(document.domain, result, labels)
            if (other := document.rejected) is not None:
                assert other.labels is not None
                yield Piece(document.domain, other.ids.astype(dtype), other.labels.astype(np.int32))


def _encoded(batch: Sequence[Document], texts: list[str], tokenizer: Tokenizer) -> list[TokenIds]:
    """Token ids of each of the `texts` of a batch. Raises ValueError naming the document that cannot be encoded."""
    encode_batch = getattr(tokenizer, "encode_batch", None)
    if not texts:  # all came tokenised; tokenizers of `transformers` break on nothing
        return []
    try:
        return list(encode_batch(texts) if encode_batch else map(tokenizer.encode, texts))
    except Exception as error:  # tokenizers raises a bare Exception
        for document in batch:
            try:
                tokenizer.encode(document.text or "")
            except Exception as one:
                raise ValueError(
                    f"tokenizer {tokenizer.name!r} cannot encode document {document.id!r}: {one}; take another "
                    "tokenizer, or give it an unknown token"
                ) from error
        raise
