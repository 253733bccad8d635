"""`moe-dist export --to safetensors`: what no family expresses leaves bit by bit, and comes back by `import`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Say
from patches import Replace
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved import TEXTS, found_at

from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.tools.inspecting import Tensors, digests
from moe_dist.pretrained import export, own_format, safetensors_files
from moe_dist.pretrained.importing import import_checkpoint
from moe_dist.train import MoETrainer

MODEL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "moe_intermediate_size": 12,
    "num_experts": 5,
    "num_experts_per_tok": 2,
}


def train(config: Any, place: Path, **training: Any) -> MoETrainer:
    options = {"max_seq_length": 32, "max_steps": 2, "progress": "none", "tensorboard": False, "seed": 3}
    options |= {"validation_split": 0.0, "bias_update_rate": 1e-2, "save_at_end": True} | training
    trainer = MoETrainer(config, training_config=options, output_dir=place)
    trainer.train(TEXTS)
    return trainer


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bias": ({}, {}),
    "tied-shared-sigmoid": (
        {"tie_word_embeddings": True, "shared_expert_intermediate_size": 8, "scoring_func": "sigmoid"},
        {"router_temperature": 2.0},
    ),
    "own-expert": ({"expert": "own_experts:Squared"}, {}),
    "own-stack-and-router": ({"expert": "own_experts:Stack", "router": "own_experts:Biased"}, {}),
    "latent": (
        {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7, "qk_norm": False},
        {},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant: str, tmp_path: Path, say: Say) -> None:
    """A checkpoint, a folder of small files, step 0 of another run: all weights bit by bit, in one digest."""
    model, training = VARIANTS[variant]
    before = train({"model": MODEL | model}, tmp_path / "run", **training)
    said = say("export", tmp_path / "run", "--to", "safetensors", "-o", tmp_path / "out", "--max-shard-size", "8KB")
    assert said.code == 0, said
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["model"]["num_experts"]) == ("moe_dist", 5)
    assert "lm_head.weight" not in before.model.state_dict() or len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    said = say("checkpoint", "import", tmp_path / "out", "--output", tmp_path / "again")
    assert said.code == 0, said
    assert say("checkpoint", "verify", tmp_path / "again").code == 0
    one, two = digests(found_at(tmp_path / "run", 2)), digests(found_at(tmp_path / "again", 0))
    assert two == {name: digest for name, digest in one.items() if name.startswith("model.")}
    assert any("router" in name for name in two)
    after = train(tmp_path / "again" / "config.yaml", tmp_path / "again", learning_rate=1e-30, max_steps=1)
    assert after.config.balance.router_temperature == training.get("router_temperature", 1.0)
    again = {name: tensor for name, tensor in before.model.state_dict().items() if not name.endswith("bias_E")}
    assert [name for name in again if not torch.equal(after.model.state_dict()[name], again[name])] == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs") / "run"
    train({"model": MODEL}, place)
    return place


def test_rounded_weights_and_exact_biases(run: Path, tmp_path: Path, say: Say) -> None:
    said = say("export", run, "--to", "safetensors", "-o", tmp_path / "out", "--dtype", "bf16")
    assert said.code == 0, said
    weights = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in weights.items()}
    assert {kind for name, kind in kinds.items() if not name.endswith("bias_E")} == {torch.bfloat16}
    assert {kind for name, kind in kinds.items() if name.endswith("bias_E")} == {torch.float32}
    saved = Tensors(found_at(run, 2), found_at(run, 2).storage.manifest(2), Keys())
    assert all(torch.equal(saved.read(f"model.{name}").to(kinds[name]), weights[name]) for name in weights)
    assert weights["layers.1.moe.router.bias_E"].count_nonzero() > 0


def wrong_byte(path: Path, *arguments: Any) -> None:
    written(path, *arguments)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


written = safetensors_files.write_file
LEFT_OUT = "layers.0.moe.router.bias_E"


class Forgetful(own_format.OwnWeights):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        del self.shapes[LEFT_OUT]


@pytest.mark.parametrize(
    ("module", "name", "planted", "seen"),
    [
        (safetensors_files, "write_file", wrong_byte, "not as in"),
        (export, "OwnWeights", Forgetful, f"{LEFT_OUT}: missing"),
        (export, "own_config", lambda model, temperature: own_format.own_config(model, 3.0), "is another model"),
    ],
)
def test_planted_bugs_are_seen_and_leave_nothing(
    module: Any, name: str, planted: Any, seen: str, run: Path, tmp_path: Path, say: Say, replace: Replace
) -> None:
    replace(module, name, planted)
    said = say("export", run, "--to", "safetensors", "-o", tmp_path / "out")
    assert said.code == 1, said
    assert seen in said.out
    assert not list(tmp_path.iterdir())


def change(name: str, values: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        new = values(weights.pop(name))
        save_file(weights | ({} if new is None else {name: new.contiguous()}), folder / "model.safetensors")

    return damage


def reconfigured(**keys: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | keys))

    return damage


@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        (change("layers.0.moe.experts.w_down", lambda t: None), "layers.0.moe.experts.w_down: missing"),
        (change("layers.0.moe.experts.w_down", lambda t: t[1:]), "w_down: [4, 12, 16] instead of [5, 12, 16]"),
        (change("norm.weight", lambda t: t / 0), "norm.weight: a value that is not finite"),
        (reconfigured(version=2), "not the configuration of a model of moe-dist"),
        (reconfigured(model={"num_experts": 0, "hidden_size": "x"}), "config.json: model.hidden_size"),
    ],
)
def test_a_damaged_folder_is_named(
    damage: Callable[[Path], None], seen: str, run: Path, tmp_path: Path, say: Say
) -> None:
    assert say("export", run, "--to", "safetensors", "-o", tmp_path / "out").code == 0
    damage(tmp_path / "out")
    said = say("checkpoint", "import", tmp_path / "out", "--output", tmp_path / "again")
    assert (said.code, said.err.count("\n")) == (2, 1), said
    assert seen in said.err
    assert not (tmp_path / "again").exists()


def test_no_class_of_a_folder_is_imported(run: Path, tmp_path: Path, say: Say) -> None:
    """A configuration may name any class; only who trains with it imports it."""
    assert say("export", run, "--to", "safetensors", "-o", tmp_path / "out").code == 0
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["model"]
    reconfigured(model=section | {"expert": "evil:Expert"})(tmp_path / "out")
    sys.path.insert(0, str(tmp_path))
    try:
        import_checkpoint(tmp_path / "out", tmp_path / "again")
    finally:
        sys.path.remove(str(tmp_path))
    assert "evil" not in sys.modules


def test_from_pretrained_says_what_to_do(run: Path, tmp_path: Path, say: Say) -> None:
    assert say("export", run, "--to", "safetensors", "-o", tmp_path / "out").code == 0
    (tmp_path / "run.yaml").write_text("model: {from_pretrained: out}")
    said = say("check", tmp_path / "run.yaml")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "moe-dist checkpoint import" in said.err


def test_blocks_of_a_large_tensor(run: Path, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row at a time: the same file."""
    assert say("export", run, "--to", "safetensors", "-o", tmp_path / "one").code == 0
    monkeypatch.setattr(own_format, "BLOCK_BYTES", 1)
    assert say("export", run, "--to", "safetensors", "-o", tmp_path / "two").code == 0
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with safe_open(one, framework="pt") as file:
        assert file.keys()[0] == "embed_tokens.weight"
