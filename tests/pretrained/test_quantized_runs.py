"""Runs with adapters beside a model in 4 or 8 bits: quantized as it is read, and near the run that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_lora_runs import LORA, TEXTS, TRAINING, folder_of, run_of, tensors_of, trained
from tiny import mesh_of

from moe_dist.config import ConfigError, load_mapping
from moe_dist.models.int8 import to_int8
from moe_dist.models.quantized import quantized_weights
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.state_bytes import state_bytes
from moe_dist.pretrained.inference import find_model, open_model
from moe_dist.train import MoETrainer

pytest.importorskip("bitsandbytes", reason="needs pip install 'moe-dist[quantize]'")
NEAR = {"nf4": 0.02, "int8": 0.002}
"""Of each loss, against the run beside the model as it is."""


@pytest.mark.parametrize("kind", NEAR)
def test_the_losses_are_near_those_of_the_run_beside_the_model_as_it_is(
    kind: str, say: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its checkpoints have adapters alone, it goes on bit for bit, and is merged with the model as it was."""
    lora = {"quantize": kind, "target_modules": ["q_proj", "o_proj", "experts"]}
    result = run_of(folder_of(), tmp_path / "run", lora=lora, progress="plain")
    assert f"{kind}: 12 weights of " in capsys.readouterr().out
    wanted = run_of(folder_of(), tmp_path / "as-it-is", lora={"target_modules": lora["target_modules"]})
    for found, other in zip(result.losses, wanted.losses, strict=True):
        assert 0 < abs(found - other) < NEAR[kind] * other
    before = tensors_of(tmp_path / "run" / "checkpoint-4")
    assert all(".lora" in name for name in before)
    run_of(folder_of(), tmp_path / "run", lora=lora, resume=str(tmp_path / "run" / "checkpoint-2"))
    after = tensors_of(tmp_path / "run" / "checkpoint-4")
    assert all(torch.equal(after[name], before[name]) for name in before)
    said = say("export", tmp_path / "run", "--merge", "--output", tmp_path / "merged")
    assert said.code == 0, said
    assert f"trained beside weights in {kind}, and are added to those of the model as it was" in said.out


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_model_that_is_opened_has_the_weights_it_was_trained_beside(family: str, tmp_path: Path) -> None:
    """Of files by expert, and of whole stacks with gate and up in turn."""
    run_of(folder_of(family), tmp_path / "run", lora={"quantize": "nf4"}, max_steps=2)
    model, _ = open_model(find_model(str(tmp_path / "run")))
    plain, _ = open_model(find_model(str(tmp_path / "run"), ("lora.quantize=null",)))
    weights = dict(plain.named_parameters())
    for name, _, weight in quantized_weights(model):
        weights[name].copy_(weight.whole(torch.float32))
    ids = torch.arange(3, 27)[None]
    assert torch.allclose(model(ids), plain(ids), atol=1e-5)
    with pytest.raises(ValueError, match=r"^int8: layers.*is in nf4 already"):
        to_int8(model)


def on_ranks(folder: Path, output: Path, ep_size: int, pp_size: int, pure_bf16: bool) -> tuple[int, int]:
    """Trains; returns the bytes of frozen weights of this rank, held and foretold."""
    mesh = mesh_of(ep_size, pp_size=pp_size)
    tree = {"model": {"from_pretrained": str(folder)}, "lora": LORA | {"quantize": "nf4"}}
    tree["parallel"] = {"ep_size": ep_size, "pp_size": pp_size}
    train = {"pure_bf16": pure_bf16, "gradient_accumulation_steps": pp_size}
    options = TRAINING | {"max_steps": 2, "per_device_train_batch_size": 1, "output_dir": str(output)}
    trainer = MoETrainer(tree, training_config=options | train, mesh=mesh)
    trainer.train(TEXTS)
    config = load_mapping(tree | {"train": train}, notice=lambda text: None)
    held = sum(weight.nbytes for _, _, weight in quantized_weights(trainer.model))
    held += sum(p.nbytes for p in trainer.model.parameters())
    return held, state_bytes(config, Layout.of(config, mesh.layout.world_size))[
        mesh.layout.coordinates(mesh.rank)[0]
    ].weights


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("ep_size", "pp_size"), [(2, 1), (1, 2)])
def test_two_ranks_train_what_one_process_does(ep_size: int, pp_size: int, tmp_path: Path) -> None:
    """Experts of a rank are quantized one by one, so that it does not matter which are beside them."""
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2}
    found = run_ranks(on_ranks, 2, folder_of(), tmp_path / "two", ep_size, pp_size, False)
    assert all(held == pytest.approx(foretold, rel=0.05) for held, foretold in found)
    run_of(folder_of(), tmp_path / "one", lora={"quantize": "nf4"}, **one)
    two, wanted = (tensors_of(tmp_path / run / "checkpoint-2") for run in ("two", "one"))
    for name in wanted:
        if name.startswith("model."):
            assert (two[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def test_weights_that_no_folder_has_are_refused(tmp_path: Path) -> None:
    config = {"model": {"num_hidden_layers": 2, "hidden_size": 32}, "lora": LORA | {"quantize": "int8"}}
    with pytest.raises(ConfigError, match=r"quantized as they are read; needs model\.from_pretrained"):
        MoETrainer(config, training_config=TRAINING, output_dir=tmp_path).train(TEXTS)


def test_in_pure_bfloat16_a_rank_holds_what_check_says(tmp_path: Path) -> None:
    assert trained()  # the folder is there
    held, foretold = on_ranks(folder_of(), tmp_path / "run", 1, 1, True)
    assert held == pytest.approx(foretold, rel=0.05)
