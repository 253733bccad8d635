"""Streams: a resume gives bitwise the samples of a run without a stop, from every kind of source."""

from __future__ import annotations

import json
from itertools import islice

import datasets
import numpy as np
import pytest

from moe_dist.data import ByteTokenizer, StreamingPackedDataset, documents_from, load_documents, split_corpus
from moe_dist.data.columns import Wanted
from moe_dist.data.dataset_sources import StreamSource


def generate(texts):
    for text in texts:
        yield {"text": text}


def corpora(texts, folder):
    """Name -> a function that builds the corpus anew, as a restarted process does."""
    iterable = datasets.Dataset.from_dict({"text": texts, "x": list(range(len(texts)))}).to_iterable_dataset(
        num_shards=3
    )
    for part in range(3):
        path = folder / f"{part}.jsonl"
        rows = [json.dumps({"text": text}) for text in texts[part::3]]
        rows.insert(5, "{broken")
        path.write_text("\n".join(rows))
        datasets.Dataset.from_dict({"text": texts[part::3]}).to_parquet(folder / f"{part}.parquet", batch_size=7)
        (folder / f"{part}.txt").write_bytes(b"\xff" if part == 1 else texts[part + 5].encode() * 5)
    (folder / "1a.parquet").write_bytes(b"PAR1 and no more")
    return {
        "list": lambda: documents_from(texts),
        "dataset": lambda: documents_from(datasets.Dataset.from_dict({"text": texts})),
        "iterable": lambda: documents_from(iterable),
        "mapped": lambda: documents_from(iterable.map(lambda row: {"text": row["text"].upper()})),
        "shuffled": lambda: documents_from(iterable.shuffle(seed=1, buffer_size=10)),
        "shuffled and mapped": lambda: documents_from(
            iterable.shuffle(seed=1, buffer_size=10).filter(lambda row: row["x"] % 5)
        ),
        "generator": lambda: documents_from(
            datasets.IterableDataset.from_generator(generate, gen_kwargs={"texts": texts})
        ),
        "jsonl": lambda: load_documents("jsonl", path=folder / "*.jsonl", streaming=True),
        "parquet": lambda: load_documents("parquet", path=folder / "*.parquet", streaming=True),
        "text": lambda: load_documents("text", path=folder / "*.txt", streaming=True),
        "limited": lambda: documents_from(iterable, limit=20),
        "training part": lambda: split_corpus(documents_from(iterable), 0.3)[0],
    }


KINDS = [
    "list",
    "dataset",
    "iterable",
    "mapped",
    "shuffled",
    "shuffled and mapped",
    "generator",
    "jsonl",
    "parquet",
    "text",
    "limited",
    "training part",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeat", [True, False])
def test_a_resumed_stream_gives_bitwise_the_same_samples(texts, tmp_path, kind, repeat):
    build_corpus = corpora(texts, tmp_path)[kind]

    def build() -> StreamingPackedDataset:
        return StreamingPackedDataset(build_corpus(), ByteTokenizer(), max_seq_length=48, repeat=repeat, keep_tail=True)

    reference = list(islice(build(), 150))
    assert len(reference) == 150 if repeat else len(reference) > 3
    for stop in (0, 1, 2, 3, len(reference) // 2, len(reference) - 1):
        first = build()
        assert len(list(islice(first, stop))) == stop
        state = json.loads(json.dumps(first.state_dict()))  # plain values, as a checkpoint may store them
        second = build()
        second.load_state_dict(state)
        assert second.state_dict() == first.state_dict(), "a second stop right after the first one"
        rest = list(islice(second, len(reference) - stop))
        assert_same_samples(rest, reference[stop:])
        skipped = build()
        skipped.skip(stop)
        assert_same_samples([next(skipped)], [reference[stop]])


def assert_same_samples(samples, others):
    assert len(samples) == len(others)
    for sample, other in zip(samples, others, strict=True):
        for name in ("input_ids", "labels", "document_ids"):
            assert np.array_equal(sample[name], other[name])
            assert sample[name].dtype == other[name].dtype


def test_the_state_of_datasets_is_used_where_it_is_exact(texts):
    read: list[str] = []

    def note(row):
        read.append(row["text"])
        return row

    iterable = datasets.Dataset.from_dict({"text": texts * 10}).to_iterable_dataset()
    assert StreamSource(iterable, "x", Wanted("text"))._exact_state
    assert not StreamSource(iterable.shuffle(seed=0, buffer_size=5), "x", Wanted("text"))._exact_state

    def build() -> StreamingPackedDataset:
        return StreamingPackedDataset(documents_from(iterable.map(note)), ByteTokenizer(), max_seq_length=32)

    first = build()
    first.skip(1000)
    state = first.state_dict()
    assert state["samples"] == 1000
    assert state["documents"] > 300
    assert len(state["buffer_tokens"]) < 200, "what is left of one document"
    expected = next(first)
    read.clear()
    second = build()
    second.load_state_dict(state)
    assert_same_samples([next(second)], [expected])
    assert len(read) < 20, "the rows before the saved point are not read again"


def test_reset_and_the_end_of_the_stream(texts):
    stream = StreamingPackedDataset(documents_from(texts), ByteTokenizer(), max_seq_length=32, repeat=False)
    first = list(stream)
    assert next(stream, None) is None
    assert stream.samples == len(first)
    assert stream.passes == 0
    stream.reset()
    assert_same_samples(list(stream), first)
    stream.reset()
    with pytest.raises(ValueError, match=f"cannot skip 1000 samples: the stream ended after {len(first)}"):
        stream.skip(1000)


def test_an_endless_stream_without_tokens_is_refused():
    stream = StreamingPackedDataset(documents_from(["", ""]), ByteTokenizer(), max_seq_length=4)
    with pytest.raises(ValueError, match="the stream has no token"):
        next(stream)


def test_a_state_of_another_length_is_refused(texts):
    state = StreamingPackedDataset(documents_from(texts), ByteTokenizer(), max_seq_length=4).state_dict()
    other = StreamingPackedDataset(documents_from(texts), ByteTokenizer(), max_seq_length=8)
    with pytest.raises(ValueError, match="saved with max_seq_length 4"):
        other.load_state_dict(state)
