"""A tensor of a wrong shape is never committed, and one that was is named, with the way to save what can be saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import MODEL, TEXTS, copy_of, found_at, rewrite_manifest, trained
from tiny import micro_batches, tiny_config

from moe_dist.checkpoint.lock import Job
from moe_dist.checkpoint.manager import Checkpoints, Outcome
from moe_dist.checkpoint.state import LogicalState
from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.tools.listing import verdict
from moe_dist.checkpoint.trainer_state import config_sha256
from moe_dist.config import CheckpointConfig
from moe_dist.models.shapes import logical_shapes
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.train import MoETrainer
from moe_dist.verify.trial import Trial

BROKEN = Path(__file__).parents[1] / "fixtures" / "broken_moments"
"""Saved by commit 809b0e3 right after an evaluation, by two ranks under ZeRO 1: moments of rank 0 alone."""


def saved(folder: Path, state: LogicalState) -> Outcome:
    checkpoints = Checkpoints(LocalStorage(folder), Mesh.single(), CheckpointConfig())
    checkpoints.begin(1, state, {"config": {}}, {})
    return checkpoints.settle()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("model.norm.weight", lambda t: t[:16], "model.norm.weight is [16], the model has [32]"),
        ("model.norm.weight", lambda t: None, "model.norm.weight is on no rank (1 tensors are missing)"),
        ("model.extra", lambda t: torch.zeros(3), "model.extra [3] is not of the model"),
        ("optimizer.norm.weight.exp_avg", lambda t: t[:16], "optimizer.norm.weight.exp_avg is [16], its weight [32]"),
        ("optimizer.norm.exp_avg", lambda t: torch.zeros(2), "optimizer.norm.exp_avg [2] belongs to no weight"),
    ],
)
def test_a_wrong_shape_is_not_committed(name: str, change: Any, said: str, tmp_path: Path) -> None:
    """Trap 32. Seen to fail (committed, and `checkpoint verify` said ok) without `_agree_on_plan`."""
    trial = Trial(tiny_config(), Mesh.single())
    trial.step(micro_batches(2), 0, 1e-2)
    state = LogicalState(trial.model, trial.engine, trial.mesh)
    right = dict(state.tensors)
    changed = change(right.get(name))
    state.tensors = {key: value for key, value in (right | {name: changed}).items() if value is not None}
    outcome = saved(tmp_path, state)
    assert (outcome.error or "").startswith(said)
    assert list(tmp_path.iterdir()) == []
    state.tensors = right
    assert saved(tmp_path, state).error is None


@pytest.mark.parametrize("option", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"qk_norm": False}])
def test_shapes_from_the_configuration_are_the_models(option: dict[str, Any]) -> None:
    """Without torch, and of any part of a model: the same names, shapes and order of nothing but the whole."""
    tiny = tiny_config().model.model_copy(update=option)
    with torch.device("meta"):
        whole, part = Transformer(tiny), Transformer(tiny, layers=[0, 1])
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    assert logical_shapes(tiny) == shapes
    assert part.logical_shapes == shapes
    assert part.state_dict().keys() < shapes.keys()


def problems(run: Path, step: int) -> tuple[list[str], str | None]:
    return verdict(found_at(run, step), Keys())


def test_shapes_are_held_against_the_configuration(tmp_path: Path) -> None:
    """Seen to fail without `configuration_problems`: the manifest agrees with itself."""
    run = copy_of(trained(), tmp_path / "run")
    assert problems(run, 6) == ([], None)
    for step, key, value in ((2, "hidden_size", 32), (4, "num_hidden_layers", 3), (6, "expert", "other:Experts")):
        change_configuration(run / f"checkpoint-{step}", key, value)
    (first, *_), _ = problems(run, 2)
    assert first == f"{run}/checkpoint-2: model.embed_tokens.weight is [272, 16], the model has [272, 32]"
    lines, _ = problems(run, 4)
    assert f"{run}/checkpoint-4: model.layers.2.moe.router.weight is missing" in lines
    assert problems(run, 6) == ([], "model.expert=other:Experts: shapes of a class of one's own were not compared")


def change_configuration(checkpoint: Path, key: str, value: Any) -> None:
    """As if it had been saved so: hashes and sums are right."""
    from blake3 import blake3

    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    state["config"]["model"][key] = value
    path.write_text(json.dumps(state))
    entry = {"bytes": path.stat().st_size, "blake3": blake3(path.read_bytes()).hexdigest()}
    sha = config_sha256(state["config"])

    def renew(body: dict[str, Any]) -> None:
        body["files"][path.name] = entry
        body["config_sha256"] = sha

    rewrite_manifest(checkpoint, renew)


def go_on(folder: Path, max_steps: int, job: Job | None = None, **checkpoint: Any) -> list[float]:
    """The run of the fixture in one process; its losses."""
    tree = {
        "model": MODEL | {"hidden_size": 8, "moe_intermediate_size": 8, "num_hidden_layers": 1},
        "data": {"max_seq_length": 32, "validation_split": 0.2},
        "train": {"per_device_train_batch_size": 4, "max_steps": max_steps, "seed": 1},
        "optimizer": {"lr_scheduler_type": "constant", "learning_rate": 3e-3, "momentum": 0.9},
        "balance": {"bias_update_rate": 1e-3},
        "checkpoint": checkpoint,
        "monitor": {"tensorboard": False, "progress": "none", "logging_steps": 1},
    }
    return MoETrainer(tree, output_dir=folder, job=job).train(TEXTS).losses


def test_moments_of_one_rank_are_named_and_the_weights_saved(tmp_path: Path) -> None:
    """What a save right after an evaluation has left is named, and refused; its weights, bias and place in the data can
    be gone on from. The next start of that job takes the moments that it has saved itself.

    Seen to fail at 809b0e3: `verify` said ok. And without `RunStart.load_optimizer`, in the last line.
    """
    run = tmp_path / "run"
    shutil.copytree(BROKEN, run)
    (line,), _ = problems(run, 2)
    assert (
        "optimizer.embed_tokens.weight.exp_avg is [136, 8], its weight [272, 8] (and 27 more): one rank's part" in line
    )
    assert line.endswith("go on from them alone with checkpoint.load_optimizer=false")
    for resume in ("auto", "2"):
        with pytest.raises(ValueError, match=r"exp_avg is \[136, 8\].*checkpoint\.load_optimizer=false"):
            go_on(run, 4, resume=resume)
    straight = go_on(tmp_path / "straight", 4)
    again = go_on(tmp_path / "again", 5, load_optimizer=False, resume=str(BROKEN / "checkpoint-2"))
    assert again[0] == pytest.approx(straight[2], rel=1e-5)  # the weights
    assert again[1] != pytest.approx(straight[3], rel=1e-5)  # after a step with other moments
    first, second = Job(names=("job/0",)), Job(names=("job/1",), earlier=("job/0",))
    assert go_on(run, 3, first, load_optimizer=False) == again[:1]
    assert go_on(run, 5, second, load_optimizer=False) == again[1:]
