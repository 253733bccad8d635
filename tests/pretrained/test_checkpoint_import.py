"""`moe-dist checkpoint import`: a folder as step 0 of a run, which trains as with `from_pretrained`."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Say
from folders import EVERY, MODELS, kind_of, random_weights, write_folder
from patches import Replace
from ranks import run_ranks
from saved import TEXTS, found_at
from tiny import mesh_of

from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.tools.inspecting import Tensors, digests
from moe_dist.models.huggingface import from_huggingface
from moe_dist.pretrained import importing
from moe_dist.pretrained.folder_weights import HuggingFaceWeights
from moe_dist.pretrained.importing import import_checkpoint
from moe_dist.train import MoETrainer

OPTIONS: dict[str, Any] = {
    "max_seq_length": 32,
    "max_steps": 3,
    "save_steps": 1,
    "progress": "none",
    "tensorboard": False,
    "validation_split": 0.0,
    "learning_rate": 1e-2,
    "logging_steps": 1,
}


def train(config: Any, run: str, parallel: dict[str, Any] | None = None, **options: Any) -> list[float]:
    """Losses of three steps. On several ranks the same global batch."""
    parallel = parallel or {}
    mesh = mesh_of(parallel.get("ep_size", 1), pp_size=parallel.get("pp_size", 1))
    options = OPTIONS | {"gradient_accumulation_steps": 2 // mesh.layout.dp_size} | options
    if isinstance(config, dict):
        config = config | {"parallel": parallel}
    else:
        options |= parallel
    trainer = MoETrainer(config, training_config=options, output_dir=run, mesh=mesh)
    trainer.train(TEXTS)
    return trainer.losses


@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
@pytest.mark.parametrize("name", [name for name in EVERY if name.endswith(("-0", "-1"))])
def test_every_weight_is_the_folders(name: str, fused: bool, tmp_path: Path) -> None:
    """In boxes of a few rows: shards of 3 KB cut stacks between experts and embeddings between rows."""
    config = EVERY[name]
    weights = random_weights(config, torch.bfloat16, fused)
    folder = write_folder(tmp_path / "hf", config, weights, 3)
    done = import_checkpoint(folder, tmp_path / "run", shard_bytes=3000)
    wanted = from_huggingface(weights, config)
    saved = Tensors(done.checkpoint, done.checkpoint.storage.manifest(0), Keys())
    assert {f"model.{key}" for key in wanted} | {"model.lm_head.weight"} == set(saved.names())
    assert [key for key in wanted if not torch.equal(wanted[key].float(), saved.read(f"model.{key}"))] == []
    assert done.num_files > 3


def test_the_checkpoint_verifies_and_nothing_is_overwritten(tmp_path: Path, say: Say) -> None:
    config = MODELS["qwen"]
    write_folder(tmp_path / "hf", config, random_weights(config))
    said = say("checkpoint", "import", tmp_path / "hf", "--output", tmp_path / "run")
    assert said.code == 0, said
    assert "verified, every value is that of" in said.out
    assert say("checkpoint", "verify", tmp_path / "run").code == 0
    assert "0  complete" in say("checkpoint", "ls", tmp_path / "run").out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".run.lock", "checkpoint-0", "config.yaml"]
    said = say("checkpoint", "import", tmp_path / "hf", "--output", tmp_path / "run")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "is there already" in said.err
    said = say("checkpoint", "import", tmp_path / "nowhere", "--output", tmp_path / "other")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage", ["nan", "missing", "wrong-write"])
def test_what_is_wrong_leaves_nothing(damage: str, tmp_path: Path, say: Say, replace: Replace) -> None:
    """`wrong-write` was seen to stay, with exit code 0, without the comparison afterwards."""
    config = MODELS["qwen"]
    weights = random_weights(config)
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    wanted = {"nan": f"{name}: a value that is not finite", "missing": f"{name}: missing"}
    if damage == "nan":
        weights[name][3, 1] = float("nan")
    elif damage == "missing":
        del weights[name]
    else:
        write = importing._write_shards

        def writes_another(weights: Any, saving: Any, shard_bytes: int) -> Any:
            read = weights.read
            weights.read = lambda name, first, count: read(name, first, count) + ("w_down" in name and first == 0)
            try:
                return write(weights, saving, shard_bytes)
            finally:
                weights.read = read

        replace(importing, "_write_shards", writes_another)
    write_folder(tmp_path / "hf", config, weights)
    said = say("checkpoint", "import", tmp_path / "hf", "--output", tmp_path / "run")
    assert said.code == 2
    assert wanted.get(damage, "w_down is not the folder's") in said.err
    assert said.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("name", ["qwen3_moe-1", "deepseek_v3-0", "gpt_oss-0"])
def test_a_run_from_it_is_a_run_from_pretrained(name: str, tmp_path: Path) -> None:
    """Losses, and what is saved at the end, moments too, bit by bit; the folder is not needed."""
    config = EVERY[name]
    folder = write_folder(tmp_path / "hf", config, random_weights(config, torch.bfloat16), 2)
    expected = train({"model": {"from_pretrained": str(folder)}}, str(tmp_path / "one"))
    import_checkpoint(folder, tmp_path / "two")
    shutil.rmtree(folder)
    found = train(tmp_path / "two" / "config.yaml", str(tmp_path / "two"))
    assert found == expected
    assert len(set(found)) == 3
    one, two = found_at(tmp_path / "one", 3), found_at(tmp_path / "two", 3)
    assert digests(one) == digests(two)
    assert one.storage.manifest(3).pretrained == two.storage.manifest(3).pretrained
    # And on from there, as any run does.
    assert len(train(tmp_path / "two" / "config.yaml", str(tmp_path / "two"), max_steps=4)) == 1


def test_another_model_is_refused_and_another_rate_is_not(tmp_path: Path) -> None:
    config = MODELS["mixtral"]
    import_checkpoint(write_folder(tmp_path / "hf", config, random_weights(config)), tmp_path / "run")
    with pytest.raises(ValueError, match=r"checkpoint-0: the run's model is another: .*num_experts"):
        train({"model": {"num_experts": 8}}, str(tmp_path / "run"))
    train({"model": {"from_pretrained": str(tmp_path / "hf"), "attn_implementation": "eager"}}, str(tmp_path / "run"))


def own_bytes() -> int:
    """Memory of this process without mapped files, which the system takes back as it likes."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.slow
