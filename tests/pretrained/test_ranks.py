"""In over several ranks, and out again: each rank reads what it holds, and nothing is lost on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folders import EVERY, MODELS, random_weights, write_folder
from ranks import run_ranks
from safetensors.torch import load_file
from saved import TEXTS, found_at
from tiny import mesh_of

from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.config import load_mapping
from moe_dist.models.huggingface import from_huggingface, to_huggingface
from moe_dist.models.tensor_names import Names
from moe_dist.models.transformer import Transformer
from moe_dist.pretrained.export import export
from moe_dist.pretrained.loading import load_pretrained
from moe_dist.pretrained.saved_weights import SavedWeights
from moe_dist.pretrained.source import SINGLE
from moe_dist.train import MoETrainer
from moe_dist.train.build import build_model

pytestmark = pytest.mark.dist


def bytes_read(folder: str, ep_size: int, pp_size: int) -> list[int]:
    tree = {"model": {"from_pretrained": folder}, "parallel": {"ep_size": ep_size, "pp_size": pp_size}}
    tree["train"] = {"gradient_accumulation_steps": 2}  # a pipeline needs them
    config, mesh = load_mapping(tree, notice=lambda text: None), mesh_of(ep_size, pp_size=pp_size)
    return load_pretrained(build_model(config, mesh), config.model, mesh).bytes_read


@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
def test_a_rank_reads_its_own_bytes(fused: bool, tmp_path: Path) -> None:
    """Exactly: with ep 2 half of the experts, with pp 2 one of two layers and one end."""
    config = MODELS["qwen"]
    folder = str(write_folder(tmp_path / "hf", config, random_weights(config, torch.bfloat16, fused), 3))
    sizes = {name: 2 * torch.Size(part.shape).numel() for name, part in Names(config).parts().items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    dense = sum(sizes.values()) - experts
    assert run_ranks(bytes_read, 2, folder, 1, 1)[0] == [dense + experts] * 2
    assert run_ranks(bytes_read, 2, folder, 2, 1)[0] == [dense + experts // 2] * 2
    first = sum(size for name, size in sizes.items() if ".layers.0." in name or "embed" in name)
    assert run_ranks(bytes_read, 2, folder, 1, 2)[0] == [first, dense + experts - first]


def train(folder: str, run: str, parallel: dict[str, Any], steps: int = 3, rate: float = 1e-30) -> list[float]:
    mesh = mesh_of(parallel.get("ep_size", 1), pp_size=parallel.get("pp_size", 1))
    trainer = MoETrainer(
        {"model": {"from_pretrained": folder}, "parallel": parallel},
        training_config={
            "max_seq_length": 32,
            "max_steps": steps,
            "progress": "none",
            "tensorboard": False,
            "validation_split": 0.0,
            "learning_rate": rate,
            "lr_scheduler_type": "constant",
            "gradient_accumulation_steps": 4 // mesh.layout.dp_size,  # the same batch in every layout
        },
        output_dir=run,
        mesh=mesh,
    )
    return [trainer.train(TEXTS).initial_loss or 0.0]


@pytest.mark.parametrize(
    ("name", "parallel", "fused"),
    [
        ("qwen3_moe-0", {"ep_size": 2}, False),
        ("qwen3_moe-0", {"pp_size": 2}, True),
        ("qwen3_moe-1", {"ep_size": 2, "zero_stage": 1}, True),
        ("mixtral-2", {"ep_size": 2, "zero_stage": 3}, True),
        ("mixtral-0", {"pp_size": 2}, False),
        ("qwen2_moe-0", {"ep_size": 2}, True),
        ("qwen2_moe-3", {"pp_size": 2}, False),
        ("olmoe-2", {"ep_size": 2, "zero_stage": 1}, True),
        ("olmoe-0", {"pp_size": 2}, False),
        ("glm4_moe-3", {"ep_size": 2, "zero_stage": 3}, False),
        ("glm4_moe-2", {"pp_size": 2}, True),
        ("deepseek_v3-4", {"ep_size": 2}, True),
        ("deepseek_v3-3", {"pp_size": 2, "zero_stage": 3}, False),
        ("gpt_oss-0", {"ep_size": 2, "zero_stage": 3}, False),
        ("gpt_oss-2", {"pp_size": 2}, True),
    ],
)
def test_there_and_back_is_bitwise_the_same(name: str, parallel: dict[str, Any], fused: bool, tmp_path: Path) -> None:
    """Three steps at a rate of nothing on two ranks; a checkpoint; an export by one process. Every family with its
    experts over ranks and in a pipeline, one from matrices of experts and the other from stacks.

    The first loss is that of one process: what is computed does not depend on the layout.
    """
    config = EVERY[name]
    weights = random_weights(config, fused=fused)
    folder = write_folder(tmp_path / "hf", config, weights, 3)
    weights = to_huggingface(from_huggingface(weights, config), config)
    losses = run_ranks(train, 2, str(folder), str(tmp_path / "run"), parallel)
    assert losses[0] == pytest.approx(train(str(folder), str(tmp_path / "alone"), {}), rel=1e-5)
    found = found_at(tmp_path / "run", 3)
    done = export(found, found.storage.manifest(3), Keys(), tmp_path / "out")
    assert [line for check in done.checks for line in check.problems] == []
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert [key for key in weights if not torch.equal(back[key], weights[key])] == []


def refused(folder: str) -> str:
    config = load_mapping({"model": {"from_pretrained": folder}, "parallel": {"ep_size": 2}})
    with pytest.raises(ValueError) as caught:
        load_pretrained(build_model(config, mesh_of(2)), config.model, mesh_of(2))
    return str(caught.value)


def test_every_rank_is_told_what_one_has_found(tmp_path: Path) -> None:
    """A NaN in an expert that only rank 1 reads."""
    config = MODELS["qwen"]
    weights = random_weights(config)
    name = "model.layers.0.mlp.experts.5.up_proj.weight"
    weights[name][2, 1] = float("inf")
    said = run_ranks(refused, 2, str(write_folder(tmp_path / "hf", config, weights)))
    assert said[0] == said[1]
    assert f"{name}: a value that is not finite" in said[0]


@pytest.mark.parametrize(
    ("name", "ranks", "parallel"),
    [
        ("qwen3_moe-3", 4, {"ep_size": 2, "pp_size": 2}),
        ("glm4_moe-3", 4, {"ep_size": 2, "pp_size": 2, "zero_stage": 3}),
        ("deepseek_v3-4", 2, {"ep_size": 2, "zero_stage": 3}),
    ],
)
def test_trained_in_a_layout_it_goes_on_in_transformers(
    name: str, ranks: int, parallel: dict[str, Any], tmp_path: Path
) -> None:
    """Five steps from a folder, an export, and `transformers.Trainer` from there: the same logits, and our loss."""
    transformers = pytest.importorskip("transformers")
    config = EVERY[name]
    folder = write_folder(tmp_path / "hf", config, random_weights(config), 3)
    run_ranks(train, ranks, str(folder), str(tmp_path / "run"), parallel, 5, 1e-2)
    found = found_at(tmp_path / "run", 5)
    manifest = found.storage.manifest(5)
    done = export(found, manifest, Keys(), tmp_path / "out")
    assert done.is_proven, done.checks
    weights = SavedWeights(found, manifest, Keys(), config, None)
    ours = Transformer(config)
    ours.load_state_dict(weights.read_ours())
    weights.close()
    before = random_weights(config)
    same = [key for key, tensor in load_file(tmp_path / "out" / SINGLE).items() if torch.equal(tensor, before[key])]
    assert [key for key in same if "correction_bias" not in key] == []  # that one moves by balance alone
    kernels = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **kernels)
    ids = torch.randint(0, config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected, logits = theirs(ids).logits, ours(ids)
    assert float((logits - expected).norm() / expected.norm()) < 1e-5
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    options = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": []}
    arguments = transformers.TrainingArguments(tmp_path / "more", **options, save_strategy="no", disable_tqdm=True)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(theirs, arguments, train_dataset=rows)
    trainer.train()
    first, second = (entry["loss"] for entry in trainer.state.log_history[:2])
    assert first == pytest.approx(float(loss), abs=1e-4)  # it rounds what it logs
    assert second < first
