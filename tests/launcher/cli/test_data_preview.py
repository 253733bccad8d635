"""`moe-dist data preview`: what is learned is marked, the numbers are those of the run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_line import Say
from patches import Replace

from launcher.cli import data
from moe_dist.config import load_config
from moe_dist.train.data_preview import preview

TALK = {
    "messages": [
        {"role": "user", "content": "3 + 4?"},
        {"role": "assistant", "content": "seven \x1b[2J"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "No.", "train": False},
    ]
}
# By hand: "User: 3 + 4?\n", "Assistant:", the answer with its end, "User: Sure?\n", "Assistant:", " No." and its end.
LENGTH, LEARNED = 13 + 10 + 12 + 12 + 10 + 5, 12


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(TALK)] * 5 + ["{broken"]) + "\n")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"data: {{source: jsonl, path: {tmp_path}/rows.jsonl, validation_split: 0, max_seq_length: 128}}\n"
        f"train: {{output_dir: {tmp_path}/out, eval_steps: 0, per_device_train_batch_size: 1}}\n"
    )
    return path


def test_it_prints_samples_and_numbers(run: Path, say: Say) -> None:
    code, out, _ = say("data", "preview", run, "--samples", 1)
    assert code == 0
    head, *rest = out.splitlines()
    assert head == f"--- document 1: {LENGTH} tokens"
    assert "\n".join(rest[:3]) == "User: 3 + 4?\nAssistant:{+ seven \\x1b[2J<eos>+}User: Sure?\nAssistant: No.<eos>"
    assert f"tokens      {5 * LENGTH}, of which {5 * LEARNED} are learned ({100 * LEARNED / LENGTH:.1f} %)" in out
    assert "documents   5\n" in out
    assert f"lengths     {LENGTH} to {LENGTH}, median {LENGTH}" in out
    assert "samples     3 of 128 tokens, 80.7 % filled (data.packing=true)" in out
    assert "left out    1 of 6 documents" in out
    assert "steps       3 per epoch, 3 in all; 1 x 1 x 1 = 1 samples in each" in out
    assert "rows.jsonl, line 6" in out
    assert not (run.parent / "out").exists()


def test_on_a_terminal_what_is_learned_is_green(run: Path, say: Say, replace: Replace) -> None:
    replace(data, "_on_a_terminal", lambda: True)
    out = say("data", "preview", run, "--samples", 1).out
    assert "Assistant:\x1b[30;42m seven \\x1b[2J<eos>\x1b[0mUser: Sure?" in out
    assert sys.stdout.isatty() is False  # or the first test would show this


def test_text_is_learned_but_for_its_first_token(tmp_path: Path, run: Path, say: Say) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "abc"}\n')
    out = say("data", "preview", run, f"data.path={tmp_path}/texts.jsonl").out
    assert "a{+bc<eos>+}" in out
    assert "tokens      4, of which 3 are learned (75.0 %)" in out


def test_of_a_preference_both_answers_are_printed(tmp_path: Path, run: Path, say: Say) -> None:
    rows = [{"prompt": "3 + 4?", "chosen": " 7", "rejected": " eight"}] * 9
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "p", "chosen": "c"}])))
    more = (f"data.path={tmp_path}/pairs.jsonl", "data.format=preference", "data.max_seq_length=32")
    code, out, _ = say("data", "preview", run, *more, "--samples", 1)
    assert code == 0
    lines = [
        "--- pair 1, chosen: 9 tokens",
        "3 + 4?{+ 7<eos>+}",
        "--- pair 1, rejected: 13 tokens",
        "3 + 4?{+ eight<eos>+}",
    ]
    assert out.splitlines()[:4] == lines
    assert "pairs       9\n" in out
    assert f"tokens      {9 * 22}, of which {9 * 10} are learned" in out
    assert (
        "samples     5 of 2 x 32 tokens, 61.9 % filled" in out
    )  # two in a sample, since three rejected ones do not fit
    assert "left out    1 of 10 documents" in out
    assert "no 'rejected'" in out


def test_the_steps_of_the_guide(tmp_path: Path, run: Path) -> None:
    """40,000 samples in batches of 1 x 16 x 4, three times: 625 and 1,875 steps."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 40_000)
    more = ["train.gradient_accumulation_steps=16", "train.num_train_epochs=3", "data.packing=false"]
    found = preview(load_config(run, more), 4)
    assert (found.batch, found.steps_per_epoch, found.steps) == (64, 625, 1875)
    assert found.histogram() == [(3, 4, 40_000)]
    packed = preview(load_config(run, [*more[:2], "data.packing=true", "data.limit=4000"]), 4)
    assert (packed.steps_per_epoch, packed.steps) == (1.5, 5)  # 42 of them in a sample: 96 samples
