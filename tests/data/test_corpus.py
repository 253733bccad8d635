"""Documents: their sources and order, and what happens to those that cannot be read."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from moe_dist.data import documents_from, load_documents, split_corpus


def ids(corpus) -> list[str]:
    return [document.id for document in corpus]


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import moe_dist.data, sys; "
        "print([m for m in ('torch', 'datasets', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_standard_library_is_a_real_corpus():
    corpus = load_documents("stdlib")
    documents = {document.id: document.text for document in corpus}
    assert list(documents) == sorted(documents)
    assert len(documents) > 300
    assert sum(map(len, documents.values())) > 5_000_000
    assert documents["json/decoder.py"] == Path(json.decoder.__file__).read_text(encoding="utf-8")
    assert not [id_ for id_ in documents if {"test", "tests", "site-packages"} & set(id_.split("/")[:-1])]
    assert corpus.skipped == []


def test_text_files_are_documents_named_by_their_path_below_the_glob(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/d.md"):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"\ufeff{name}\r\n".encode())
    corpus = load_documents("text", path=tmp_path / "corpus/**/*.txt")
    assert [(document.id, document.text) for document in corpus] == [
        ("a.txt", "a.txt\r\n"),
        ("b.txt", "b.txt\r\n"),
        ("deep/c.txt", "deep/c.txt\r\n"),
    ]
    several = load_documents("text", path=[str(tmp_path / "corpus/deep/*"), str(tmp_path / "corpus/**/*.txt")])
    assert ids(several) == ["c.txt", "d.md", "a.txt", "b.txt"], "the file matched twice comes once"
    assert ids(load_documents("text", path=tmp_path / "corpus/**/*.txt", limit=2)) == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("content", "offset", "reason"),
    [
        (b"fine so far \xff and no further", 12, "not UTF-8"),
        ("cut within é".encode()[:-1], 11, "truncated"),
        ("text".encode("utf-16"), 0, "not UTF-8"),
    ],
)
def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path, content, offset, reason):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(content)
    (tmp_path / "c.txt").write_text("good too")
    corpus = load_documents("text", path=tmp_path / "*.txt")
    for _ in range(2):  # a second pass counts afresh
        assert ids(corpus) == ["a.txt", "c.txt"]
        (skipped,) = corpus.skipped
        assert (skipped.id, skipped.offset) == ("b.txt", offset)
        assert reason in skipped.reason
        assert str(tmp_path / "b.txt") in skipped.reason
    strict = load_documents("text", path=tmp_path / "*.txt", on_error="fail")
    with pytest.raises(ValueError, match=rf"b\.txt, byte {offset}: .*{reason}.*on_error='skip'"):
        list(strict)


def test_a_truncated_gzip_file_is_named(tmp_path):
    whole = gzip.compress(np.random.default_rng(0).bytes(5000).hex().encode())
    (tmp_path / "a.txt.gz").write_bytes(whole)
    (tmp_path / "b.txt.gz").write_bytes(whole[: len(whole) // 2])
    corpus = load_documents("text", path=tmp_path / "*.gz")
    assert [len(document.text) for document in corpus] == [10000]
    assert corpus.skipped[0].id == "b.txt.gz"
    assert "end-of-stream" in corpus.skipped[0].reason


def test_a_broken_jsonl_row_is_named_with_line_and_byte(tmp_path):
    rows = [
        b'{"text": "one"}',
        b'{"text": "t\xc3\xa9", "x": }',
        b"",
        b'{"text": "three"}',
        b'{"other": 1}',
        b'["list"]',
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": [1, 2, 3]}',
        b'{"text": "cut of',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(rows))
    corpus = load_documents("jsonl", path=path)
    documents = list(corpus)
    assert [document.text for document in documents] == ["one", "three", None]
    assert list(documents[2].tokens) == [1, 2, 3]
    assert [document.id for document in documents] == ["rows.jsonl:1", "rows.jsonl:4", "rows.jsonl:10"]
    expected = {
        2: "broken JSON",
        5: "no field 'text'",
        6: "not an object",
        7: "int, not text",
        8: "not UTF-8",
        9: "lone surrogate",
        11: "broken JSON",
    }
    assert [skipped.id for skipped in corpus.skipped] == [f"rows.jsonl:{line}" for line in expected]
    for skipped, (line, reason) in zip(corpus.skipped, expected.items(), strict=True):
        assert f"{path}, line {line}, byte" in skipped.reason
        assert reason in skipped.reason
    assert corpus.skipped[0].offset == len(rows[0]) + 1 + rows[1].index(b"}")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2, byte 37: broken JSON"):
        list(load_documents("jsonl", path=path, on_error="fail"))


def write_parquet(path: Path, rows: list[str], column: str = "text") -> None:
    datasets.Dataset.from_dict({column: rows, "number": list(range(len(rows)))}).to_parquet(path)


def test_parquet_rows_are_documents_and_a_truncated_file_is_named(tmp_path):
    write_parquet(tmp_path / "a[1].parquet", ["one", "two"])
    write_parquet(tmp_path / "b.parquet", ["three"])
    write_parquet(tmp_path / "c.parquet", ["four"])
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    corpus = load_documents("parquet", path=tmp_path / "*.parquet")
    found = [(document.id, document.text) for document in corpus]
    assert found == [("a[1].parquet:0", "one"), ("a[1].parquet:1", "two"), ("c.parquet:0", "four")]
    (skipped,) = corpus.skipped
    assert skipped.id == "b.parquet"
    assert skipped.offset == len(whole) // 2
    assert "truncated" in skipped.reason
    with pytest.raises(ValueError, match=r"b\.parquet.*truncated"):
        list(load_documents("parquet", path=tmp_path / "*.parquet", on_error="fail"))


def test_damaged_parquet_data_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", [f"row {i} {i * i}" for i in range(3000)])
    write_parquet(tmp_path / "b.parquet", ["good"])
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    damaged[4:400] = b"\xff" * 396  # the header of the first page; the footer stays whole
    (tmp_path / "a.parquet").write_bytes(damaged)
    corpus = load_documents("parquet", path=tmp_path / "*.parquet")
    assert [document.text for document in corpus] == ["good"]
    assert str(tmp_path / "a.parquet") in corpus.skipped[0].reason
    assert "damaged" in corpus.skipped[0].reason


def test_a_glob_that_matches_nothing_is_named_with_what_is_there(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(ValueError, match=r"corpsu\.txt' matches no file.*corpus\.txt"):
        load_documents("text", path=tmp_path / "corpsu.txt")
    with pytest.raises(ValueError, match=r"none/\*\.txt' matches no file.*holds \['corpus\.txt'\]"):
        load_documents("text", path=tmp_path / "none" / "*.txt")
    with pytest.raises(ValueError, match="it is a folder, give a glob"):
        load_documents("text", path=tmp_path)
    with pytest.raises(ValueError, match="needs `path`"):
        load_documents("jsonl")


def test_a_missing_text_field_is_named_with_the_fields_there_are(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"texts": "x", "id": 1}\n')
    write_parquet(tmp_path / "rows.parquet", ["x"], column="texts")
    dataset = datasets.Dataset.from_dict({"texts": ["x"]})
    generated = datasets.IterableDataset.from_generator(lambda: iter([{"texts": "x"}]))
    for build in (
        lambda: load_documents("jsonl", path=tmp_path / "rows.jsonl"),
        lambda: load_documents("parquet", path=tmp_path / "rows.parquet"),
        lambda: documents_from(dataset),
        lambda: documents_from(generated),
        lambda: documents_from([{"texts": "x"}]),
    ):
        with pytest.raises(ValueError, match=r"no field 'text'.*'texts'.*did you mean 'texts'"):
            build()


def test_objects_in_memory_are_corpora():
    rows = ["one", "two"]
    for dataset in (
        rows,
        [{"text": row} for row in rows],
        datasets.Dataset.from_dict({"text": rows, "x": [1, 2]}),
        datasets.Dataset.from_dict({"text": rows}).to_iterable_dataset(),
    ):
        corpus = documents_from(dataset)
        for _ in range(2):
            assert [(d.id, d.text) for d in corpus] == [("memory:0", "one"), ("memory:1", "two")]
    tokens = [document.tokens for document in documents_from([[1, 2], np.array([3], dtype=np.uint16)])]
    assert [list(ids) for ids in tokens] == [[1, 2], [3]]
    for wrong in (5, "text", {"text": "x"}):
        with pytest.raises(ValueError, match="give a list of texts"):
            documents_from(wrong)
    with pytest.raises(ValueError, match="several splits"):
        documents_from(datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": rows})))
    with pytest.raises(ValueError, match="is empty"):
        documents_from([])


def test_a_large_dataset_is_read_in_row_order():
    rows = [f"row {i}" for i in range(1000)]
    assert [d.text for d in documents_from(datasets.Dataset.from_dict({"text": rows}))] == rows


@pytest.mark.parametrize("streaming", [False, True])
def test_huggingface_datasets_load_by_name(tmp_path, streaming):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "three"}\n')
    corpus = load_documents("huggingface", name=str(tmp_path), streaming=streaming)
    assert [document.text for document in corpus] == ["one", "three"]
    assert corpus.streaming is streaming
    assert corpus.skipped[0].offset == 1
    with pytest.raises(ValueError, match=r"split 'nowhere'.*cannot be loaded"):
        load_documents("huggingface", name=str(tmp_path), split="nowhere", streaming=streaming)
    with pytest.raises(ValueError, match="needs `name`"):
        load_documents("huggingface")


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="'wiki' is unknown; allowed: stdlib"):
        load_documents("wiki")
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        load_documents("stdlib", on_error="ignore")
    with pytest.raises(ValueError, match="limit is 0"):
        load_documents("stdlib", limit=0)


def test_the_split_shares_no_document_and_loses_none(texts):
    corpus = documents_from(texts)
    train, validation = split_corpus(corpus, 0.2, seed=3)
    train_ids, validation_ids = ids(train), ids(validation)
    assert set(train_ids).isdisjoint(validation_ids)
    assert set(train_ids) | set(validation_ids) == set(ids(corpus))
    assert 3 <= len(validation_ids) <= 25
    assert ids(split_corpus(corpus, 0.2, seed=4)[1]) != validation_ids
    # Written down: a split that moves between machines or versions would mix the two sides of a resumed run.
    assert validation_ids[:4] == ["memory:12", "memory:17", "memory:23", "memory:27"]


def test_empty_documents_fill_no_side_of_a_split():
    """The only document with text is for training, whatever its draw. Seen to fail with empty ones counted: then
    training had nothing, for a good document beside four empty ones.
    """
    for seed in range(20):
        corpus = documents_from(["", "", "the only one with text", "", ""])
        train, validation = split_corpus(corpus, 0.5, seed=seed)
        assert "the only one with text" in [document.text for document in train]
        assert not any(document.text for document in validation)


def test_the_split_of_the_standard_library_shares_no_document():
    train, validation = split_corpus(load_documents("stdlib"), 0.05)
    assert set(ids(train)).isdisjoint(ids(validation))
    assert len(ids(validation)) >= 10


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("num_documents", [1, 2, 3])
def test_a_small_corpus_has_documents_on_both_sides(num_documents, fraction):
    train, validation = split_corpus(documents_from(["text"] * num_documents), fraction)
    assert len(ids(train)) + len(ids(validation)) == num_documents
    assert ids(train)
    assert ids(validation) or num_documents == 1


def test_only_readable_documents_count_for_the_split(tmp_path):
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_bytes(b"good" if name in "be" else b"\xff")
    train, validation = split_corpus(load_documents("text", path=tmp_path / "*.txt"), 0.5)
    assert len(ids(train)) == len(ids(validation)) == 1
    assert len(train.skipped) + len(validation.skipped) == 4


def test_a_split_of_zero_and_a_wrong_split(texts):
    train, validation = split_corpus(documents_from(texts), 0.0)
    assert len(ids(train)) == len(texts)
    assert ids(validation) == []
    for fraction in (-0.1, 1.0, 3):
        with pytest.raises(ValueError, match="validation_split"):
            split_corpus(documents_from(texts), fraction)
