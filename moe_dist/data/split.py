"""Training and validation documents, divided by a hash of the document's id."""

from __future__ import annotations

import hashlib

from moe_dist.data.corpus import Corpus


def split_corpus(corpus: Corpus, validation_split: float, seed: int = 0) -> tuple[Corpus, Corpus]:
    """(training, validation): two corpora without a document in common.

    Each document goes to validation with probability `validation_split`, in [0, 1), decided by SHA-256 of the
    seed and its id: the same on every machine and rank, and unmoved by documents added later. With two
    documents or more that can be read and are not empty, and a fraction above 0, neither side is empty: if need be
    the one nearest to the border changes sides. With 0, or a single document, the validation corpus is empty. Raises
    ValueError for a fraction outside [0, 1).
    """
    if not 0.0 <= validation_split < 1.0:
        raise ValueError(f"validation_split is {validation_split}; give a fraction of the documents in [0, 1)")
    to_validation, to_training = _forced(corpus, validation_split, seed) if validation_split > 0 else ("", "")

    def is_validation(id_: str) -> bool:
        if id_ in (to_validation, to_training):
            return id_ == to_validation
        return _draw(id_, seed) < validation_split

    def is_training(id_: str) -> bool:
        return not is_validation(id_)

    name = f"split:{validation_split}:{seed}:{to_validation}:{to_training}"
    return corpus.select(is_training, f"{name}:train"), corpus.select(is_validation, f"{name}:validation")


def _draw(id_: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the id."""
    digest = hashlib.sha256(f"{seed}\0{id_}".encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def _forced(corpus: Corpus, fraction: float, seed: int) -> tuple[str, str]:
    """Ids of the documents that must go to validation and to training against their draw ("": none).

    Reads only until both sides have a document, so it ends early on all but tiny corpora.
    """
    smallest: tuple[float, str] | None = None
    largest: tuple[float, str] | None = None
    for document in corpus:
        if not document.text and (document.tokens is None or not len(document.tokens)):
            continue  # nothing to learn or to evaluate: it fills neither side
        draw = (_draw(document.id, seed), document.id)
        smallest = min(smallest or draw, draw)
        largest = max(largest or draw, draw)
        if smallest[0] < fraction <= largest[0]:
            return "", ""
    if smallest is None or largest is None:
        return "", ""
    if smallest == largest:  # a single document is for training
        return "", smallest[1]
    return (smallest[1], "") if smallest[0] >= fraction else ("", largest[1])
