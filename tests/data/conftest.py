"""Small corpora and datasets that the data tests share."""

from __future__ import annotations

import pytest

from moe_dist.data import ByteTokenizer, PackedDataset, documents_from, pack


@pytest.fixture
def texts() -> list[str]:
    """Documents of many lengths, shorter and longer than a sample; two are empty, some not ASCII."""
    return [f"document {i} " + "xyz é" * (i * 7 % 23) for i in range(61)] + ["", "a", ""]


@pytest.fixture
def packed(texts: list[str]) -> PackedDataset:
    """The texts as samples of 32 bytes; their number is prime to the batch sizes of the tests."""
    dataset = pack(documents_from(texts), ByteTokenizer(), max_seq_length=32)
    assert len(dataset) % 2
    assert len(dataset) % 3
    return dataset
