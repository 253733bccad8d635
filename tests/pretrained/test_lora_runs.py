"""A run with adapters from a Hugging Face folder: what it saves, how it goes on, and what others load of it."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import BASE, FAMILIES, random_weights, write_folder
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from saved import TEXTS, found_at
from tiny import mesh_of

from launcher.cli.push import exported_folder
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.checkpoint.tools.inspecting import Tensors
from moe_dist.config import ConfigError, load_mapping
from moe_dist.pretrained.inference import find_model, open_model
from moe_dist.train import MoETrainer
from moe_dist.train.callbacks import Callback, RunState
from moe_dist.train.merging import MergeError
from moe_dist.train.result import TrainingResult

LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "o_proj", "experts", "gate"], "dropout": 0.1}
TRAINING: dict[str, Any] = {
    "max_seq_length": 32,
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "save_steps": 2,
    "seed": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "progress": "none",
    "tensorboard": False,
    "logging_steps": 1,
    "validation_split": 0.2,
    "eval_batches": 1,
}


def run_of(folder: Path, output: Path, **options: Any) -> TrainingResult:
    config = {"model": {"from_pretrained": str(folder)}, "lora": LORA | options.pop("lora", {})}
    return MoETrainer(config, training_config=TRAINING | options, output_dir=output).train(TEXTS)


@cache
def place() -> Path:
    root = Path(tempfile.mkdtemp(prefix="lora-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def folder_of(family: str = "mixtral") -> Path:
    """A Hugging Face folder of a tiny model in bfloat16."""
    return _written(family)


@cache
def _written(family: str) -> Path:
    model = load_mapping({"model": BASE | FAMILIES[family][0]}, notice=lambda text: None).model
    return write_folder(place() / family, model, random_weights(model, torch.bfloat16))


@cache
def trained() -> Path:
    """A finished run of four steps; not to be changed."""
    run_of(folder_of(), place() / "run")
    return place() / "run"


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Whole ones, whatever layout has written them."""
    found = found_at(checkpoint.parent, int(checkpoint.name.rpartition("-")[2]))
    tensors = Tensors(found, found.storage.manifest(found.step), Keys())
    return {name: tensors.read(name) for name in tensors.names()}


