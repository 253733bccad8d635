"""Tokenizers: round trips, and a trained one that loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config.vocabulary import vocabulary_needed
from moe_dist.data import ByteTokenizer, documents_from, load_tokenizer, pack

ROOT = Path(__file__).parents[2]
TEXT = "def f(x):\n\treturn 'naïve  ☃ 😀'\r\n"


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory) -> Path:
    """A folder that tools/train_tokenizer.py wrote, run as a person runs it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for i in range(120):
        (folder / f"{i}.txt").write_text(f"the number {i} of the documents\n" * 3, encoding="utf-8")
    command = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), "--source", "text"]
    command += ["--path", str(folder / "*.txt"), "--vocab-size", "300", "--out", str(folder / "bpe")]
    code = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {command[1:]!r}; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "bytes per token" in output
    return folder / "bpe"


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_byte_tokenizer_leaves_out_specials_and_mends_broken_text():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (258, 256, 257)
    assert tokenizer.decode([104, 256, 105, 257]) == "hi"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_a_trained_tokenizer_loads_and_round_trips(bpe_folder):
    tokenizer = load_tokenizer(str(bpe_folder))
    assert 258 < tokenizer.vocab_size <= 300
    assert tokenizer.eos_id != tokenizer.pad_id
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == TEXT
    assert len(tokenizer.encode("the number of the documents")) < 15
    assert tokenizer.encode_batch(["a", TEXT]) == [tokenizer.encode("a"), ids]


def test_packing_in_batches_gives_what_single_documents_give(bpe_folder, texts):
    tokenizer = load_tokenizer(str(bpe_folder))
    packed = pack(documents_from(texts * 10), tokenizer, max_seq_length=16)
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts * 10 if text]
    assert np.array_equal(packed.tokens, np.concatenate(expected))


def test_a_tokenizer_without_eos_is_refused(bpe_folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (bpe_folder / name).read_text(encoding="utf-8")
        if name == "tokenizer_config.json":
            settings = {key: value for key, value in json.loads(content).items() if key != "eos_token"}
            content = json.dumps(settings)
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no eos token.*set 'eos_token'"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"cannot be loaded: the folder holds \['notes\.txt'\]"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="no such folder"):
        load_tokenizer(str(tmp_path / "missing"))


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(monkeypatch, capfd):
    """Seen to fail with 20 lines of tries in 46 seconds, and with the Hub asked although nobody knows its name."""
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(ValueError, match=r"'nobody/none' cannot be loaded: there is no such folder") as found:
        load_tokenizer("nobody/none")
    assert "\n" not in str(found.value)
    assert capfd.readouterr().err == ""


def test_the_vocabulary_that_a_tokenizer_needs_is_known_without_loading_it(bpe_folder):
    assert vocabulary_needed("bytes") == ByteTokenizer().vocab_size
    assert vocabulary_needed(str(bpe_folder)) == load_tokenizer(str(bpe_folder)).vocab_size
    assert vocabulary_needed("nobody/none") is None
