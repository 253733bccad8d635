"""Every family beside `transformers`: logits, loss, all gradients, and the way there and back, bit by bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folders import EVERY, FAMILIES, kind_of, random_weights, write_folder
from safetensors.torch import load_file
from torch import Tensor

from moe_dist.config import BalanceConfig, ModelConfig, load_mapping
from moe_dist.models.huggingface import from_huggingface, huggingface_config, to_huggingface
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.pretrained.loading import load_pretrained
from moe_dist.train.build import build_model

transformers = pytest.importorskip("transformers")


def reference(config: ModelConfig) -> Any:
    """The model of `transformers`, with random weights of a size that matters, and selection biases that choose."""
    values = huggingface_config(config)
    theirs = transformers.AutoConfig.for_model(**values)
    # Its grouped kernel refuses odd sizes.
    kernels = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(theirs, **kernels)
    assert type(model).__name__ == values["architectures"][0]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name))
    return model.float()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", EVERY)
def test_logits_loss_and_all_gradients(name: str) -> None:
    """Whole sequences, and documents packed into one. Seen to fail with gate and up exchanged, with softmax over the
    chosen experts where weights are raw, without the shared expert's gate, with the norm of queries over each head for
    OLMoE, with the bias in the weights of experts, with halves rotated where neighbours are, without sinks, with a
    window of one more, with the clamp of the unit on one side only."""
    config = EVERY[name]
    assert kind_of(config) == name.rpartition("-")[0]
    theirs = reference(config)
    model = Transformer(config, BalanceConfig(router_aux_loss_coef=0.0))
    model.load_state_dict(from_huggingface(theirs.state_dict(), config))
    ids = torch.randint(0, config.vocab_size, (3, 19), generator=torch.Generator().manual_seed(2))
    _compare(model, theirs, ids, [19])
    _compare(model, theirs, ids[:1], [7, 1, 11])


def _compare(model: Transformer, theirs: Any, ids: Tensor, lengths: list[int]) -> None:
    """Documents of these lengths in each row here, and each by itself there."""
    model.zero_grad()
    theirs.zero_grad()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].expand(len(ids), -1)
    expected = torch.cat([theirs(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    packed = {} if len(lengths) == 1 else {"position_ids": positions, "document_ids": documents}
    logits = model(ids, **packed)
    assert relative_error(logits.detach(), expected.detach()) < 1e-5
    for each in (logits, expected):
        F.cross_entropy(each[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {key: p.grad for key, p in model.named_parameters(remove_duplicate=False)}
    assert all(gradient is not None for gradient in gradients.values())
    ours = to_huggingface(gradients, model.config, fused=True)  # type: ignore[arg-type]
    wanted = {key: p.grad for key, p in theirs.named_parameters()}
    assert ours.keys() == wanted.keys()
    errors = {key: relative_error(ours[key], wanted[key]) for key in wanted}
    assert max(errors.values()) < 1e-5, {key: error for key, error in errors.items() if error >= 1e-5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", EVERY)
def test_in_and_out_is_the_same_bit_by_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Three files and an index, matrices of experts or stacks: what is read, written again, is what was there."""
    config = EVERY[name]
    for fused in (False, True):
        weights = random_weights(config, dtype, fused)
        folder = write_folder(tmp_path / f"hf{fused}", config, weights, 3)
        run = load_mapping({"model": {"from_pretrained": str(folder)}}, notice=lambda text: None)
        model = build_model(run, Mesh.single())
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(float("nan"))  # what nothing sets stays so
        load_pretrained(model, run.model, Mesh.single())
        back = to_huggingface(_without_unset_biases(model), config, fused=fused)
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[key], weights[key].float()) for key in weights)


def _without_unset_biases(model: Transformer) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in model.state_dict().items() if not tensor.isnan().any()}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_save_pretrained(family: str, tmp_path: Path) -> None:
    config = EVERY[f"{family}-0"]
    theirs = reference(config)
    theirs.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    ours = to_huggingface(from_huggingface(theirs.state_dict(), config), config)
    assert ours.keys() == written.keys()
    assert all(torch.equal(ours[name], written[name]) for name in written)
    assert all(tensor.is_contiguous() for tensor in ours.values())


@pytest.mark.parametrize("name", EVERY)
def test_what_transformers_writes_of_it_is_read_as_the_same_model(name: str, tmp_path: Path) -> None:
    """Its config.json has keys of its own, in words of its own."""
    from moe_dist.config.huggingface import architecture_differences, model_of, read_huggingface

    config = EVERY[name]
    theirs = transformers.AutoConfig.for_model(**huggingface_config(config))
    theirs.save_pretrained(tmp_path)
    found = read_huggingface(tmp_path / "config.json", "a test")
    assert found.family.model_type == name.rpartition("-")[0]
    assert architecture_differences(model_of(found), config) == []


def test_a_family_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that docs/families.md makes up, installed beside: its folder is read, and written as its own again."""
    from moe_dist.config.huggingface import model_of, read_huggingface
    from moe_dist.models.tensor_names import Names

    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text("utf-8")
    (tmp_path / "acme_moe.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    (tmp_path / "acme-1.dist-info").mkdir()
    (tmp_path / "acme-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1\n")
    entry = text.partition("```toml\n")[2].partition("```")[0]
    group, name, target = re.findall(r"[\w.:]+", entry.replace("project.entry-points.", ""))
    (tmp_path / "acme-1.dist-info" / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = EVERY["qwen3_moe-0"].model_copy(update={"norm_topk_prob": False, "model_type": "acme_moe"})
    weights = random_weights(config)
    assert "model.layers.1.mlp.switch.weight" in weights
    folder = write_folder(tmp_path / "hf", config, weights, 3)
    assert json.loads((folder / "config.json").read_text())["pool"] == 6
    found = read_huggingface(folder / "config.json", "a test")
    assert Names(model_of(found)).family.model_type == "acme_moe"
    run = load_mapping({"model": {"from_pretrained": str(folder)}}, notice=lambda text: None)
    model = build_model(run, Mesh.single())
    load_pretrained(model, run.model, Mesh.single())
    back = to_huggingface(model, run.model)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)
