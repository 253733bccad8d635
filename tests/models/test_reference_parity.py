"""Logits, loss and every gradient against Hugging Face's Qwen3-MoE and Mixtral; DeepSeek-V3's and OLMoE's routing.

One file, because importing `transformers` models takes seconds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.huggingface import from_huggingface, huggingface_config, to_huggingface
from moe_dist.models.routing import TopKRouter
from moe_dist.models.transformer import Transformer

transformers = pytest.importorskip("transformers")

QWEN = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=6,
    num_experts_per_tok=2,
    rope_theta=1e6,
)
MIXTRAL = QWEN.model_copy(update={"qk_norm": False, "rms_norm_eps": 1e-5})
VARIANTS = {
    "qwen": (QWEN, {}),
    "qwen-not-renormalised": (QWEN, {"norm_topk_prob": False}),
    "qwen-top-1": (QWEN, {"norm_topk_prob": False, "num_experts_per_tok": 1}),
    "qwen-grouped-queries": (QWEN, {"num_key_value_heads": 2, "head_dim": 12}),
    "qwen-dense-layers": (QWEN, {"num_hidden_layers": 4, "mlp_only_layers": [3], "decoder_sparse_step": 2}),
    "qwen-attention-bias": (QWEN, {"attention_bias": True}),
    "qwen-tied": (QWEN, {"tie_word_embeddings": True}),
    "qwen-eager-loop": (QWEN, {"attn_implementation": "eager", "expert": "swiglu_loop"}),
    "mixtral": (MIXTRAL, {}),
    "mixtral-grouped-queries": (MIXTRAL, {"num_key_value_heads": 1, "num_experts_per_tok": 3}),
    "mixtral-tied": (MIXTRAL, {"tie_word_embeddings": True, "initializer_range": 0.1}),
}


def build(config: ModelConfig) -> Any:
    """Hugging Face's model of this configuration, with random weights, biases and norms."""
    values = huggingface_config(config)
    kind = {"qwen3_moe": transformers.Qwen3MoeConfig, "mixtral": transformers.MixtralConfig}[values["model_type"]]
    reference = getattr(transformers, values["architectures"][0])(kind(**values, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name))
    return reference.float()


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[ModelConfig, Transformer, Any]:
    base, changes = VARIANTS[request.param]
    config = ModelConfig.model_validate(base.model_dump() | changes)
    reference = build(config)
    model = Transformer(config, BalanceConfig(router_aux_loss_coef=0.0))
    model.load_state_dict(from_huggingface(reference.state_dict(), config))
    return config, model, reference


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def test_logits_loss_and_all_gradients(pair: tuple[ModelConfig, Transformer, Any]) -> None:
    """Trap 16. Planted: softmax over the K chosen when norm_topk_prob=false; gate and up exchanged."""
    config, model, reference = pair
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, config.vocab_size, (3, 19), generator=generator)
    model.zero_grad()
    reference.zero_grad()
    theirs = reference(ids, labels=ids)
    theirs.loss.backward()
    logits = model(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert relative_error(logits, theirs.logits) < 1e-5
    assert abs(loss - theirs.loss) < 1e-5 * theirs.loss
    gradients = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}
    assert all(gradient is not None for gradient in gradients.values())
    expected = {name: p.grad for name, p in reference.named_parameters()}
    ours = to_huggingface(gradients, config, fused=True)
    assert set(ours) == set(expected)
    errors = {name: relative_error(ours[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-5, {name: error for name, error in errors.items() if error >= 1e-5}


def test_round_trip_in_both_layouts(pair: tuple[ModelConfig, Transformer, Any]) -> None:
    config, model, reference = pair
    state = model.state_dict()
    for fused in (True, False):
        theirs = to_huggingface(model, config, fused=fused)
        back = from_huggingface(theirs, config)
        assert set(back) == set(state)
        assert all(torch.equal(back[name], state[name]) for name in state)
    expected = {name for name in reference.state_dict() if name != "lm_head.weight" or not config.tie_word_embeddings}
    assert set(to_huggingface(model, config, fused=True)) == expected


@pytest.mark.parametrize("base", [QWEN, MIXTRAL], ids=["qwen", "mixtral"])
def test_public_names_are_those_of_save_pretrained(base: ModelConfig, tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    reference = build(base)
    reference.save_pretrained(tmp_path)
    written = safetensors.load_file(tmp_path / "model.safetensors")
    ours = to_huggingface(from_huggingface(reference.state_dict(), base), base)
    assert set(ours) == set(written)
    assert all(torch.equal(ours[name], written[name]) for name in written)
    assert all(tensor.is_contiguous() for tensor in ours.values())


def test_deepseek_v3_routing() -> None:
    """Trap 16: sigmoid, group-limited top-k, selection bias, renormalisation and scale.

    Planted: the bias added to the weights; the scale applied before renormalising; the bias left out of the
    groups.
    """
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter

    torch.manual_seed(0)
    for norm_topk_prob in (True, False):
        sizes = {
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "hidden_size": 24,
        }
        theirs = DeepseekV3TopkRouter(
            DeepseekV3Config(**sizes, norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.5)
        )
        theirs.weight.data.normal_()
        theirs.e_score_correction_bias.normal_(0, 0.3)
        rule = TopKRouter(
            16,
            4,
            scoring_func="sigmoid",
            norm_topk_prob=norm_topk_prob,
            n_group=4,
            topk_group=2,
            scaling_factor=2.5,
        )
        x = torch.randn(500, 24)
        logits, weights, indices = theirs(x)
        ours = rule(logits, theirs.e_score_correction_bias)
        assert torch.equal(ours.indices.sort(-1).values, indices.sort(-1).values)
        by_id = ours.weights.gather(-1, ours.indices.argsort(-1))
        torch.testing.assert_close(by_id, weights.gather(-1, indices.argsort(-1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_olmoe_routing(norm_topk_prob: bool) -> None:
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeTopKRouter

    torch.manual_seed(0)
    theirs = OlmoeTopKRouter(
        OlmoeConfig(num_experts=16, num_experts_per_tok=4, hidden_size=24, norm_topk_prob=norm_topk_prob)
    )
    theirs.weight.data.normal_()
    logits, weights, indices = theirs(torch.randn(500, 24))
    ours = TopKRouter(16, 4, norm_topk_prob=norm_topk_prob)(logits)
    assert torch.equal(ours.indices, indices)
    torch.testing.assert_close(ours.weights, weights, rtol=1e-5, atol=1e-6)


def test_public_mixtral_names() -> None:
    names = set(to_huggingface(Transformer(MIXTRAL), MIXTRAL))
    assert "model.layers.1.block_sparse_moe.experts.5.w2.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names


def test_wrong_states_are_named_in_one_error() -> None:
    state = to_huggingface(Transformer(QWEN), QWEN)
    del state["model.layers.1.mlp.experts.3.up_proj.weight"]
    state["model.layers.0.mlp.gate.weight"] = state["model.layers.0.mlp.gate.weight"][:5]
    state["model.layers.7.mlp.gate.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as caught:
        from_huggingface(state, QWEN)
    for part in (
        "1 missing: model.layers.1.mlp.experts.3.up_proj.weight",
        "1 unexpected: model.layers.7.mlp.gate.weight",
        "1 ill-shaped: model.layers.0.mlp.gate.weight (5, 32) instead of (6, 32)",
    ):
        assert part in str(caught.value)


def test_what_hugging_face_cannot_express_is_refused() -> None:
    wrong = ModelConfig.model_validate(QWEN.model_dump() | {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5})
    said = (
        r"nearest, qwen3_moe, has scoring_func='softmax' instead of 'sigmoid', routed_scaling_factor=1.0 instead of 2.5"
    )
    with pytest.raises(ValueError, match=said):
        huggingface_config(wrong)
    model = Transformer(QWEN)
    next(model.moe_layers()).router.bias_E[2] = 0.1
    with pytest.raises(ValueError, match=r"layers.0.moe.router.bias_E: not zero"):
        to_huggingface(model, QWEN)


def test_old_rotary_buffers_are_ignored_and_a_different_head_is_not_tied() -> None:
    tied = QWEN.model_copy(update={"tie_word_embeddings": True})
    state = to_huggingface(Transformer(tied), tied)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    assert "lm_head.weight" in from_huggingface(state, tied)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        from_huggingface(state | {"lm_head.weight": torch.randn(61, 32)}, tied)
