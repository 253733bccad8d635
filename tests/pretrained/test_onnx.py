"""`moe-dist export --to onnx`: ONNX Runtime computes what the model computes, at any length."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Say
from folders import EVERY
from patches import Replace
from saved import TEXTS, found_at

from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.config import Config
from moe_dist.models.transformer import Transformer
from moe_dist.pretrained import dense_experts, onnx_export
from moe_dist.pretrained.dense_experts import DenseTransformer
from moe_dist.train import MoETrainer

DENSE = [name for name in EVERY if name.endswith(("-0", "-1"))]


@pytest.mark.parametrize("name", [*DENSE, "glm4_moe-4", "deepseek_v3-3", "own"])
def test_every_expert_over_every_token_is_the_model(name: str) -> None:
    """Needs no ONNX. A selection bias in use, too: it decides the choice, not the weight."""
    own = {"expert": "own_experts:Squared"} if name == "own" else {}
    config = EVERY["qwen3_moe-0" if own else name]
    model = Transformer(config.model_copy(update={"initializer_range": 0.2} | own)).eval()
    model.initialize(0)
    for moe in model.moe_layers():
        moe.router.bias_E.normal_(generator=torch.Generator().manual_seed(1))
    ids = torch.randint(264, (2, 19), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(ids)
        found = DenseTransformer(model)(ids)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


MODEL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 12,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "sliding_window": 5,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a selection bias in use, and a temperature."""
    place = tmp_path_factory.mktemp("runs") / "run"
    options: dict[str, Any] = {"max_seq_length": 32, "max_steps": 1, "progress": "none", "tensorboard": False}
    options |= {"validation_split": 0.0, "bias_update_rate": 1e-1, "router_temperature": 2.0}
    MoETrainer({}, model_config=MODEL, training_config=options, output_dir=place).train(TEXTS)
    return place


@pytest.mark.slow
def test_onnx_runtime_computes_the_same(run: Path, tmp_path: Path, say: Say) -> None:
    """Two lengths and a batch of one, none of them that of the tracing."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    said = say("export", run, "--to", "onnx", "-o", tmp_path / "out")
    assert said.code == 0, said
    assert "onnxruntime" in said.out
    found = found_at(run, 1)
    manifest = found.storage.manifest(1)
    config = Config.model_validate(saved_config(run))
    model = onnx_export.build(found, manifest, Keys(), config)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 5), (1, 40), (2, 12)):
        ids = torch.randint(264, (batch, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = model(ids)
        (logits,) = session.run(["logits"], {"input_ids": ids.numpy()})
        difference = torch.from_numpy(logits) - expected
        assert float(difference.norm() / expected.norm()) < 1e-4


@pytest.mark.slow
def test_a_difference_ends_with_1_and_nothing_is_left(run: Path, tmp_path: Path, say: Say, replace: Replace) -> None:
    """Planted: gate and up in the other order."""
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    swiglu = dense_experts.swiglu
    replace(dense_experts, "swiglu", lambda gate_up, act: swiglu(gate_up.roll(gate_up.shape[-1] // 2, -1), act))
    said = say("export", run, "--to", "onnx", "-o", tmp_path / "out")
    assert said.code == 1, said
    assert "logits of (2, 64) tokens: relative difference" in said.out
    assert "logits of (1, 7) tokens: relative difference" in said.out
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_one_line(run: Path, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    said = say("export", run, "--to", "onnx", "-o", tmp_path / "out", "--dtype", "bf16")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "written in float32" in said.err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = say("export", run, "--to", "onnx", "-o", tmp_path / "out")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "pip install 'moe-dist[onnx]'" in said.err
    assert not list(tmp_path.iterdir())


def saved_config(run: Path) -> Any:
    from moe_dist.checkpoint.reading import read_trainer_state

    found = found_at(run, 1)
    return read_trainer_state(found, found.storage.manifest(1), Keys())["config"]
