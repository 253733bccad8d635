"""Runs that train a part of the weights: what they say, what they save, how they go on, and what is refused."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from folders import BASE, random_weights, write_folder
from saved import MODEL, TEXTS, TRAINING, found_at
from tiny import tiny_config

from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.checkpoint.tools.inspecting import Tensors
from moe_dist.config import ConfigError, load_mapping
from moe_dist.config.trained_weights import TrainedWeights
from moe_dist.models.shapes import logical_shapes
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.state_bytes import trained_by_pp_rank
from moe_dist.train import MoETrainer
from moe_dist.train.esft import choose
from moe_dist.train.run_setup import model_sizes

OPTIONS = TRAINING | {"bias_update_rate": 0.0, "max_steps": 4, "train_only": ["experts:1,3", "*q_proj"]}


def train(folder: Path, **options: Any) -> None:
    training = OPTIONS | options | {"output_dir": str(folder)}
    MoETrainer(model_config=MODEL, training_config=training).train(TEXTS)


def tensors_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    found = found_at(run, step)
    tensors = Tensors(found, found.storage.manifest(found.step), Keys())
    return {name: tensors.read(name) for name in tensors.names()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("frozen") / "run"
    train(folder)
    return folder


def test_state_is_of_single_experts(run: Path) -> None:
    found = tensors_of(run, 4)
    moments = {name.removeprefix("optimizer.") for name in found if name.startswith("optimizer.")}
    kept = {name.rpartition(".")[0] for name in moments}
    stacks = {f"layers.{n}.moe.experts.{part}[{e}]" for n in (0, 1) for part in ("w_gate_up", "w_down") for e in (1, 3)}
    assert kept == stacks | {f"layers.{n}.attention.q_proj.weight" for n in (0, 1)}
    assert found["optimizer.layers.0.moe.experts.w_down[1].exp_avg"].shape == (16, 16)


def test_a_run_goes_on_bit_for_bit(run: Path, tmp_path: Path) -> None:
    """Seen to fail with moments of single experts that are not read."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    train(tmp_path / "run", resume="auto")
    again, wanted = tensors_of(tmp_path / "run", 4), tensors_of(run, 4)
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_other_weights_are_not_gone_on_with_by_mistake(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"train\.train_only=\['experts:2'\] \(saved with"):
        train(tmp_path / "run", resume="auto", max_steps=6, train_only="experts:2")
    options = {"resume": "auto", "max_steps": 6, "train_only": "experts:2", "allow_config_change": True}
    with pytest.raises(CheckpointError, match=r"w_gate_up\[2\]\.\w+, which this run needs; .*load_optimizer=false"):
        train(tmp_path / "run", **options)
    train(tmp_path / "run", **options, load_optimizer=False)
    before, after = tensors_of(run, 4), tensors_of(tmp_path / "run", 6)
    name = "model.layers.1.moe.experts.w_down"
    equal = [torch.equal(one, other) for one, other in zip(before[name], after[name], strict=True)]
    assert equal == [True, True, False, True]


def test_what_is_trained_is_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of built-in experts from the configuration, of one's own from the model."""
    trained = 2 * (2 * (16 * 32 + 16 * 16) + 16 * 16)
    config = load_mapping({"model": MODEL}, [f"train.train_only={OPTIONS['train_only']}"], notice=lambda text: None)
    total = sum(prod(shape) for name, shape in logical_shapes(config.model).items() if not name.endswith("bias_E"))
    assert model_sizes(config)[:2] == (trained, total)
    train(tmp_path / "run", max_steps=1, save_steps=0, progress="plain")
    said = " ".join(capsys.readouterr().out.split())
    assert f"trainable params: {trained:,} || all params: {total:,}" in said
    assert f"6 of 25 tensors are trained, 4 in part (single experts): {trained:,} weights" in said
    own = config.model.model_copy(update={"expert": "moe_dist.verify.examples:TwoLinears"})
    config = config.model_copy(update={"model": own})
    with torch.device("meta"):
        model = Transformer(own)
    expert = sum(p.numel() for name, p in model.named_parameters() if "layers.0.moe.experts.experts.1." in name)
    assert model_sizes(config)[0] == 2 * (2 * expert + 16 * 16)


WRONG = {
    "train.freeze=[q_prj]": "train.freeze=q_prj: names no weight of this model; did you mean q_proj?",
    "train.train_only=[layers.7]": "train.train_only=layers.7: names no weight of this model",
    "train.train_only=[router] balance.freeze_router=true": "nothing of train_only=['router'] would be trained",
    "train.train_only=[lm_head] model.tie_word_embeddings=true": "train.train_only=lm_head: names no weight",
    "lora.r=4 train.train_only=[router]": "nothing of train_only=['router'] would be trained",
    "train.train_only=[experts:8]": "train.train_only=experts:8: 8 is not below model.num_experts=8",
    "train.freeze=[layers:1-3]": "train.freeze=layers:1-3: 3 is not below model.num_hidden_layers=3",
    "train.freeze=[experts:a]": "experts:a: one of a name with * and ?, experts:3,7, experts:esft or layers:10-20",
    "train.freeze=[experts:esft]": "experts:esft chooses what is trained; it belongs to train_only",
    "train.freeze=[experts:1] parallel.engine=deepspeed parallel.zero_stage=1": "updates whole stacks of experts",
    "train.freeze=[router] balance.bias_update_rate=0.1": "moves the selection bias of layer 0, whose router is frozen",
    "train.train_only=[layers:2] parallel.pp_size=2 train.gradient_accumulation_steps=2": (
        "train.train_only=['layers:2']: with parallel.pp_size=2 stage 0 would have nothing to train"
    ),
}  # fmt: skip


