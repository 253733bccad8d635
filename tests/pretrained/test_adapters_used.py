"""Runs with adapters as models to use: evaluated and asked from their checkpoint, or beside a model that is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Say
from folders import BASE, FAMILIES
from saved import TEXTS
from test_lora_runs import LORA, TRAINING, folder_of, run_of, trained

from moe_dist.config import ConfigError
from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.pretrained.inference import find_model, open_model
from moe_dist.train import MoETrainer

ROW = torch.arange(3, 27)[None]


def logits(place: Path | str, **how: Any) -> torch.Tensor:
    model, _ = open_model(find_model(str(place), **how))
    with torch.no_grad():
        return model(ROW)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run as one model."""
    from moe_dist.checkpoint.reading import locate
    from moe_dist.checkpoint.storage import open_storage
    from moe_dist.checkpoint.storage.encryption import Keys
    from moe_dist.pretrained.export import export

    folder = tmp_path_factory.mktemp("used")
    found = locate(str(trained() / "checkpoint-4"), open_storage("."))
    parts = (found, found.storage.manifest(4), Keys())
    export(*parts, folder / "merged", merge=True, dtype="fp32", logits=False)
    export(*parts, folder / "peft")
    return folder / "merged"


def test_a_run_is_its_model_with_its_adapters(merged: Path) -> None:
    """By itself, or beside a model that is named: from its checkpoint, and from a folder for PEFT.

    Seen to fail: it has no tensor model.embed_tokens.weight.
    """
    wanted, base = logits(merged), logits(folder_of())
    assert (wanted - base).norm() > 1e-2 * base.norm()
    for place, how in (
        (trained(), {}),
        (trained() / "checkpoint-4", {}),
        (folder_of(), {"adapter": str(trained())}),
        (folder_of(), {"adapter": str(trained() / "checkpoint-4")}),
        (folder_of(), {"adapter": str(merged.parent / "peft")}),
    ):
        assert torch.allclose(logits(place, **how), wanted, rtol=1e-4, atol=1e-5), (place, how)
    earlier = logits(folder_of(), adapter=str(trained()), step=2)
    assert torch.equal(earlier, logits(trained() / "checkpoint-2"))
    assert not torch.allclose(earlier, wanted, atol=1e-3)
    half = logits(folder_of(), adapter=str(trained()), dtype="bf16")
    assert half.dtype == torch.bfloat16
    assert (half - wanted).norm() < 0.2 * wanted.norm()  # some tokens go to other experts


def test_a_checkpoint_that_has_its_model_too_is_used_with_its_adapters(tmp_path: Path, say: Say) -> None:
    """Seen to fail: the adapters were left out without a word."""
    options = TRAINING | {"max_steps": 1, "save_steps": 1, "learning_rate": 1.0, "output_dir": str(tmp_path / "run")}
    config = {"model": BASE | FAMILIES["mixtral"][0], "lora": LORA}
    MoETrainer(config, training_config=options).train(TEXTS)
    assert say("export", tmp_path / "run", "--merge", "--no-logits", "-o", tmp_path / "merged").code == 0
    assert torch.allclose(logits(tmp_path / "run"), logits(tmp_path / "merged"), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="has its model with its adapters; give it as MODEL"):
        find_model(str(folder_of()), adapter=str(tmp_path / "run"))


def test_commands_take_an_adapter(merged: Path, say: Say, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXTS[0])
    losses = []
    for words in ((merged,), (folder_of(), "--adapter-path", trained() / "checkpoint-4")):
        said = say("evaluate", *words, "--data", tmp_path / "text.txt", "--json", "-", "data.max_seq_length=32")
        assert said.code == 0, said
        losses.append(json.loads(said.out)["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    short = ("--prompt", "def ", "--max-tokens", 8, "--ignore-eos")
    beside = (folder_of(), "--adapter-path", merged.parent / "peft")
    answers = [say("generate", *words, *short) for words in ((merged,), beside)]
    assert answers[0].code == answers[1].code == 0, answers
    assert answers[0].out == answers[1].out


def test_what_does_not_fit_together_is_said(merged: Path, tmp_path: Path) -> None:
    adapter = str(trained() / "checkpoint-4")
    with pytest.raises(ConfigError, match="MODEL is the Hugging Face folder these adapters belong to"):
        find_model(str(trained()), adapter=adapter)
    with pytest.raises(ConfigError, match=r"of .*merged is not what its adapters were trained on .*give that model"):
        logits(merged, adapter=adapter)
    run_of(shutil.copytree(folder_of(), tmp_path / "model"), tmp_path / "run", max_steps=1, save_steps=1)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"/model, is not there; give it as MODEL --adapter-path .*checkpoint-1"):
        find_model(str(tmp_path / "run"))
    broken = shutil.copytree(merged.parent / "peft", tmp_path / "peft")
    (broken / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"peft: adapter_config\.json cannot be read: KeyError\('r'\)"):
        find_model(str(folder_of()), adapter=str(broken))
    with pytest.raises(ValueError, match="these experts have adapters beside them; moe-dist export --merge"):
        MoEInferenceEngine(*open_model(find_model(str(trained()))), expert_cache_size_gb=1.0)
