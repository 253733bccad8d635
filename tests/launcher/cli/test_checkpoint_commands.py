"""`moe-dist checkpoint`: what each command says, its exit code, and that nothing good is ever lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from saved import copy_of, found_at, shard_of, trained

from launcher.cli import commands
from moe_dist.checkpoint.lock import RunLock
from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.checkpoint.tools.inspecting import digests
from moe_dist.checkpoint.tools.resharding import cut


class Said(NamedTuple):
    code: int
    out: str
    err: str


Say = Callable[..., Said]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["moe-dist", "checkpoint", *map(str, words)])
        capsys.readouterr()
        code = commands.run()
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return copy_of(trained(), tmp_path / "run")


def test_ls(run: Path, say: Say) -> None:
    shard = shard_of(run / "checkpoint-4")
    os.truncate(shard, 100)
    (run / ".checkpoint-8.1.tmp").mkdir()
    (run / ".checkpoint-8.1.tmp" / "shard-1-00000.safetensors").write_bytes(b"12345")
    said = say("ls", run)
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[2].split()[:2] == ["2", "complete"]
    assert lines[3].split()[:2] == ["4", "damaged"]
    assert "pp 1 edp 1 ep 1" in lines[2]
    assert "eval_loss=" in lines[2]
    assert f"damaged: {shard}: 100 bytes instead of" in said.out
    assert ".checkpoint-8.1.tmp (5 bytes)" in said.out
    rows = json.loads(say("ls", run, "--json").out)
    assert [(row["step"], len(row["problems"])) for row in rows["steps"]] == [(2, 0), (4, 1), (6, 0)]
    assert rows["leftovers"] == {".checkpoint-8.1.tmp": 5}
    assert rows["steps"][2]["layout"] == {"edp": 1, "ep": 1, "pp": 1, "world": 1, "zero_stage": 0}
    assert [row["step"] for row in json.loads(say("ls", run / "checkpoint-2", "--json").out)["steps"]] == [2]


def test_ls_follows_the_folder_that_the_run_was_told(run: Path, tmp_path: Path, say: Say) -> None:
    (tmp_path / "elsewhere").mkdir()
    (run / "checkpoint-6").rename(tmp_path / "elsewhere" / "checkpoint-6")
    for step in (2, 4):
        (run / f"checkpoint-{step}").rename(tmp_path / f"checkpoint-{step}")
    config = (run / "config.yaml").read_text().replace("folder: null", f"folder: {tmp_path / 'elsewhere'}")
    (run / "config.yaml").write_text(config)
    rows = json.loads(say("ls", run, "--json").out)
    assert rows["place"] == str(tmp_path / "elsewhere")
    assert [row["step"] for row in rows["steps"]] == [6]


def test_verify_names_file_and_tensor(run: Path, say: Say) -> None:
    """Seen to fail with the comparison of hashes left out of `problems`."""
    assert say("verify", run).out.endswith("3 of 3 checkpoints verified\n")
    shard = shard_of(run / "checkpoint-4")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert say("ls", run).out.count("complete") == 3  # the cheap look cannot see it
    said = say("verify", run)
    assert said.code == 1
    assert f"{shard}: its BLAKE3 is not what was written (holds " in said.out
    assert said.out.endswith("2 of 3 checkpoints verified; not checkpoint-4\n")
    rows = json.loads(say("verify", run, "--json").out)
    assert not rows["ok"]
    assert [len(row["problems"]) for row in rows["steps"]] == [0, 1, 0]
    assert say("verify", run / "checkpoint-6").code == 0
    said = say("inspect", run / "checkpoint-4")
    assert said.code == 1
    assert said.err.startswith(f"moe-dist: error: {shard}: its BLAKE3")


def test_inspect(run: Path, say: Say) -> None:
    said = say("inspect", run / "checkpoint-6")
    assert said.code == 0
    assert "model.layers.1.moe.experts.w_down  " in said.out
    assert "tensors of the optimizer: --all" in said.out
    assert "optimizer.layers" not in said.out
    assert "optimizer.layers" in say("inspect", run / "checkpoint-6", "--all").out
    shown = say("inspect", run / "checkpoint-6", "--experts").out
    assert sum(line.startswith("model.layers.0.moe.experts.w_down") for line in shown.splitlines()) == 4
    rows = json.loads(say("inspect", run / "checkpoint-6", "--json").out)["tensors"]
    expert = next(row for row in rows if row["name"] == "model.layers.0.moe.experts.w_down" and row["expert"] == 3)
    assert expert["sha256"] == digests(found_at(run, 6))["model.layers.0.moe.experts.w_down[3]"]
    assert expert["sha256"][:12] in shown
    assert expert["shape"] == [16, 16]


def test_diff(run: Path, say: Say) -> None:
    same = say("diff", run / "checkpoint-6", run / "checkpoint-6")
    assert "0 of " in same.out
    assert "configured alike" in same.out
    said = say("diff", run / "checkpoint-4", trained(2) / "checkpoint-6")
    assert "model.layers.0.moe.experts.w_down" in said.out
    assert "configured otherwise: train.seed: 1 -> 2" in said.out
    rows = json.loads(say("diff", run / "checkpoint-4", run / "checkpoint-6", "--json").out)
    assert rows["config"] == {}
    experts = [row for row in rows["tensors"] if row["name"] == "model.layers.0.moe.experts.w_down"]
    assert [row["expert"] for row in experts] == [0, 1, 2, 3]
    assert all(0 < row["relative"] < 1 for row in experts)


def test_one_changed_expert_is_the_only_difference(run: Path, tmp_path: Path, say: Say) -> None:
    from safetensors.torch import load_file, save_file
    from saved import rewrite_manifest

    from moe_dist.checkpoint.storage.hashing import hash_file

    other = copy_of(run, tmp_path / "other")
    shard = shard_of(other / "checkpoint-6")
    tensors = load_file(shard)
    tensors["model.layers.1.moe.experts.w_down"][2] *= 1.5
    save_file(tensors, shard)
    entry = {"bytes": shard.stat().st_size, "blake3": hash_file(LocalStorage(other), f"checkpoint-6/{shard.name}")}
    rewrite_manifest(other / "checkpoint-6", lambda body: body["files"].__setitem__(shard.name, entry))
    (row,) = json.loads(say("diff", run / "checkpoint-6", other / "checkpoint-6", "--json").out)["tensors"]
    assert (row["name"], row["expert"]) == ("model.layers.1.moe.experts.w_down", 2)
    assert row["relative"] == pytest.approx(0.5)


def test_prune(run: Path, say: Say) -> None:
    (run / ".checkpoint-8.1.tmp").mkdir()
    said = say("prune", run, "--keep", 1, "--dry-run")
    assert said.out.count("would remove") == 3
    assert len(list(run.glob("checkpoint-*"))) == 3
    said = say("prune", run, "--keep", 1, "--keep-every", 4)
    assert said.out.endswith("freed; steps that stay: 4, 6\n")
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-6"]


def test_prune_keeps_the_best(run: Path, say: Say) -> None:
    losses = {step: found_at(run, step).storage.manifest(step).metrics["eval_loss"] for step in (2, 4, 6)}
    assert losses[6] < losses[4] < losses[2]
    (run / "checkpoint-6").rename(run.parent / "away")
    assert say("prune", run, "--keep", 1, "--best", "eval_loss").out.endswith("stay: 4\n")
    said = say("prune", run, "--keep", 1, "--best", "accuracy")
    assert (said.code, "--best accuracy: no checkpoint" in said.err) == (2, True)


def test_prune_never_trades_a_good_step_for_a_bad_one(run: Path, say: Say) -> None:
    """The newest has one wrong bit, that before is cut short. Seen to fail without the reading in `_going`."""
    shard = shard_of(run / "checkpoint-6")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    os.truncate(shard_of(run / "checkpoint-4"), 10)
    said = say("prune", run, "--keep", 1)
    assert said.err.count("damaged, left alone") == 2
    assert (run / "checkpoint-2").is_dir()
    assert say("verify", run / "checkpoint-2").code == 0


def test_prune_waits_for_no_run(run: Path, say: Say) -> None:
    """Seen to fail with `quiet` that takes no lock."""
    lock = RunLock.acquire(run)
    said = say("prune", run, "--keep", 1)
    assert said.code == 2
    assert f"a run is writing in {run} (process {os.getpid()} on " in said.err
    assert len(list(run.glob("checkpoint-*"))) == 3
    lock.release()
    assert say("prune", run, "--keep", 1).code == 0
    again = RunLock.acquire(run)
    assert again.generation == lock.generation + 1  # pruning is no start of the run
    again.release()


def test_prune_leaves_what_may_be_a_save_where_no_lock_can_tell(run: Path, say: Say) -> None:
    (run / ".run.lock").unlink()
    (run / ".checkpoint-8.1.tmp").mkdir()
    said = say("prune", run, "--keep", 2)
    assert "left alone: .checkpoint-8.1.tmp" in said.err
    assert (run / ".checkpoint-8.1.tmp").is_dir()
    assert not (run / "checkpoint-2").exists()


@pytest.mark.parametrize("shards", [1, 3, 4, 7])
def test_reshard(run: Path, tmp_path: Path, say: Say, shards: int) -> None:
    said = say("reshard", run / "checkpoint-6", tmp_path / "copy", "--shards", shards)
    assert said.code == 0, said.err
    assert said.out.startswith(f"{tmp_path}/copy/checkpoint-6: {shards} shards, ")
    made = found_at(tmp_path / "copy", 6)
    assert digests(made) == digests(found_at(run, 6))
    manifest = made.storage.manifest(6)
    stack = manifest.tensors["model.layers.0.moe.experts.w_down"]
    assert len(stack.boxes) == (shards if shards <= 4 else 1)
    sizes = [entry.bytes for name, entry in manifest.files.items() if name.startswith("shard")]
    assert max(sizes) < 2 * min(sizes)
    again = say("reshard", run / "checkpoint-6", tmp_path / "copy", "--shards", 2)
    assert (again.code, "no checkpoint is ever overwritten" in again.err) == (2, True)
    assert digests(made) == digests(found_at(run, 6))


def test_a_resharded_checkpoint_is_one_to_go_on_from(run: Path, tmp_path: Path, say: Say) -> None:
    from saved import train

    say("reshard", run / "checkpoint-4", tmp_path / "copy", "--shards", 3)
    train(tmp_path / "copy", seed=1, eval_steps=2)
    assert digests(found_at(tmp_path / "copy", 6)) == digests(found_at(run, 6))


def test_cut_covers_what_does_not_divide(run: Path) -> None:
    """Every row in exactly one piece; the manifest's own check of boxes would find it otherwise."""
    tensors = found_at(run, 6).storage.manifest(6).tensors
    for shards in (1, 2, 5, 300):
        rows = dict.fromkeys(tensors, 0)
        for pieces in cut(tensors, shards):
            assert pieces
            for piece in pieces:
                rows[piece.name] += piece.shape[0] if piece.shape else 1
        assert rows == {name: entry.shape[0] if entry.shape else 1 for name, entry in tensors.items()}


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["ls", "{run}/nowhere"], "there is no such folder"),
        (["ls", "{run}/checkpoint-5"], "complete ones beside it: checkpoint-2, checkpoint-4, checkpoint-6"),
        (["verify", "{empty}"], "there is no checkpoint"),
        (["inspect", "{run}"], "not one checkpoint but a folder of several; there: checkpoint-2"),
        (["prune", "{run}/checkpoint-2", "--keep", "1"], "one checkpoint; prune takes the folder"),
        (["prune", "{run}", "--keep", "0"], "Invalid value for '--keep'"),
        (["reshard", "{run}/checkpoint-2", "{run}/checkpoint-3", "--shards", "1"], "to be named checkpoint-2"),
        (["verify", "{run}", "--encryption-key", "env:NOT_THERE"], "no variable NOT_THERE"),
    ],
)
def test_bad_input_is_one_line(run: Path, tmp_path: Path, say: Say, words: list[str], what: str) -> None:
    (tmp_path / "empty").mkdir()
    said = say(*(word.format(run=run, empty=tmp_path / "empty") for word in words))
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert what in said.err


def test_listing_verifying_and_pruning_load_no_torch(run: Path) -> None:
    """Seen to fail with an import of `inspecting` at the top of the commands."""
    code = (
        "import sys; from launcher.cli import commands\n"
        "for words in (['ls'], ['verify'], ['prune', '--keep', '1']):\n"
        f"    sys.argv = ['moe-dist', 'checkpoint', words[0], {str(run)!r}, *words[1:]]\n"
        "    assert commands.run() == 0\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