@pytest.mark.parametrize("overrides", WRONG)
def test_what_cannot_be_is_said(overrides: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trained_by_pp_rank(tiny_config("balance.bias_update_rate=0", *overrides.split()))
    assert WRONG[overrides] in str(caught.value)


@pytest.mark.parametrize(
    ("freeze", "name", "part"),
    [
        ("experts", "layers.0.moe.experts.w_down", False),
        ("experts:0-5,7", "layers.0.moe.experts.w_down", frozenset({6})),
        ("experts:0-7", "layers.0.moe.experts.w_down", False),
        ("experts", "layers.0.moe.shared_expert.up_proj.weight", True),
        ("experts:1", "layers.0.moe.experts.experts.1.up.weight", False),
        ("experts:1", "layers.0.moe.experts.lora_down.A", frozenset({0, 2, 3, 4, 5, 6, 7})),
        ("layers:0,2", "layers.2.input_norm.weight", False),
        ("layers:1", "layers.11.input_norm.weight", True),
        ("norm", "norm.weight", False),
        ("norm", "layers.0.input_norm.weight", True),
        ("*norm", "layers.0.input_norm.weight", False),
        ("layers.?.attention", "layers.0.attention.q_proj.lora.A", False),
        ("router", "layers.0.moe.router.logits_bias_E", False),
        ("embed_tokens", "layers.0.moe.router.weight", True),
    ],
)
def test_patterns_name_parts_of_names(freeze: str, name: str, part: Any) -> None:
    config = tiny_config("balance.bias_update_rate=0", f"train.freeze=['{freeze}']")
    assert TrainedWeights.of(config).part(name) == part


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny model that prefers some experts."""
    model = load_mapping({"model": BASE | {"initializer_range": 0.3}}, notice=lambda text: None).model
    return write_folder(tmp_path_factory.mktemp("esft") / "model", model, random_weights(model))


def esft(folder: Path, output: Path, **options: Any) -> None:
    options = OPTIONS | {"train_only": "experts:esft", "esft_threshold": 0.5, "esft_samples": 6} | options
    config = {"model": {"from_pretrained": str(folder)}}
    MoETrainer(config, training_config=options | {"output_dir": str(output)}).train(TEXTS)


def chosen_by(run: Path, step: int) -> dict[str, list[int]]:
    return json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())["esft"]


def test_experts_of_the_task_are_chosen_said_and_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that goes on has the same experts, whatever its model has become; and only these have moved."""
    esft(folder, tmp_path / "run", progress="plain")
    said = capsys.readouterr().out
    chosen = chosen_by(tmp_path / "run", 4)
    assert set(chosen) == {"0", "1"}
    for layer, ids in chosen.items():
        assert 0 < len(ids) < 6
        (line,) = [line for line in said.splitlines() if line.startswith(f"  L{layer}: ")]
        assert all(f"E{expert:02d} " in line for expert in ids)
    before, after = tensors_of(tmp_path / "run", 2), tensors_of(tmp_path / "run", 4)
    for layer, ids in chosen.items():
        name = f"model.layers.{layer}.moe.experts.w_gate_up"
        moved = [not torch.equal(one, other) for one, other in zip(before[name], after[name], strict=True)]
        assert [expert for expert, has in enumerate(moved) if has] == ids
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    with patch("moe_dist.train.esft.affinity") as measured:
        esft(folder, tmp_path / "again", resume="auto")
    assert not measured.called
    again = tensors_of(tmp_path / "again", 4)
    assert again.keys() == after.keys()
    assert all(torch.equal(again[name], after[name]) for name in after)
    assert chosen_by(tmp_path / "again", 4) == chosen


def test_experts_of_a_task_need_a_trained_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no trained model, .* set model\.from_pretrained"):
        train(tmp_path / "run", train_only="experts:esft")


def test_the_most_wanted_experts_are_taken_until_the_threshold() -> None:
    shares = {0: [0.1, 0.4, 0.2, 0.3], 2: [0.25, 0.25, 0.25, 0.25]}
    assert choose(shares, 0.2) == {0: {1}, 2: {0}}
    assert choose(shares, 0.5) == {0: {1, 3}, 2: {0, 1}}
    assert choose(shares, 0.7) == {0: {1, 3}, 2: {0, 1, 2}}
    assert choose(shares, 1.0) == {0: {0, 1, 2, 3}, 2: {0, 1, 2, 3}}
