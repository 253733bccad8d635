"""Odd files of conversations: each row is trained right, or named with its file and line; alone it ends with code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import save_tokenizer, tokenizer_of
from command_line import Say

from moe_dist.data import HuggingFaceTokenizer, load_documents
from moe_dist.data.chat_template import ChatEncoder

USER, SEVEN = {"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "seven"}
GOOD = json.dumps({"messages": [USER, SEVEN]})


def said(*turns: Any, **row: Any) -> str:
    return json.dumps({"messages": turns, **row})


DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
# What stands on the second line of a file, and what must be said about it.
REFUSED = {
    "empty turn": (said({"role": "user", "content": " "}, SEVEN), "turn 1 (user) is empty"),
    "empty answer": (said(USER, {"role": "assistant", "content": ""}), "turn 2 (assistant) is empty"),
    "two systems": (
        said({"role": "system", "content": "a"}, {"role": "system", "content": "b"}, USER, SEVEN),
        "turn 2 is a second system turn",
    ),
    "system later": (
        said(USER, {"role": "system", "content": "a"}, SEVEN),
        "turn 2 is a system turn, and not the first",
    ),
    "assistant first": (said(SEVEN, USER, SEVEN), "turn 1 (assistant): the chat template of"),
    "content None": (said(USER, {"role": "assistant", "content": None}), "turn 2 (assistant) has no content"),
    "broken JSON": ('{"messages": [{"role": "user"', "broken JSON"),
    "unknown role": (said({"role": "bot", "content": "x"}, SEVEN), "turn 1: role 'bot' is unknown; known: assistant"),
    "role is no text": (said({"role": 1, "content": "x"}, SEVEN), "turn 1: role 1 is unknown"),
    "missing role": (said({"content": "x"}, SEVEN), "turn 1 has no 'role' (or 'from'); it has ['content']"),
    "missing key": (json.dumps({"foo": 1}), "no conversation (fields: ['foo'])"),
    "nested lists": (said([USER, SEVEN]), "turn 1 is list, not an object"),
    "deep": (json.dumps({"messages": DEEP}), "turn 1 is list, not an object"),
    "surrogate": (
        r'{"messages": [{"role": "user", "content": "a\ud800"}]}',
        "turn 1 (user): lone surrogate at character 1",
    ),
    "number": (said({"role": "user", "content": 7}, SEVEN), "turn 1 (user): its content is int, not text"),
    "picture": (
        said({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, SEVEN),
        "turn 1 (user): a part of its content is image_url, not text",
    ),
    "double key": ('{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}', "'role' is given twice"),
    "users alone": (said(USER, USER), "no turn of the assistant: nothing to learn"),
    "none learned": (said(USER, {**SEVEN, "train": False}), "no turn that is learned"),
    "train is text": (
        said(USER, {**SEVEN, "train": "no"}),
        "turn 2 (assistant): 'train' is 'no'; allowed: true and false",
    ),
    "user learned": (said({**USER, "train": True}, SEVEN), "turn 1 (user): only what the assistant says is learned"),
    "no turns": (said(), "'messages' is empty"),
    "an array": (f"[{GOOD}]", "a JSON list, not an object"),
    "two kinds": (said(USER, SEVEN, prompt="a", completion="b"), "could be chat or prompt_completion"),
    "two talks": (said(USER, SEVEN, conversations=[]), "both messages and conversations; which one?"),
    "call without name": (
        said(USER, {"role": "assistant", "tool_calls": [{"function": {}}]}),
        "turn 2 (assistant): a tool call without a function's name",
    ),
    "arguments": (
        said(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}),
        "arguments of f: a text that is not JSON",
    ),
}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"n": 1}}}]}
# What stands on the second line, and what is learned of it.
TRAINED = {
    "system None": (said({"role": "system", "content": ""}, USER, SEVEN), ["seven<|im_end|>"]),
    "ends with a user": (said(USER, SEVEN, USER), ["seven<|im_end|>"]),
    "two answers": (said(USER, SEVEN, SEVEN), ["seven<|im_end|>", "seven<|im_end|>"]),
    "None keys": (said({**USER, "name": None, "train": None}, {**SEVEN, "tool_calls": None}), ["seven<|im_end|>"]),
    "a call": (
        said(USER, CALL, {"role": "tool", "content": ""}, SEVEN),
        ['<tool_call>{"name": "f", "arguments": {"n": 1}}</tool_call><|im_end|>', "seven<|im_end|>"],
    ),
    "mixed": (json.dumps({"instruction": "3 + 4?", "input": "", "output": "seven"}), ["seven<|im_end|>"]),
    "text as JSON": (json.dumps({"messages": json.dumps([USER, SEVEN])}), ["seven<|im_end|>"]),
    "100k tokens": (said(USER, {"role": "assistant", "content": "☃" * 50_000}), ["☃" * 50_000 + "<|im_end|>"]),
    "emoji": (said(USER, {"role": "assistant", "content": "😀 é"}), ["😀 é<|im_end|>"]),
}


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(tokenizer_of("tools"), "tools")


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(tmp_path: Path, tokenizer: HuggingFaceTokenizer, name: str) -> None:
    line, reason = REFUSED[name]
    (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    corpus = load_documents("jsonl", path=tmp_path / "rows.jsonl", chat=ChatEncoder(tokenizer))
    assert [document.id for document in corpus] == ["rows.jsonl:1", "rows.jsonl:3"]
    (lost,) = corpus.skipped
    assert lost.reason.startswith(f"{tmp_path}/rows.jsonl, line 2, byte ")
    assert reason in lost.reason


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("marked", [False, True], ids=["prefix", "marks"])
def test_what_fits_is_learned(tmp_path: Path, name: str, marked: bool) -> None:
    line, learned = TRAINED[name]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n{line}\r\n\r\n".encode())  # and a BOM, and CRLF
    chat = ChatEncoder(HuggingFaceTokenizer(tokenizer_of("tools", marked), "tools"))
    corpus = load_documents("jsonl", path=tmp_path / "rows.jsonl", chat=chat)
    _, document = corpus
    assert corpus.skipped == []
    labels = np.asarray(document.labels)
    runs = np.split(np.arange(len(labels)), np.flatnonzero(np.diff(labels != -100)) + 1)
    inner = tokenizer_of("tools")
    assert [inner.decode(labels[run].tolist()) for run in runs if labels[run[0]] != -100] == learned


def test_alone_each_ends_with_one_line_and_exit_code_2(tmp_path: Path, say: Say) -> None:
    """Also an empty file, and a broken one; never a stack trace."""
    folder = save_tokenizer(tmp_path / "tokenizer", "tools")
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {{vocab_size: 512}}\ndata: {{source: jsonl, tokenizer: {folder}, validation_split: 0}}\n"
        f"train: {{output_dir: {tmp_path}/run, eval_steps: 0}}\n"
    )
    some = list(REFUSED)[::4]
    files = {**{name: REFUSED[name][0] for name in some}, "empty": "", "blank": "\n\n", "NUL": "\0\0"}
    for number, (name, line) in enumerate(files.items()):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(line + "\n" if line else "")
        code, out, err = say("data", "preview", run, f"data.path={path}")
        assert code == 2, name
        assert out == "", name
        errors = [text for text in err.splitlines() if text.startswith("moe-dist: error: ")]
        assert len(errors) == 1, (name, err)
        assert "Traceback" not in err
        assert name in ("empty", "blank", "NUL") or f"{path}" in err, name
