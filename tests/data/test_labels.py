"""Labels and masks that rows of token ids bring: used through every source and both ways of packing, or refused."""

from __future__ import annotations

import json
from itertools import islice

import datasets
import numpy as np
import pytest

from moe_dist.data import ByteTokenizer, StreamingPackedDataset, documents_from, load_documents, pack
from moe_dist.data.packing import IGNORE_INDEX, PackedDataset

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_id
# Prompts of three to nine tokens, answers of four with their end; the last row is all prompt.
ROWS = [
    {
        "input_ids": [10 * n + place for place in range(3 + 2 * n)] + [1, 2, 3, EOS],
        "labels": [IGNORE_INDEX] * (3 + 2 * n) + [1, 2, 3, EOS],
    }
    for n in range(4)
] + [{"input_ids": [5, 6, 7, EOS], "labels": [IGNORE_INDEX] * 4}]
LENGTH = 8


def learned(samples) -> list[tuple[int, int]]:
    """(token, the label it foretells), of all labels that count, in order."""
    found = []
    for sample in samples:
        at = sample["labels"] != IGNORE_INDEX
        found += list(zip(sample["input_ids"][at].tolist(), sample["labels"][at].tolist(), strict=True))
    return found


def expected(rows) -> list[tuple[int, int]]:
    """By hand, as a model of Hugging Face shifts them: the label at place t + 1 is foretold at place t."""
    return [
        (row["input_ids"][place], row["labels"][place + 1])
        for row in rows
        for place in range(len(row["input_ids"]) - 1)
        if row["labels"][place + 1] != IGNORE_INDEX
    ]


def samples_of(corpus) -> list:
    if corpus.streaming:
        return list(StreamingPackedDataset(corpus, TOKENIZER, max_seq_length=LENGTH, repeat=False, keep_tail=True))
    packed = pack(corpus, TOKENIZER, max_seq_length=LENGTH, keep_tail=True)
    samples = [packed.sample(index) for index in range(len(packed))]
    assert [label for _, label in learned(samples)] == packed.valid_labels().tolist()
    assert packed.num_labels() == len(packed.valid_labels())
    return samples


def corpora(folder):
    table = datasets.Dataset.from_list(ROWS)
    table.to_json(folder / "rows.jsonl")
    table.to_parquet(folder / "rows.parquet")
    options = {"text_field": "input_ids"}
    return {
        "list": documents_from(ROWS, **options),
        "dataset": documents_from(table, **options),
        "stream": documents_from(table.to_iterable_dataset(), **options),
        "generator": documents_from(datasets.IterableDataset.from_generator(lambda: iter(ROWS)), **options),
        "jsonl": load_documents("jsonl", path=folder / "rows.jsonl", **options),
        "parquet": load_documents("parquet", path=folder / "rows.parquet", **options),
        "arrays": documents_from(table.with_format("numpy"), **options),
    }


def test_labels_are_used_from_every_source(tmp_path):
    """16 of 46 tokens are learned, as the data says. Seen to fail with the column dropped: all of them were."""
    for name, corpus in corpora(tmp_path).items():
        found = learned(samples_of(corpus))
        assert found == expected(ROWS), name
        assert len(found) == 16