def test_a_checkpoint_has_adapters_alone_and_names_the_model() -> None:
    """Their moments too; the model is named by folder and hashes."""
    found = tensors_of(trained() / "checkpoint-4")
    weights = {name for name in found if name.startswith("model.")}
    assert weights
    assert all(".lora" in name for name in found)
    state = json.loads((trained() / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["pretrained"]["files"].keys() == {"config.json", "model.safetensors"}


def test_the_loss_on_held_out_text_falls_below_the_models(tmp_path: Path) -> None:
    """With a rate of nothing the adapters are zeros, and it is the model's own, bit for bit."""
    folder, options = folder_of(), {"eval_steps": 8, "max_steps": 8, "save_steps": 8}
    tuned = run_of(folder, tmp_path / "tuned", **options).best_eval_loss
    still = run_of(folder, tmp_path / "still", **options, learning_rate=1e-30).best_eval_loss
    model = MoETrainer(
        {"model": {"from_pretrained": str(folder)}},
        training_config=TRAINING | options | {"learning_rate": 1e-30},
        output_dir=tmp_path / "model",
    )
    assert still == model.train(TEXTS).best_eval_loss
    assert tuned is not None
    assert still is not None
    assert tuned < still - 0.05


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Weights and moments. A state in which one B is left out is refused when it is saved."""
    shutil.copytree(trained(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    run_of(folder_of(), tmp_path / "run", resume="auto")
    again, wanted = (tensors_of(run / "checkpoint-4") for run in (tmp_path / "run", trained()))
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_another_model_is_refused(tmp_path: Path) -> None:
    shutil.copytree(trained(), tmp_path / "run")
    shutil.copytree(folder_of(), tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what the adapters of"):
        run_of(tmp_path / "other", tmp_path / "run", resume="auto", max_steps=6)


def test_a_peft_folder_can_be_the_start_and_is_what_was_exported(say: Any, tmp_path: Path) -> None:
    said = say("export", trained(), "--output", tmp_path / "adapter")
    assert said.code == 0, said
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert exported_folder(str(tmp_path / "adapter"))  # which --push takes
    assert say("export", trained(), "--dtype", "bf16", "--output", tmp_path / "half").code == 0
    assert {value.dtype for value in load_file(tmp_path / "half" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    start = {"from_adapter": str(tmp_path / "adapter")}
    run_of(folder_of(), tmp_path / "next", lora=start, max_steps=1, save_steps=1, learning_rate=1e-30)
    found, wanted = tensors_of(tmp_path / "next" / "checkpoint-1"), tensors_of(trained() / "checkpoint-4")
    weights = [name for name in wanted if name.startswith("model.")]
    assert all(torch.equal(found[name], wanted[name]) for name in weights)
    with pytest.raises(ConfigError, match=r"r is 4 there, lora\.r is 8"):
        run_of(folder_of(), tmp_path / "other", lora=start | {"r": 8})


def test_merged_is_the_model_plus_its_adapters(say: Any, tmp_path: Path) -> None:
    """By the formula, tensor by tensor, and as `transformers` computes it. Seen to fail with the scale squared."""
    said = say("export", trained(), "--merge", "--output", tmp_path / "merged", "--dtype", "fp32")
    assert said.code == 0, said
    merged, model = load_file(tmp_path / "merged" / "model.safetensors"), load_file(folder_of() / "model.safetensors")
    adapter = {n.removeprefix("model."): t for n, t in tensors_of(trained() / "checkpoint-4").items()}
    assert merged.keys() == model.keys()

    def product(name: str) -> torch.Tensor:
        return adapter[f"{name}.B"] @ adapter[f"{name}.A"]

    for name, value in model.items():
        ours, wanted = f"layers.{name.split('.')[2]}" if ".layers." in name else "", value.float()
        if ".q_proj." in name or ".o_proj." in name:
            wanted = wanted + 2 * product(f"{ours}.attention.{name.split('.')[-2]}.lora")
        elif name.endswith("gate.weight"):
            wanted = wanted + 2 * product(f"{ours}.moe.router.lora")
        elif ".experts." in name:
            expert, matrix = int(name.split(".")[5]), name.split(".")[6]
            stack = f"{ours}.moe.experts.lora_{'down' if matrix == 'w2' else 'gate_up'}"
            delta = (adapter[f"{stack}.A"][expert] @ adapter[f"{stack}.B"][expert]).t()
            wanted = wanted + 2 * {"w1": delta[:12], "w3": delta[12:], "w2": delta}[matrix]
        assert torch.allclose(merged[name], wanted, rtol=1e-5, atol=1e-6), name


def test_magnitudes_are_exported_read_and_merged_as_whole_lengths(say: Any, tmp_path: Path) -> None:
    """DoRA: the run's checkpoint has what is beyond the model's own lengths. Seen to fail with that exported as it is,
    and with the model's own lengths left in on reading."""
    dora = {"target_modules": ["q_proj", "lm_head"], "use_dora": True}
    run_of(folder_of(), tmp_path / "run", lora=dora)
    name, word = "model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.q_proj"
    weight = load_file(folder_of() / "model.safetensors")[f"{name}.weight"].float()
    found = tensors_of(tmp_path / "run" / "checkpoint-4")
    a, b, change = (found[f"model.layers.0.attention.q_proj.lora.{key}"] for key in ("A", "B", "magnitude"))
    assert 0 < change.abs().max() < 0.1
    assert say("export", tmp_path / "run", "--dtype", "bf16", "--output", tmp_path / "adapter").code == 0
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    magnitude = weight.norm(dim=1) + change
    assert torch.allclose(exported[f"{word}.lora_magnitude_vector"], magnitude, rtol=1e-6)
    said = say("export", tmp_path / "run", "--merge", "--output", tmp_path / "merged", "--dtype", "fp32")
    assert said.code == 0, said  # its logits in transformers are those of the run
    whole = weight + 2 * b @ a
    wanted = magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.allclose(merged[f"{name}.weight"], wanted, rtol=1e-5, atol=1e-7)
    start = dora | {"from_adapter": str(tmp_path / "adapter")}
    run_of(folder_of(), tmp_path / "next", lora=start, max_steps=1, save_steps=1, learning_rate=1e-30)
    again = tensors_of(tmp_path / "next" / "checkpoint-1")["model.layers.0.attention.q_proj.lora.magnitude"]
    assert torch.allclose(again, change, atol=1e-6)


def test_merged_in_the_models_own_type_says_what_rounding_takes(say: Any, tmp_path: Path) -> None:
    said = say("export", trained(), "--merge", "--output", tmp_path / "merged")
    assert said.code == 0, said
    assert "of bfloat16" in said.out
    assert "% of what they add" in said.out


def test_without_a_folder_the_checkpoint_has_the_model_too(say: Any, tmp_path: Path) -> None:
    """Of weights that no folder has. It goes on, exports and merges as well."""
    model = BASE | FAMILIES["mixtral"][0]
    for steps in (2, 4):
        options = TRAINING | {"max_steps": steps, "output_dir": str(tmp_path / "run")}
        MoETrainer({"model": model, "lora": LORA}, training_config=options).train(TEXTS)
    assert "model.embed_tokens.weight" in tensors_of(tmp_path / "run" / "checkpoint-4")
    assert say("checkpoint", "verify", tmp_path / "run").code == 0
    said = say("export", tmp_path / "run", "--output", tmp_path / "adapter")
    assert said.code == 0
    assert "--merge writes both" in said.out
    assert say("export", tmp_path / "run", "--merge", "--no-logits", "--output", tmp_path / "merged").code == 0


def test_adapters_can_be_trained_beside_the_weights_of_an_earlier_run(tmp_path: Path) -> None:
    """From one of its checkpoints, without moments. Seen to fail: it has no tensor ... which this run needs."""
    model = BASE | FAMILIES["mixtral"][0]
    options = TRAINING | {"max_steps": 2, "output_dir": str(tmp_path / "plain")}
    MoETrainer({"model": model}, training_config=options).train(TEXTS)
    resume = {"resume": str(tmp_path / "plain" / "checkpoint-2"), "load_optimizer": False, "allow_config_change": True}
    options |= {"max_steps": 4, "output_dir": str(tmp_path / "tuned")} | resume
    MoETrainer({"model": model, "lora": LORA}, training_config=options).train(TEXTS)
    before, after = tensors_of(tmp_path / "plain" / "checkpoint-2"), tensors_of(tmp_path / "tuned" / "checkpoint-4")
    weights = [name for name in before if name.startswith("model.")]
    assert all(torch.equal(before[name], after[name]) for name in weights)
    assert any(".lora" in name for name in after)


def test_what_is_exported_of_adapters_is_said_where_it_cannot_be(say: Any, tmp_path: Path) -> None:
    said = say("checkpoint", "verify", trained())
    assert said.code == 0
    assert "were not compared" not in said.out
    said = say("export", trained(), "--to", "safetensors", "--output", tmp_path / "x")
    assert (said.code, "not of a run with adapters" in said.err) == (2, True), said


def on_ranks(folder: Path, output: Path, ep_size: int, zero_stage: int, adapter: Path | None, rate: float) -> None:
    mesh = mesh_of(ep_size)
    start = {} if adapter is None else {"from_adapter": str(adapter)}
    config = {"model": {"from_pretrained": str(folder)}, "lora": LORA | start}
    config["parallel"] = {"ep_size": ep_size, "zero_stage": zero_stage}
    options = TRAINING | {"max_steps": 2, "per_device_train_batch_size": 1, "output_dir": str(output)}
    options["learning_rate"] = rate
    MoETrainer(config, training_config=options, mesh=mesh).train(TEXTS)


@pytest.mark.dist
def test_adapters_saved_on_two_ranks_are_those_of_one_process_and_go_on_there(tmp_path: Path) -> None:
    """Experts over ranks, sharded: whole in the checkpoint. Micro-batches of one sample on either side, for dropout."""
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    run_ranks(on_ranks, 2, folder_of(), tmp_path / "two", 2, 3, None, 1e-2)
    run_of(folder_of(), tmp_path / "two", **one, resume="auto")
    run_of(folder_of(), tmp_path / "one", **one)
    for step in (2, 4):
        found, wanted = (tensors_of(tmp_path / run / f"checkpoint-{step}") for run in ("two", "one"))
        assert found.keys() == wanted.keys()
        for name in wanted:
            if name.startswith("model."):
                assert (found[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), (step, name)


@pytest.mark.dist
def test_every_rank_takes_its_experts_out_of_a_peft_folder(say: Any, tmp_path: Path) -> None:
    """Seen to fail with the first experts on every rank."""
    assert say("export", trained(), "--output", tmp_path / "adapter").code == 0
    run_ranks(on_ranks, 2, folder_of(), tmp_path / "run", 2, 1, tmp_path / "adapter", 1e-30)
    found, wanted = tensors_of(tmp_path / "run" / "checkpoint-2"), tensors_of(trained() / "checkpoint-4")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if name.startswith("model."))


def test_merge_and_save_leaves_the_merged_model_beside_the_run(tmp_path: Path) -> None:
    """What `export --merge` writes, of the best step; once, however often the run is started again.

    Seen to fail with the last step's weights under the best one's name.
    """
    best: dict[str, Any] = {"eval_steps": 2, "metric_for_best_model": "eval_loss", "load_best_model_at_end": True}
    best["greater_is_better"] = True  # so that it is not the last
    options = best | {"lora": {"merge_and_save": True}}
    result = run_of(folder_of(), tmp_path / "run", **options)
    assert result.weights == str(tmp_path / "run" / "checkpoint-2")
    assert result.merged == tmp_path / "run" / "merged-2"
    merged, model = load_file(result.merged / "model.safetensors"), load_file(folder_of() / "model.safetensors")
    adapter = tensors_of(tmp_path / "run" / "checkpoint-2")
    name = "model.layers.0.self_attn.q_proj.weight"
    product = adapter["model.layers.0.attention.q_proj.lora.B"] @ adapter["model.layers.0.attention.q_proj.lora.A"]
    assert torch.equal(merged[name], (model[name].double() + 2 * product.double()).float().to(torch.bfloat16))
    again = run_of(folder_of(), tmp_path / "run", **options, resume="auto")
    assert (again.losses, again.merged) == ([], result.merged)
    assert [path.name for path in (tmp_path / "run").glob("merged-*")] == ["merged-2"]
    later = run_of(folder_of(), tmp_path / "run", **options, resume=str(tmp_path / "run" / "checkpoint-2"))
    assert later.merged == tmp_path / "run" / "merged-2-2"  # trained anew: the first one may be another's


def test_a_merge_that_fails_says_that_the_run_is_saved(tmp_path: Path) -> None:
    """And by which command it can be done."""
    folder = shutil.copytree(folder_of(), tmp_path / "model")
    config = {"model": {"from_pretrained": str(folder)}, "lora": LORA | {"merge_and_save": True}}

    class Loses(Callback):
        def on_run_end(self, run: RunState, result: TrainingResult) -> None:
            (folder / "model.safetensors").unlink()

    trainer = MoETrainer(config, training_config=TRAINING, output_dir=tmp_path / "run", callbacks=[Loses()])
    with pytest.raises(MergeError, match=r"model\.safetensors is not there.*export .*checkpoint-4 --merge --output"):
        trainer.train(TEXTS)
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    assert not list((tmp_path / "run").glob("merged-*"))


def logits_on_ranks(run: Path, folder: Path, adapter: Path) -> dict[str, list[float]]:
    mesh, found = mesh_of(2), {}
    for place, how in ((run, {}), (folder, {"adapter": str(adapter)})):
        model, _ = open_model(find_model(str(place), ("parallel.ep_size=2",), nproc=2, **how), mesh)
        with torch.no_grad():
            found[str(place)] = model(torch.arange(3, 27)[None]).flatten()[:500].tolist()
    return found


@pytest.mark.dist
def test_every_rank_reads_the_adapters_of_its_experts(say: Any, tmp_path: Path) -> None:
    """Of a checkpoint and of a PEFT folder. Seen to fail with those of the first experts on every rank."""
    assert say("export", trained(), "--output", tmp_path / "adapter").code == 0
    model, _ = open_model(find_model(str(trained())))
    wanted = model(torch.arange(3, 27)[None]).flatten()[:500].tolist()
    for found in run_ranks(logits_on_ranks, 2, trained(), folder_of(), tmp_path / "adapter"):
        for place, values in found.items():
            assert values == pytest.approx(wanted, rel=1e-4, abs=1e-5), place
