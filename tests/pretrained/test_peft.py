"""What `peft` makes of our adapters: the same logits, and the same gradients of every A and B."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folders import BASE, FAMILIES

from moe_dist.config import ConfigError, load_mapping
from moe_dist.models.huggingface import from_huggingface, huggingface_config
from moe_dist.models.transformer import Transformer
from moe_dist.pretrained.peft_format import CONFIG, WEIGHTS, peft_targets, read_adapter, write_adapter

CASES = {
    "qwen3_moe": ["q_proj", "k_proj", "o_proj", "experts", "gate", "lm_head"],
    "mixtral": ["q_proj", "experts.down_proj"],
    "deepseek_v3": ["q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "gate_proj", "experts"],
    "gpt_oss": ["v_proj", "experts"],
    "qwen2_moe": "all-linear",
}


DORA = {
    "qwen3_moe": ["q_proj", "o_proj", "lm_head"],
    "qwen2_moe": ["q_proj", "v_proj", "shared_expert_gate"],
    "deepseek_v3": ["q_a_proj", "kv_b_proj", "o_proj"],
}


def with_adapters(
    family: str, words: list[str] | str, use_dora: bool = False
) -> tuple[Transformer, dict[str, torch.Tensor]]:
    keys = {"model": BASE | FAMILIES[family][0] | {"model_type": family}}
    lora = {"r": 3, "alpha": 5, "target_modules": words, "init": "random", "use_dora": use_dora}
    config = load_mapping(keys | {"lora": lora}, notice=lambda text: None)
    with torch.device("meta"):
        model = Transformer(config.model)
        model.add_adapters(config.lora)
    model.initialize(3)
    return model.eval(), {name: p for name, p in model.named_parameters() if p.requires_grad}


def written(folder: Path, model: Transformer, adapters: dict[str, torch.Tensor]) -> Path:
    assert model.lora is not None
    folder.mkdir(exist_ok=True)
    values = {name: p.detach() for name, p in adapters.items()}
    for module, place in (name.rsplit(".", 1) for name in values if name.endswith(".magnitude")):
        weight = model.get_parameter(f"{module.removesuffix('.lora')}.weight")
        values[f"{module}.{place}"] = values[f"{module}.{place}"] + weight.detach().norm(dim=1)
    write_adapter(folder, model.config, model.lora, values, None)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "use_dora"),
    [
        pytest.param(name, use_dora, marks=[pytest.mark.slow] * (name in ("deepseek_v3", "qwen2_moe")))
        for use_dora, cases in ((False, CASES), (True, DORA))
        for name in cases
    ],
)
def test_peft_computes_the_same(family: str, use_dora: bool, tmp_path: Path) -> None:
    """Logits to 1e-5, gradients of A, B and magnitudes too. Seen to fail with the expert index of B running slowest,
    with A stored rank-major, and with gradients that go through the lengths of rows."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
    from transformers import AutoConfig, AutoModelForCausalLM

    model, adapters = with_adapters(family, DORA[family] if use_dora else CASES[family], use_dora)
    assert model.lora is not None
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**huggingface_config(model.config)), experts_implementation="eager"
    )
    model.load_state_dict(from_huggingface(theirs.state_dict(), model.config), strict=False)
    for name in adapters:
        if name.endswith(".magnitude"):
            torch.nn.init.uniform_(adapters[name], -0.1, 0.1)
    folder = written(tmp_path / "adapter", model, adapters)
    wrapped = peft.PeftModel.from_pretrained(theirs, str(folder), is_trainable=True).eval()
    ids = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    found, wanted = model(ids), wrapped(input_ids=ids).logits
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    (found * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    for target in peft_targets(model.config, model.lora):
        pair = (adapters[f"{target.ours.module}.{key}"].grad for key in "AB")
        for key, one in zip("AB", target.to_theirs(*pair), strict=True):  # type: ignore[arg-type]
            other = gradients.pop(f"{target.prefix}.lora_{key}.default.weight")
            assert (one - other).norm() <= 1e-5 * other.norm(), target
        if use_dora:
            one = adapters[f"{target.ours.module}.magnitude"].grad
            other = gradients.pop(f"{target.prefix}.lora_magnitude_vector.default.weight")
            assert (one - other).norm() <= 1e-5 * other.norm(), target
    assert not gradients


@pytest.mark.parametrize("family", CASES)
def test_what_is_written_is_read_bit_for_bit(family: str, tmp_path: Path) -> None:
    model, adapters = with_adapters(family, CASES[family])
    assert model.lora is not None
    again = read_adapter(written(tmp_path / "adapter", model, adapters), model.config, model.lora)
    assert again.keys() == adapters.keys()
    assert all(torch.equal(again[name], value) for name, value in adapters.items())


def test_experts_have_the_layout_of_target_parameters(tmp_path: Path) -> None:
    """A (E * r, in) by expert, B (out, r * E) with the expert fastest: by the formula, element by element."""
    model, adapters = with_adapters("mixtral", ["experts"])
    from safetensors.torch import load_file

    found = load_file(written(tmp_path / "adapter", model, adapters) / WEIGHTS)
    at = "base_model.model.model.layers.1.mlp.experts"
    a, b = (found[f"{at}.base_layer.lora_{key}.weight"] for key in "AB")
    ours = {key: adapters[f"layers.1.moe.experts.lora_gate_up.{key}"] for key in "AB"}
    assert (a.shape, b.shape) == ((18, 16), (24, 18))
    for e, r in ((0, 2), (4, 1)):
        assert torch.equal(a[e * 3 + r], ours["A"][e, :, r])
        assert torch.equal(b[:, r * 6 + e], ours["B"][e, r])
    assert found[f"{at}.lora_B.weight"].shape == (16, 18)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert config["target_modules"] == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("r", 8, "r is 8 there, lora.r is 3"),
        ("lora_alpha", 16, "lora_alpha is 16 there"),
        ("use_rslora", True, "use_rslora is True there"),
        ("target_modules", ["k_proj"], "target_modules is"),
        ("use_dora", True, "use_dora is True there, lora.use_dora is False"),
        ("bias", "all", "bias=all is not offered"),
        ("modules_to_save", ["lm_head"], "modules_to_save="),
        ("rank_pattern", {"q_proj": 4}, "rank_pattern="),
    ],
)
def test_another_adapter_than_the_run_says_is_named(key: str, value: object, said: str, tmp_path: Path) -> None:
    model, adapters = with_adapters("mixtral", ["q_proj"])
    assert model.lora is not None
    folder = written(tmp_path / "adapter", model, adapters)
    config = json.loads((folder / CONFIG).read_text()) | {key: value}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        read_adapter(folder, model.config, model.lora)
    assert said in str(caught.value)


def test_magnitudes_that_peft_has_no_place_for_are_named() -> None:
    model, _ = with_adapters("deepseek_v3", ["gate_proj"], use_dora=True)
    assert model.lora is not None
    with pytest.raises(
        ConfigError, match=r"layers\.0\.mlp\.gate_proj\.weight .* have no magnitudes; merge the adapters"
    ):
        peft_targets(model.config, model.lora)


def test_a_damaged_adapter_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, adapters = with_adapters("mixtral", ["q_proj"])
    assert model.lora is not None
    folder = written(tmp_path / "adapter", model, adapters)
    weights = load_file(folder / WEIGHTS)
    first = next(iter(weights))
    for change, said in (
        ({first: None}, "missing"),
        ({first: weights[first][:, :2].contiguous()}, "should be"),
        ({first: weights[first] * float("nan")}, "not finite"),
        ({"more.lora_A.weight": torch.ones(1)}, "not of this adapter"),
    ):
        save_file({name: value for name, value in (weights | change).items() if value is not None}, folder / WEIGHTS)
        with pytest.raises(ConfigError, match=said):
            read_adapter(folder, model.config, model.lora)
    (folder / WEIGHTS).write_bytes(b"no such file")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_adapter(folder, model.config, model.lora)
