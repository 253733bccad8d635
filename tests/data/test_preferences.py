"""Preference data in trl's forms, a prompt with two answers: pairs stay together, odd rows are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import tokenizer_of

from moe_dist.data import ByteTokenizer, GlobalLoader, documents_from, eval_batches, load_documents, pack, split_corpus
from moe_dist.data.batch import collate
from moe_dist.data.chat_template import ChatEncoder
from moe_dist.data.conversations import Completion
from moe_dist.data.packing import PreferenceDataset
from moe_dist.data.preferences import preference_of
from moe_dist.data.streaming import StreamingPackedDataset
from moe_dist.data.tokenizer import HuggingFaceTokenizer

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q?"), ("assistant", "a"), ("assistant", "b"))
)
EARLIER = [
    {"role": "system", "content": "s"},
    USER,
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "r?"},
]
LENGTH = 48


def both(row: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(prompt, chosen answer, rejected answer) as text, or as the contents of turns with a mark on what is learned."""
    found = preference_of(row)
    if isinstance(found.chosen, Completion):
        assert isinstance(found.rejected, Completion)
        assert found.chosen.prompt == found.rejected.prompt
        return found.chosen.prompt, found.chosen.completion, found.rejected.completion
    told = []
    for side in (found.chosen, found.rejected):
        assert not isinstance(side, Completion)
        told.append([turn["content"] + "+" * learn for turn, learn in zip(side.turns, side.learned, strict=True)])
    common = sum(one == other for one, other in zip(*told, strict=False))
    return told[0][:common], told[0][common:], told[1][common:]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}, ("2+2=", " 4", " 5")),
        # Anthropic's helpful and harmless: the prompt is in both texts; a word is not cut in two.
        (
            {"chosen": "\n\nHuman: hi\n\nAssistant: good day", "rejected": "\n\nHuman: hi\n\nAssistant: go"},
            ("\n\nHuman: hi\n\nAssistant:", " good day", " go"),
        ),
        ({"chosen": "q a", "rejected": "q a b"}, ("q", " a", " a b")),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, (["q?"], ["a+"], ["b+"])),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, (["q?"], ["a+"], ["b+"])),
        # UltraFeedback: the turns have everything, and the prompt stands beside them as a text.
        ({"prompt": "q?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, (["q?"], ["a+"], ["b+"])),
        ({"prompt": "q?", "chosen": [GOOD], "rejected": [BAD]}, (["q?"], ["a+"], ["b+"])),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, (["q?"], ["a+"], ["b+"])),
        # Earlier answers are of the prompt, and not learned.
        ({"chosen": [*EARLIER, GOOD], "rejected": [*EARLIER, BAD]}, (["s", "q?", "c", "r?"], ["a+"], ["b+"])),
        ({"prompt": json.dumps([USER]), "chosen": "x", "rejected": "y"}, (json.dumps([USER]), "x", "y")),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, BAD, USER, GOOD], "prompt": None},
            (["q?"], ["a+"], ["b+", "q?", "a+"]),
        ),
        (
            {
                "prompt": [{"from": "human", "value": "q?"}],
                "chosen": [{"from": "gpt", "value": "a"}],
                "rejected": [BAD],
            },
            (["q?"], ["a+"], ["b+"]),
        ),
    ],
)
def test_what_a_row_says(row: dict[str, Any], wanted: tuple[Any, Any, Any]) -> None:
    assert both(row) == wanted


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "chosen": "a"}, "no 'rejected'"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "no 'chosen'"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "are the same: nothing to prefer"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "'rejected' has no answer"),
        ({"prompt": "p", "chosen": "a", "rejected": [BAD]}, "one is a text, the other turns"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "'prompt' is turns, 'chosen' and 'rejected' are texts"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
        ({"prompt": "pq", "chosen": "pqa", "rejected": "pqb"}, "begin with the prompt, which would be there twice"),
        ({"chosen": "a", "rejected": "b"}, "no beginning in common"),
        ({"prompt": "p", "chosen": 5, "rejected": 6}, "'chosen' is int, not a list of turns"),
        ({"prompt": "p", "chosen": "\ud800", "rejected": "b"}, "lone surrogate"),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "'chosen' is empty"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, "are the same"),
        ({"prompt": [USER], "chosen": [{"role": "boss", "content": "a"}], "rejected": [BAD]}, "role 'boss' is unknown"),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}, "other turns than the assistant's"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no turn in common"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "'chosen' has no answer"),
        ({"chosen": [USER, GOOD, USER], "rejected": [USER, GOOD, BAD]}, "answer different prompts"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "is not what a user asks in both"),
        (
            {"prompt": [USER], "chosen": [{**GOOD, "train": False}], "rejected": [BAD]},
            "'chosen': no turn that is learned",
        ),
    ],
)
def test_an_odd_row_is_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        preference_of(row)