def test_a_completion_mask_is_labels():
    masked = [
        {"input_ids": row["input_ids"], "completion_mask": [int(label != IGNORE_INDEX) for label in row["labels"]]}
        for row in ROWS
    ]
    assert learned(samples_of(documents_from(masked, text_field="input_ids"))) == expected(ROWS)
    both = [dict(row, labels=row["input_ids"]) for row in masked]
    assert learned(samples_of(documents_from(both, text_field="input_ids"))) == expected(ROWS)
    spoken = [{"input_ids": row["input_ids"], "assistant_masks": row["completion_mask"]} for row in masked]
    assert learned(samples_of(documents_from(spoken, text_field="input_ids"))) == expected(ROWS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_taken_out(side):
    """An attention mask of 0 marks no token of the text. Seen to fail with it dropped: padding was trained on."""

    def padded(values, filling):
        more = [filling] * (20 - len(values))
        return more + values if side == "left" else values + more

    rows = [
        {
            "input_ids": padded(row["input_ids"], 0),
            "labels": padded(row["labels"], 0),  # many copy the ids, padding too
            "attention_mask": padded([1] * len(row["input_ids"]), 0),
        }
        for row in ROWS
    ]
    for streaming in (False, True):
        table = datasets.Dataset.from_list(rows)
        corpus = documents_from(table.to_iterable_dataset() if streaming else table, text_field="input_ids")
        assert learned(samples_of(corpus)) == expected(ROWS)
    bare = [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in rows]
    packed = pack(documents_from(bare, text_field="input_ids"), TOKENIZER, max_seq_length=LENGTH)
    assert packed.tokens.tolist() == [token for row in ROWS for token in row["input_ids"]]
    assert packed.labels is None


def test_an_end_that_is_added_is_not_learned_and_rows_without_labels_are():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": None}]
    packed = pack(documents_from(rows, text_field="input_ids"), TOKENIZER, max_seq_length=7)
    assert packed.tokens.tolist() == [1, 2, 3, EOS, 4, 5, EOS]
    assert packed.sample(0)["labels"].tolist() == [2, 3, -100, -100, 5, EOS, -100]


def test_labels_may_differ_from_the_tokens_and_are_checked():
    rows = [{"input_ids": [1, 2, 3], "labels": [9, 8, 7]}]
    assert learned(samples_of(documents_from(rows, text_field="input_ids"))) == [(1, 8), (2, 7)]
    rows[0]["labels"][2] = 900
    with pytest.raises(ValueError, match=r"'memory:0' holds labels from 8 to 900|labels from 9 to 900"):
        samples_of(documents_from(rows, text_field="input_ids"))


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"labels": [1, 2]}, r"'labels' has 2 entries, 'input_ids' has 3"),
        ({"labels": [1, 2, -1]}, r"'labels' holds -1; allowed: token ids and -100"),
        ({"labels": 1}, r"'labels' is int, not a list"),
        ({"labels": [0.5, 1.0, 2.0]}, r"'labels' is not a list of whole numbers"),
        ({"labels": [[1], [2], [3]]}, r"'labels' is not a list of whole numbers"),
        ({"attention_mask": [1, 1]}, r"'attention_mask' has 2 entries"),
        ({"attention_mask": [1, 1, 2]}, r"'attention_mask' holds 2; allowed: 0 and 1"),
        ({"completion_mask": "011"}, r"'completion_mask' is str, not a list"),
        ({"loss_mask": [0, 1, 1]}, r"'loss_mask' is not understood: .*completion_mask"),
        ({"position_ids": [0, 1, 0]}, r"'position_ids' do not count from 0"),
        ({"seq_lengths": [1, 2]}, r"'seq_lengths' is not understood: several documents"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, beside, reason):
    row = {"input_ids": [1, 2, 3], **beside}
    with pytest.raises(ValueError, match=reason):
        list(documents_from([row], text_field="input_ids", on_error="fail"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": [4, 5]}) + "\n" + json.dumps(row) + "\n")
    corpus = load_documents("jsonl", path=tmp_path / "rows.jsonl", text_field="input_ids")
    assert len(list(corpus)) == 1
    assert "rows.jsonl, line 2" in corpus.skipped[0].reason


def test_text_with_labels_of_other_tokens_is_refused():
    """Its own ids say whose the labels are. A label of a whole text is nothing to a language model."""
    row = {"text": "abc", "input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    for rows in ([row], datasets.Dataset.from_list([row])):
        with pytest.raises(ValueError, match="'labels' belongs to 'input_ids': set text_field to input_ids"):
            list(documents_from(rows, on_error="fail"))
    for harmless in ({"text": "abc", "labels": 1, "input_ids": [1]}, {"text": "abc", "labels": [3]}):
        assert [document.text for document in documents_from([harmless])] == ["abc"]


def test_a_stream_with_labels_resumes(tmp_path):
    """The labels of what is left of a document are part of the state."""

    def build():
        corpus = documents_from(datasets.Dataset.from_list(ROWS).to_iterable_dataset(), text_field="input_ids")
        return StreamingPackedDataset(corpus, TOKENIZER, max_seq_length=5)

    reference = list(islice(build(), 12))
    for stop in range(12):
        first, second = build(), build()
        first.skip(stop)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = list(islice(second, 12 - stop))
        assert learned(rest) == learned(reference[stop:])


class KeptTokenizer(ByteTokenizer):
    fingerprint = "kept"


def test_the_cache_keeps_labels(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def build() -> PackedDataset:
        corpus = load_documents("jsonl", path=tmp_path / "rows.jsonl", text_field="input_ids")
        return pack(corpus, KeptTokenizer(), max_seq_length=LENGTH, cache_dir=tmp_path / "cache")

    first, again = build(), build()
    assert isinstance(again.labels, np.memmap)
    assert np.array_equal(first.labels, again.labels)
    assert first.sample(0)["labels"].tolist() == again.sample(0)["labels"].tolist()