def test_memory_is_that_of_one_file(tmp_path: Path, replace: Replace) -> None:
    """Seen red with the limit of a file at 1 GiB: 81 MB above the start, for weights of 77 MB."""
    big = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 24, "num_hidden_layers": 16}
    config = MODELS["qwen"].model_copy(update=big)
    folder = write_folder(tmp_path / "hf", config, random_weights(config), 2)
    seen: list[int] = []
    read = HuggingFaceWeights.read

    def reads(self: Any, *rows: Any) -> torch.Tensor:
        values = read(self, *rows)
        seen.append(own_bytes())
        return values

    replace(HuggingFaceWeights, "read", reads)
    import_checkpoint(folder, tmp_path / "warm", shard_bytes=2**20)
    seen.clear()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be taken again without being seen
    done = import_checkpoint(folder, tmp_path / "run", shard_bytes=2**20)
    assert done.num_bytes > 76e6
    assert max(seen) - seen[0] < done.num_bytes / 3  # hashing in four threads has buffers too


@pytest.mark.dist
@pytest.mark.parametrize("parallel", [{"ep_size": 2}, {"pp_size": 2}, {"ep_size": 2, "zero_stage": 3}])
def test_in_another_layout(parallel: dict[str, Any], tmp_path: Path) -> None:
    config = EVERY["deepseek_v3-2"]
    assert kind_of(config) == "deepseek_v3"
    folder = write_folder(tmp_path / "hf", config, random_weights(config), 2)
    import_checkpoint(folder, tmp_path / "two", shard_bytes=5000)
    pretrained = {"model": {"from_pretrained": str(folder)}}
    expected = run_ranks(train, 2, pretrained, str(tmp_path / "one"), parallel)[0]
    assert run_ranks(train, 2, pretrained, str(tmp_path / "two"), parallel)[0] == expected