def corpus(rows: list[Any], tokenizer: Any = None, **options: Any) -> Any:
    encoder = ChatEncoder(tokenizer or ByteTokenizer(), LENGTH, **options)
    return documents_from(rows, format="preference", chat=encoder)


def test_only_the_answer_is_learned_after_the_template_of_the_tokenizer() -> None:
    tokenizer = HuggingFaceTokenizer(tokenizer_of("chatml"), "chatml")
    (document,) = corpus([{"chosen": [USER, GOOD], "rejected": [USER, BAD]}], tokenizer)
    assert document.rejected is not None
    for ids, labels, answer in (
        (document.tokens, document.labels, "a"),
        (document.rejected.ids, document.rejected.labels, "b"),
    ):
        decode = tokenizer.inner.decode
        assert decode(list(ids)).startswith("<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n")
        assert decode([token for token in labels if token != -100]) == f"{answer}<|im_end|>"


TOO_LONG = {"prompt": "p" * 10, "chosen": "a" * 20, "rejected": "b" * 60}


def test_a_pair_that_is_too_long_is_cut_or_left_out_as_one_and_named() -> None:
    """Seen red: cut off without a word."""
    found = corpus([TOO_LONG])
    (document,) = found
    assert document.rejected is not None
    assert [len(document.tokens), len(document.rejected.ids)] == [31, LENGTH]
    (cut,) = found.truncated
    assert (
        "'rejected' has 71 tokens, and max_seq_length is 48: cut off, 21 of 21 learned tokens of 'chosen'" in cut.reason
    )
    assert "38 of 61 learned tokens of 'rejected' stay" in cut.reason
    left_out = {
        "of the answer in 'chosen' is left": TOO_LONG | {"prompt": "p" * 50},
        "what is left of 'chosen' and 'rejected' are the same tokens": {
            "prompt": "p",
            "chosen": "a" * 60 + "b",
            "rejected": "a" * 61,
        },
    }
    for reason, row in left_out.items():
        found = corpus([row])
        assert list(found) == []
        assert reason in found.skipped[0].reason
    found = corpus([TOO_LONG], on_overlong="drop")
    assert list(found) == []
    assert "'rejected' has 71 tokens" in found.skipped[0].reason
    with pytest.raises(ValueError, match=r"'rejected' has 71 tokens, and max_seq_length is 48 \(on_overlong=error"):
        list(corpus([TOO_LONG], on_overlong="error"))


ROWS = [{"prompt": f"q{n}", "chosen": "a" * (1 + n % 9), "rejected": "b" * (1 + n * 7 % 11)} for n in range(40)]


def packed(rows: list[Any] = ROWS, **options: Any) -> PreferenceDataset:
    found = pack(corpus(rows), ByteTokenizer(), max_seq_length=LENGTH, **options)
    assert isinstance(found, PreferenceDataset)
    return found


