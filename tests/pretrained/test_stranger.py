"""A stranger's way: a folder saved by `transformers`, twenty steps on two ranks, an export, a pipeline of text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools.stranger import way

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def test_the_readmes_way(tmp_path: Path) -> None:
    """As tools/stranger.py goes it, but with what is installed here."""
    pytest.importorskip("transformers")
    _, _, trained, exported, text = way(Path(sys.executable).parent, tmp_path)
    assert "is not the tokenizer of tiny-moe; its own is taken" in trained
    assert "step: 20/20" in trained
    assert "exported" in exported
    assert (tmp_path / "tuned-hf" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "tuned-hf" / "config.json").read_text())["vocab_size"] == 600
    assert text.splitlines()[-1].startswith("'def main(")
