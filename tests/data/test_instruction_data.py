"""Instruction data as text loses its questions or learns them: it stops; other columns are named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from moe_dist.data import load_documents

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


def _file(folder: Path, row: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("row", "text_field", "named"),
    [
        (ALPACA, "output", "data.format=instruction (instruction, input, output), or data.format=text"),
        ({**ALPACA, "text": "whole"}, "text", "data.format=text (every token of 'text' is learned)"),
        ({"conversations": [], "text": "x"}, "text", "data.format=chat (conversations), or data.format=text"),
        ({"prompt": "q", "completion": "a"}, "completion", "data.format=prompt_completion (prompt, completion), or"),
        ({"Question": "q", "Answer": "a"}, "Answer", "data.format=text learns every token of 'Answer'"),
        ({"dialogue": "q"}, "text", "make rows of input_ids with completion_mask"),
    ],
)
def test_it_stops_with_the_way_out(tmp_path: Path, row: dict[str, Any], text_field: str, named: str) -> None:
    """Seen red: trained on the outputs alone, without a word."""
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1") as caught:
        load_documents("jsonl", path=_file(tmp_path, row), text_field=text_field)
    assert named in str(caught.value)


def test_what_is_said_to_be_text_is(tmp_path: Path) -> None:
    corpus = load_documents("jsonl", path=_file(tmp_path, ALPACA), text_field="output", format="text")
    assert [document.text for document in corpus] == ["3"]


def test_what_is_said_to_be_left_out_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ignored = ["instruction", "input"]
    with caplog.at_level(logging.WARNING, "moe_dist"):
        corpus = load_documents("jsonl", path=_file(tmp_path, ALPACA), text_field="output", ignored_columns=ignored)
        assert [document.text for document in corpus] == ["3"]
    assert not caplog.records


def test_tokens_with_a_mask_are_what_is_asked_for(tmp_path: Path) -> None:
    row = {"input_ids": [1, 2], "completion_mask": [0, 1], "prompt": "q", "completion": "a"}
    (document,) = load_documents("jsonl", path=_file(tmp_path, row), text_field="input_ids")
    assert document.labels is not None
    assert list(document.labels) == [-100, 2]


def test_columns_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _file(tmp_path, {"text": "x", "url": "u", "meta": {}})
    with caplog.at_level(logging.WARNING, "moe_dist"):
        list(load_documents("jsonl", path=path))
    (record,) = caplog.records
    assert record.getMessage() == f"{path}, line 1: columns that are not read: url, meta"
