"""Text to tokens to batches, in one global order that no layout changes.

The way through the package: `load_documents` (or `documents_from`) gives a `Corpus`; `split_corpus`
divides it by document; `pack` (or `StreamingPackedDataset`) makes samples of equal length with a
`Tokenizer`; `GlobalLoader` hands each data-parallel replica its micro-batches, and can resume at any
number of replicas. `docs/data.md` is the page for users.

Nothing here knows about ranks beyond two integers (how many replicas, which one), and importing the
package loads neither torch, datasets nor transformers: names are resolved when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.data.baseline import unigram_loss
    from moe_dist.data.batch import Batch
    from moe_dist.data.corpus import Corpus, Document, SkippedDocument, documents_from, load_documents
    from moe_dist.data.loader import GlobalLoader, eval_batches
    from moe_dist.data.packing import PackedDataset, pack
    from moe_dist.data.split import split_corpus
    from moe_dist.data.streaming import StreamingPackedDataset
    from moe_dist.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer

_HOME = {
    "Batch": "batch",
    "ByteTokenizer": "tokenizer",
    "Corpus": "corpus",
    "Document": "corpus",
    "GlobalLoader": "loader",
    "HuggingFaceTokenizer": "tokenizer",
    "PackedDataset": "packing",
    "SkippedDocument": "corpus",
    "StreamingPackedDataset": "streaming",
    "Tokenizer": "tokenizer",
    "documents_from": "corpus",
    "eval_batches": "loader",
    "load_documents": "corpus",
    "load_tokenizer": "tokenizer",
    "pack": "packing",
    "split_corpus": "split",
    "unigram_loss": "baseline",
}

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "Document",
    "GlobalLoader",
    "HuggingFaceTokenizer",
    "PackedDataset",
    "SkippedDocument",
    "StreamingPackedDataset",
    "Tokenizer",
    "documents_from",
    "eval_batches",
    "load_documents",
    "load_tokenizer",
    "pack",
    "split_corpus",
    "unigram_loss",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
