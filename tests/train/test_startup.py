"""What a run does before its first step: no compiler, no symbolic shapes, no planners that nobody has asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patches import Replace
from tiny import tiny_config

from launcher.supervise.forkserver import preloaded
from moe_dist.config import OptimizerConfig, dump_config
from moe_dist.data import cache
from moe_dist.data.tokenizer import ByteTokenizer
from moe_dist.parallel.engines.optimizer import torch_optimizer
from moe_dist.train import MoETrainer, build

LONG = ("torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor", "torch.distributed.checkpoint")
LONG += ("torch.distributed.fsdp", "transformers", "datasets", "tensorboard", "pandas")
SCRIPT = """
import json, sys
from moe_dist.train import Callback, MoETrainer
class Told(Callback):
    def on_step_end(self, run):
        if run.step == 1:
            print(json.dumps(sorted(sys.modules)))
MoETrainer(sys.argv[1], output_dir=sys.argv[2], callbacks=[Told()]).train([[1, 2, 3] * 40] * 8)
"""


def test_first_step_comes_without_imports_of_a_second_each(tmp_path: Path) -> None:
    """Seen to fail with `to_empty` and `nn.init.normal_` on the device meta, with torch's own `AdamW.step`, and with
    planners imported where the trainer is.
    """
    config = tiny_config(
        "train.max_steps=1", "train.sample_tokens=4", "model.vocab_size=260", "checkpoint.save_steps=5"
    )
    run = tmp_path / "run.yaml"
    run.write_text(dump_config(config))
    command = [sys.executable, "-c", SCRIPT, str(run), str(tmp_path / "out")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    modules = json.loads(next(line for line in found.stdout.splitlines() if line.startswith("[")))
    assert "moe_dist.train.step" in modules
    assert not set(LONG) & set(modules)


@pytest.mark.parametrize("options", [{"optim": "adamw_torch_fused"}, {"optim": "adamw_torch"}, {"optim": "sgd"}])
def test_updates_are_those_of_torch(options: dict) -> None:
    """Bitwise, though they go without what torch has around an update for its compiler."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.05, momentum=0.9, **options)
    weights = [torch.linspace(-1, 1, 7), torch.linspace(-2, 1, 7)]
    ours = torch_optimizer([{"params": weights, "weight_decay": 0.05}], config)
    copies = [weight.clone() for weight in weights]
    if options["optim"] == "sgd":
        theirs: torch.optim.Optimizer = torch.optim.SGD(copies, lr=0.1, momentum=0.9, weight_decay=0.05)
    else:
        how = {"fused": options["optim"] == "adamw_torch_fused", "eps": config.adam_epsilon}
        betas = (config.adam_beta1, config.adam_beta2)
        theirs = torch.optim.AdamW(copies, lr=0.1, betas=betas, weight_decay=0.05, **how)
    hooked: list[int] = []
    ours.register_step_pre_hook(lambda *arguments: hooked.append(1))
    for number in range(4):
        for weight, copy in zip(weights, copies, strict=True):
            weight.grad = torch.cos(weight * (number + 1))
            copy.grad = torch.cos(copy * (number + 1))
        ours.step()
        theirs.step()
    assert all(torch.equal(weight, copy) for weight, copy in zip(weights, copies, strict=True))
    assert hooked == [1] * 4
    assert isinstance(ours, type(theirs))


def test_fork_server_imports_what_this_run_needs() -> None:
    """And nothing else: what one rank would import at its first save is no reason to wait for all of it."""
    one, two = "launch.nproc_per_node=1", "launch.nproc_per_node=2"
    pipeline = ("parallel.pp_size=2", "train.gradient_accumulation_steps=2")
    assert preloaded(tiny_config(one), None) == []
    assert preloaded(tiny_config(two), None) == ["moe_dist.checkpoint.state"]
    assert "torch._dynamo" in preloaded(tiny_config(one, "train.torch_compile=true"), None)
    assert "moe_dist.parallel.engines.fsdp" in preloaded(tiny_config(two, "parallel.zero_stage=2"), None)
    assert "moe_dist.parallel.pipeline" in preloaded(tiny_config(two, *pipeline), None)


class CountingTokenizer(ByteTokenizer):
    """Slow to encode, as those are whose tokens are kept."""

    fingerprint = "counting"
    calls = 0

    def encode(self, text: str) -> object:
        type(self).calls += 1
        return super().encode(text)


def test_tokens_are_made_once_for_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: Replace) -> None:
    """They are kept in the folder for caches; where that cannot be written nothing is lost but time.

    Seen to fail without `cache_dir` in the trainer.
    """
    (tmp_path / "texts").mkdir()
    for name in "abcd":
        (tmp_path / "texts" / f"{name}.txt").write_text(name * 50)
    replace(build, "load_tokenizer", lambda name: CountingTokenizer())
    data = {"source": "text", "path": str(tmp_path / "texts/*.txt"), "validation_split": 0.0}
    config = tiny_config("train.max_steps=1", "model.vocab_size=260", "checkpoint.save_steps=0").model_dump(mode="json")
    config["data"] |= data

    def encoded_by_a_start() -> int:
        CountingTokenizer.calls = 0
        MoETrainer(config, output_dir=tmp_path / f"out-{len(list(tmp_path.iterdir()))}").train()
        return CountingTokenizer.calls

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert [encoded_by_a_start(), encoded_by_a_start()] == [4, 0]
    kept = sorted((tmp_path / "cache/moe-dist/tokens").iterdir())
    assert len(kept) == 3
    for path in kept:
        os.utime(path, (0, 0))
    assert encoded_by_a_start() == 0  # and used again: it stays
    old = kept[0].with_name("nobody-reads-it.tokens.npy")
    old.touch()
    os.utime(old, (0, 0))
    (tmp_path / "texts/e.txt").write_text("e")
    assert [encoded_by_a_start(), encoded_by_a_start()] == [5, 0]
    assert not old.exists()
    assert all(path.exists() for path in kept)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "texts/a.txt"))  # a file: nothing can be made in it
    assert [encoded_by_a_start(), encoded_by_a_start()] == [5, 5]
    assert cache.KEPT_SECONDS > 24 * 3600
