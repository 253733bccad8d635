"""Packing: nothing lost, labels within documents, positions from their starts, and the cache."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.data import (
    ByteTokenizer,
    StreamingPackedDataset,
    documents_from,
    load_documents,
    pack,
    split_corpus,
    unigram_loss,
)
from moe_dist.data.batch import collate, position_ids_of

TOKENIZER = ByteTokenizer()
EOS, PAD = TOKENIZER.eos_id, TOKENIZER.pad_id


def naive_stream(documents: list[list[int]]) -> list[tuple[int, int, int]]:
    """(token, document number, target or -100) for every token, one at a time."""
    stream = []
    for number, ids in enumerate(filter(None, documents)):
        closed = [*ids, EOS]
        targets = [*closed[1:], -100]
        stream += [(token, number, target) for token, target in zip(closed, targets, strict=True)]
    return stream


def naive_positions(document_ids: list[int]) -> list[int]:
    positions: list[int] = []
    for t, id_ in enumerate(document_ids):
        positions.append(positions[-1] + 1 if t and document_ids[t - 1] == id_ else 0)
    return positions


def test_the_example_of_the_docstring():
    packed = pack(documents_from(["aaa", "bb", "cccc"]), TOKENIZER, max_seq_length=6)
    a, b, c = b"abc"
    assert len(packed) == 2
    assert packed.num_tokens == 12
    assert packed.num_documents == 3
    assert packed.tokens.dtype == np.uint16
    first, second = packed.sample(0), packed.sample(1)
    assert first["input_ids"].tolist() == [a, a, a, EOS, b, b]
    assert first["labels"].tolist() == [a, a, EOS, -100, b, EOS]
    assert second["input_ids"].tolist() == [EOS, c, c, c, c, EOS]
    assert second["labels"].tolist() == [-100, c, c, c, EOS, -100]
    assert second["document_ids"].tolist() == [1, 2, 2, 2, 2, 2]
    assert [first[name].dtype for name in ("input_ids", "labels", "document_ids")] == ["i8", "i8", "i4"]
    with pytest.raises(IndexError, match="sample 2 is out of range"):
        packed.sample(2)


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 255), max_size=12), max_size=12).filter(any),
    length=st.integers(1, 15),
    keep_tail=st.booleans(),
)
def test_samples_put_together_are_the_stream(documents, length, keep_tail):
    """Packed and streamed samples against one token at a time; both go over the same random documents."""
    stream = naive_stream(documents)
    corpus = documents_from(documents)
    packed = pack(corpus, TOKENIZER, max_seq_length=length, keep_tail=keep_tail)
    samples = [packed.sample(i) for i in range(len(packed))]
    streamed = list(
        StreamingPackedDataset(
            corpus,
            TOKENIZER,
            max_seq_length=length,
            repeat=False,
            keep_tail=keep_tail or len(stream) < length,
        )
    )
    padding = (PAD, -1, -100)
    if keep_tail or len(stream) < length:
        stream += [padding] * (-len(stream) % length)
    num_samples = len(stream) // length
    assert len(samples) == len(streamed) == num_samples
    for i, (sample, other) in enumerate(zip(samples, streamed, strict=True)):
        expected = np.array(stream[i * length : (i + 1) * length])
        assert np.array_equal(sample["input_ids"], expected[:, 0])
        assert np.array_equal(sample["document_ids"], expected[:, 1])
        assert np.array_equal(sample["labels"], expected[:, 2])
        for name, array in sample.items():
            assert np.array_equal(array, other[name])
            assert array.dtype == other[name].dtype
    labels = np.concatenate([sample["labels"] for sample in samples])
    assert np.array_equal(packed.valid_labels(), labels[labels != -100])
    batch = collate(samples, range(num_samples), 0)
    documents_of_rows = [sample["document_ids"].tolist() for sample in samples]
    positions = [naive_positions(row) for row in documents_of_rows]
    if batch.position_ids is None:
        assert batch.document_ids is None
        assert positions == [list(range(length))] * num_samples
    else:
        assert batch.position_ids.tolist() == positions
        assert batch.document_ids is not None
        assert batch.document_ids.tolist() == documents_of_rows
    assert batch.num_valid == len(packed.valid_labels())


def test_positions_start_again_at_each_document():
    ids = np.array([[4, 4, 4, 7, 7, -1], [2, 2, 2, 2, 2, 2]])
    assert position_ids_of(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


def test_the_tail_is_dropped_in_training_and_padded_in_evaluation():
    corpus = documents_from(["abcdef"])  # 7 tokens with the end
    assert len(pack(corpus, TOKENIZER, max_seq_length=4)) == 1
    assert pack(corpus, TOKENIZER, max_seq_length=4).sample(0)["labels"].tolist() == [*b"bcde"]
    whole = pack(corpus, TOKENIZER, max_seq_length=4, keep_tail=True)
    assert len(whole) == 2
    assert whole.sample(1)["input_ids"].tolist() == [*b"ef", EOS, PAD]
    assert whole.sample(1)["labels"].tolist() == [ord("f"), EOS, -100, -100]
    only = pack(corpus, TOKENIZER, max_seq_length=10)
    assert len(only) == 1
    assert only.sample(0)["document_ids"].tolist() == [0] * 7 + [-1] * 3


def test_tokenised_documents_keep_their_end_and_are_checked():
    packed = pack(documents_from([[1, 2], [3, EOS]]), TOKENIZER, max_seq_length=5)
    assert packed.tokens.tolist() == [1, 2, EOS, 3, EOS]
    with pytest.raises(ValueError, match=r"'memory:1' holds token ids from 5 to 900"):
        pack(documents_from([[1], [5, 900]]), TOKENIZER, max_seq_length=5)


def test_a_corpus_without_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to pack"):
        pack(documents_from(["", ""]), TOKENIZER, max_seq_length=4)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"1 documents could not be read, the first: .*a\.txt"):
        pack(load_documents("text", path=tmp_path / "a.txt"), TOKENIZER, max_seq_length=4)
    with pytest.raises(ValueError, match="max_seq_length is 0"):
        pack(documents_from(["x"]), TOKENIZER, max_seq_length=0)


def test_packing_the_standard_library_is_quick():
    corpus = load_documents("stdlib")
    begin = time.perf_counter()
    packed = pack(corpus, TOKENIZER, max_seq_length=512)
    seconds = time.perf_counter() - begin
    assert packed.num_tokens > 5_000_000
    assert seconds < 5, f"{packed.num_tokens} tokens took {seconds:.1f} s"  # 0.15 s on one core


class CountingTokenizer(ByteTokenizer):
    fingerprint = "counting"
    calls = 0

    def encode(self, text):
        type(self).calls += 1
        return super().encode(text)


def test_the_cache_gives_the_same_dataset_and_notices_changes(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 10)
    (tmp_path / "d.txt").write_bytes(b"\xff")
    cache = tmp_path / "cache"

    def build(length=4, part=None):
        CountingTokenizer.calls = 0
        corpus = load_documents("text", path=tmp_path / "*.txt")
        if part is not None:
            corpus = split_corpus(corpus, 0.5)[part]
        return pack(corpus, CountingTokenizer(), max_seq_length=length, cache_dir=cache)

    first = build()
    assert CountingTokenizer.calls == 3
    again = build(length=8)
    assert CountingTokenizer.calls == 0
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.document_starts, again.document_starts)
    assert again.skipped == first.skipped
    train, validation = build(part=0), build(part=1)
    assert train.num_tokens + validation.num_tokens == first.num_tokens, "a part has an entry of its own"
    tokens_file = next(path for path in cache.glob("*.tokens.npy") if len(np.load(path)) == first.num_tokens)
    tokens_file.write_bytes(tokens_file.read_bytes()[:-10])
    assert np.array_equal(build().tokens, first.tokens)
    assert CountingTokenizer.calls == 3, "a cut file is made anew"
    (tmp_path / "a.txt").write_text("changed!")
    assert build().num_tokens == first.num_tokens - 2
    assert not list(cache.glob("*.tmp"))


def test_the_unigram_loss_is_that_of_counting():
    train = pack(documents_from(["aab", "a"]), TOKENIZER, max_seq_length=3)
    validation = pack(documents_from(["abz"]), TOKENIZER, max_seq_length=3, keep_tail=True)
    # Counts with one added: a 4, b 2, end 3, any other 1; out of 6 + 258. The labels are b, z, end.
    expected = -(math.log(2 / 264) + math.log(1 / 264) + math.log(3 / 264)) / 3
    assert unigram_loss(train, validation, 258) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="vocab_size is 100"):
        unigram_loss(train, validation, 100)


def test_the_unigram_loss_of_the_standard_library_is_well_below_uniform():
    train, validation = split_corpus(load_documents("stdlib", limit=100), 0.1)
    packed = [pack(part, TOKENIZER, max_seq_length=128, keep_tail=True) for part in (train, validation)]
    assert 2.5 < unigram_loss(*packed, 258) < 4.0 < math.log(258)