@pytest.mark.parametrize("together", [True, False])
def test_a_pair_is_in_one_sample_its_answers_below_each_other(together: bool) -> None:
    """Each pair once, whole, on both sides. Seen red: the last rejected answer of a row left out."""
    dataset, seen = packed(packed=together), []
    assert (dataset.num_pairs, dataset.num_documents) == (40, 40)
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        assert sample["input_ids"].shape == (2, LENGTH)
        above, below = (list(dict.fromkeys(row[row >= 0].tolist())) for row in sample["document_ids"])
        assert [number + 1 for number in above] == below
        for side, numbers in enumerate((above, below)):
            for number in numbers:
                here = sample["document_ids"][side] == number
                row = ROWS[number // 2]
                answer = row["chosen" if side == 0 else "rejected"]
                text = ByteTokenizer().decode(sample["input_ids"][side][here])
                assert text == row["prompt"] + answer
                labels = sample["labels"][side][here]
                assert ByteTokenizer().decode(labels[labels >= 0]) == answer
        seen += [number // 2 for number in above]
    assert seen == list(range(40))
    assert len(dataset) == 40 if not together else len(dataset) < 20


def test_tokens_of_the_cache_are_the_same_pairs(tmp_path: Path) -> None:
    """Seen red: a tokenizer of `transformers` was asked for the tokens of no text, which it does not survive."""
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(map(json.dumps, ROWS)) + '\n{"prompt": "p", "chosen": "x"}\n{broken\n'
    )

    tokenizer = HuggingFaceTokenizer(tokenizer_of(None), "words")  # tokens of bytes are not kept

    def read() -> Any:
        encoder = ChatEncoder(tokenizer, LENGTH)
        rows = load_documents("jsonl", path=tmp_path / "rows.jsonl", format="preference", chat=encoder)
        found = split_corpus(rows, 0.2)
        return [pack(part, tokenizer, max_seq_length=LENGTH, cache_dir=tmp_path) for part in found]

    found = read()
    for first, again in zip(found, read(), strict=True):
        assert isinstance(again.tokens, np.memmap)
        assert first.num_pairs == again.num_pairs > 0
        for index in range(len(first)):
            one, other = first.sample(index), again.sample(index)
            assert all(np.array_equal(one[name], other[name]) for name in one)
    reasons = " ".join(entry.reason for part in found for entry in part.skipped)
    assert "line 41" in reasons
    assert "no 'rejected'" in reasons
    assert "line 42" in reasons


def test_rows_of_parquet_are_the_same_pairs(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "score": 0.5}] * 3
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    encoder = ChatEncoder(ByteTokenizer(), LENGTH)
    found = load_documents("parquet", path=tmp_path / "rows.parquet", format="preference", chat=encoder)
    (first, *_) = list(found)
    assert len(list(found)) == 3
    assert first.rejected is not None
    assert ByteTokenizer().decode(first.rejected.ids) == "User: q?\nAssistant: b"


def test_pairs_of_a_micro_batch_are_numbered_though_one_comes_twice() -> None:
    """As where an epoch ends and the next begins: two sequences. Seen red: numbered by document, as one."""
    dataset = packed()
    dataset.reference = np.arange(80.0).reshape(40, 2)
    batch = collate([dataset.sample(1), dataset.sample(1), dataset.sample(0)], [1, 1, 0], 0)
    assert batch.pairs is not None
    assert batch.pairs.reference is not None
    numbers = batch.pairs.numbers.tolist()
    again = len(np.unique(dataset.sample(1)["document_ids"])) // 2
    assert numbers[:again] == numbers[again : 2 * again]
    assert batch.pairs.reference.tolist() == [[2.0 * number, 2.0 * number + 1] for number in numbers]
    assert batch.document_ids is not None
    ids, documents = batch.pairs.sequence_ids.numpy(), batch.document_ids.numpy()
    assert (ids[documents < 0] == 2 * len(numbers)).all()
    for number, pair in enumerate(numbers):
        for side in (0, 1):
            rows = np.unique(np.nonzero(ids == 2 * number + side)[0])
            assert len(rows) == 1
            assert rows[0] % 2 == side
            assert (documents[ids == 2 * number + side] == 2 * pair + side).all()
    assert batch.num_terms == len(numbers)


def test_every_pair_is_trained_and_evaluated_once() -> None:
    dataset = packed()
    loader = GlobalLoader(dataset, micro_batch_size=len(dataset), num_replicas=1, replica=0)
    (batch,) = loader.next_step()
    assert batch.pairs is not None
    assert sorted(batch.pairs.numbers.tolist()) == list(range(40))
    batches = [one for replica in range(3) for one in eval_batches(dataset, 2, 3, replica)]
    assert {tuple(one.input_ids.shape) for one in batches} == {(4, LENGTH)}
    assert sorted(number for one in batches if one.pairs for number in one.pairs.numbers.tolist()) == list(range(40))


def test_preferences_are_no_stream_and_no_side_is_longer_than_a_row() -> None:
    with pytest.raises(ValueError, match="not read as a stream"):
        StreamingPackedDataset(corpus(ROWS), ByteTokenizer(), max_seq_length=LENGTH)
    with pytest.raises(ValueError, match="a pair has 15 tokens on one side, and max_seq_length is 14"):
        pack(corpus(ROWS), ByteTokenizer(), max_seq_length=14)
