"""Conversations: known by their columns, in tokens by the tokenizer's template, learned where the assistant speaks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import KINDS, tokenizer_of

from moe_dist.data import ByteTokenizer, HuggingFaceTokenizer, documents_from
from moe_dist.data.chat_template import ChatEncoder, chat_prompt
from moe_dist.data.conversations import CHAT, conversation_of
from moe_dist.data.tokenised import TokenRow
from moe_dist.data.tokenizer import Tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "seven"},
    {"role": "user", "content": "And the naïve \n\n☃ answer?"},
    {"role": "assistant", "content": "\nthe answer is 7 ☃"},
]
CALL = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "look", "arguments": '{"at": "Rome"}'}}],
    },
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "Sun."},
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
# What is learned of TALK, by hand.
LEARNED = {
    "chatml": ["seven<|im_end|>", "\nthe answer is 7 ☃<|im_end|>"],
    "llama3": ["seven<|eot_id|>", "the answer is 7 ☃<|eot_id|>"],
    "mistral": [" seven</s>", " \nthe answer is 7 ☃</s>"],
    "gemma": ["seven<end_of_turn>", "the answer is 7 ☃<end_of_turn>"],
    "tools": ["seven<|im_end|>", "\nthe answer is 7 ☃<|im_end|>"],
}


def wrapped(kind: str | None, marked: bool = False) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(tokenizer_of(kind, marked), str(kind))


def encoded(tokenizer: Tokenizer, turns: Sequence[dict[str, Any]], turns_learned: Any = "all", **row: Any) -> TokenRow:
    return ChatEncoder(tokenizer, turns=turns_learned)(conversation_of({"messages": turns, **row}, CHAT))


def stretches(tokenizer: HuggingFaceTokenizer, row: TokenRow) -> list[str]:
    """The texts of the runs of learned tokens."""
    assert row.labels is not None
    learned = row.labels != -100
    assert (row.labels[learned] == row.ids[learned]).all()
    runs = np.split(np.arange(len(learned)), np.flatnonzero(np.diff(learned)) + 1)
    return [tokenizer.inner.decode(row.ids[run].tolist()) for run in runs if learned[run[0]]]


@pytest.mark.parametrize("marked", [False, True], ids=["prefix", "marks"])
@pytest.mark.parametrize("kind", sorted(LEARNED))
def test_what_the_assistant_says_is_learned_and_nothing_else(kind: str, marked: bool) -> None:
    """Seen red with the mask shifted by one, and with the prompt learned."""
    tokenizer = wrapped(kind, marked)
    row = encoded(tokenizer, TALK)
    assert stretches(tokenizer, row) == LEARNED[kind]
    whole = tokenizer.inner.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert row.ids.tolist() == list(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_difference_equals_the_marks_of_the_template(kind: str) -> None:
    """Templates of which the marks have been taken out. The first turns are those that all six can tell."""
    cases = [(TALK[:3], {}), ([TALK[1], TALK[2]], {})]
    if kind == "tools":
        cases += [(CALL, {"tools": TOOLS}), (CALL, {})]
    if kind == "qwen3":
        cases += [([TALK[1], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nseven"}], {})]
        cases += [([TALK[1], {**TALK[2], "reasoning_content": "hm, hm"}], {})]
    for turns, row in cases:
        marks, prefix = (encoded(wrapped(kind, marked), turns, **row) for marked in (True, False))
        assert marks.labels is not None
        assert prefix.labels is not None
        assert marks.ids.tolist() == prefix.ids.tolist()
        assert marks.labels.tolist() == prefix.labels.tolist()
        assert (marks.labels != -100).any()


def test_tool_calls_are_learned_and_what_tools_answer_is_not() -> None:
    tokenizer = wrapped("tools")
    row = encoded(tokenizer, CALL, tools=json.dumps(TOOLS))
    call = '<tool_call>{"name": "look", "arguments": {"at": "Rome"}}</tool_call><|im_end|>'
    assert stretches(tokenizer, row) == [call, "Sun.<|im_end|>"]
    assert '"name": "look", "parameters"' in tokenizer.inner.decode(row.ids.tolist())
    sharegpt = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "Rome"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Sun."},
    ]
    other = ChatEncoder(tokenizer)(conversation_of({"conversations": sharegpt, "tools": TOOLS}, CHAT))
    assert other.ids.tolist() == row.ids.tolist()
    assert other.labels is not None
    assert row.labels is not None
    assert other.labels.tolist() == row.labels.tolist()


@pytest.mark.parametrize("marked", [False, True], ids=["prefix", "marks"])
@pytest.mark.parametrize("no", [{"train": False}, {"weight": 0}])
def test_a_turn_may_be_left_out(marked: bool, no: dict[str, Any]) -> None:
    tokenizer = wrapped("chatml", marked)
    turns = [*TALK[:2], {**TALK[2], **no}, *TALK[3:]]
    assert stretches(tokenizer, encoded(tokenizer, turns)) == LEARNED["chatml"][1:]
    assert stretches(tokenizer, encoded(tokenizer, TALK, "last")) == LEARNED["chatml"][1:]
    turns = [*TALK[:4], {**TALK[4], **no}]
    assert stretches(tokenizer, encoded(tokenizer, turns)) == LEARNED["chatml"][:1]


def test_a_turn_that_the_template_rewrites_later_is_refused() -> None:
    """Qwen3 leaves out earlier thinking: what is there is not what the prompt before it leads to."""
    tokenizer = wrapped("qwen3")
    with pytest.raises(ValueError, match=r"turn 3 \(assistant\).*data.assistant_turns=last"):
        encoded(tokenizer, TALK)
    last = ["<think>\n\n</think>\n\nthe answer is 7 ☃<|im_end|>"]
    assert stretches(tokenizer, encoded(tokenizer, TALK, "last")) == last


def test_what_a_template_leaves_out_is_refused() -> None:
    silent = wrapped("chatml")
    silent.inner.chat_template = "{% for m in messages if m.role != 'system' %}<s>{{ m.content }}</s>{% endfor %}"
    with pytest.raises(ValueError, match=r"turn 1 \(system\).*leaves its content out"):
        encoded(silent, TALK)
    with pytest.raises(ValueError, match=r"refuses this: .*alternate"):
        encoded(wrapped("gemma"), [TALK[1], TALK[1], TALK[2]])


def test_the_byte_tokenizer_has_a_plain_form() -> None:
    row = encoded(ByteTokenizer(), TALK[:3])
    assert ByteTokenizer().decode(row.ids) == "System: Be brief.\nUser: What is 3 + 4?\nAssistant: seven"
    assert row.labels is not None
    assert ByteTokenizer().decode(row.labels[row.labels != -100]) == " seven"
    assert row.labels[-1] == ByteTokenizer.eos_id


@pytest.mark.parametrize("kind", [None, "chatml"])
def test_a_model_is_asked_in_the_form_in_which_it_has_learned(kind: str | None) -> None:
    """What is learned first is the assistant's first token: all before it is the prompt. Seen to fail with contents
    that follow each other."""
    tokenizer = ByteTokenizer() if kind is None else wrapped(kind)
    row = encoded(tokenizer, TALK[:3])
    learned = int(np.flatnonzero(row.labels != -100)[0])
    assert chat_prompt(tokenizer, TALK[:2]) == row.ids[:learned].tolist()


def test_a_tokenizer_without_a_template_is_refused_before_anything_is_read() -> None:
    chat = ChatEncoder(wrapped(None))
    with pytest.raises(ValueError, match=r"no chat template.*instruction-tuned.*chat_template.jinja"):
        documents_from([{"messages": TALK}], chat=chat)
    (document,) = documents_from([{"prompt": "a", "completion": "b"}], chat=chat)
    assert chat.tokenizer.decode(np.asarray(document.tokens)) == "ab"


SAME = "<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
ROWS: dict[str, dict[str, Any]] = {
    "openai": {"messages": [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Add.\n\n"}, {"type": "text", "text": "1 2"}]},
            {"role": "assistant", "content": "3", "tool_calls": None},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Add.\n\n1 2"}, {"from": "gpt", "value": "3"}]},
    "turns": {
        "prompt": [{"role": "user", "content": "Add.\n\n1 2"}],
        "completion": [{"role": "assistant", "content": "3"}],
    },
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3"},
}


def test_formats_are_known_by_their_columns_and_may_be_mixed(tmp_path: Path) -> None:
    import datasets

    from moe_dist.data import load_documents

    chat = ChatEncoder(wrapped("chatml"))
    rows = list(ROWS.values())
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [ROWS["alpaca"], ROWS["alpaca"]]
    datasets.Dataset.from_list(texts).to_parquet(tmp_path / "rows.parquet")
    openai = datasets.Dataset.from_list([ROWS["openai"], ROWS["openai"]])
    for corpus, count in (
        (documents_from(rows, chat=chat), 5),
        (load_documents("jsonl", path=tmp_path / "rows.jsonl", chat=chat), 5),
        (load_documents("parquet", path=tmp_path / "rows.parquet", chat=chat), 2),
        (documents_from(openai, chat=chat), 2),
        (documents_from(openai.to_iterable_dataset(), chat=chat), 2),
    ):
        found = list(corpus)
        assert corpus.skipped == []
        assert corpus.whole
        assert len(found) == count
        for document in found:
            assert document.tokens is not None
            assert chat.tokenizer.inner.decode(list(document.tokens)) == SAME  # type: ignore[attr-defined]
            assert document.labels is not None
            assert int((np.asarray(document.labels) != -100).sum()) == 2


def test_texts_to_complete_need_no_template() -> None:
    row = {"prompt": "the question ", "completion": "is what"}
    (document,) = documents_from([row], chat=ChatEncoder(ByteTokenizer()))
    labels = np.asarray(document.labels)
    assert ByteTokenizer().decode(np.asarray(document.tokens)) == "the question is what"
    assert ByteTokenizer().decode(labels[labels != -100]) == "is what"
    assert labels[-1] == ByteTokenizer.eos_id


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({**ROWS["openai"], "text": "x"}, {}, "choose: data.format=chat .messages., or data.format=text"),
        ({**ROWS["openai"], **ROWS["alpaca"]}, {}, "choose: data.format=chat .*, or data.format=instruction"),
        (ROWS["alpaca"], {"text_field": "output"}, "or data.format=text .every token of 'output'"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {},
            "columns of preferences .chosen, rejected.: data.format=preference learns which",
        ),
        (
            {"Question": "q", "Answer": "a"},
            {"text_field": "Answer"},
            "under names that are not known: call them messages",
        ),
        ({"foo": 1}, {"format": "chat"}, "nothing of data.format=chat .messages or conversations.; it has .'foo'"),
        ({"foo": 1}, {"format": "dpo"}, "format is 'dpo'; allowed: auto, text, chat"),
    ],
)
def test_what_is_not_plain_stops_with_the_choices(row: dict[str, Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        documents_from([row], chat=ChatEncoder(wrapped("chatml")), **options)
