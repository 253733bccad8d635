"""The model: initial weights, recomputation, evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from patches import Replace
from torch import Tensor, nn

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.auxiliary import LoadFacts
from moe_dist.models.context import RoutingContext
from moe_dist.models.experts import Expert, register_expert
from moe_dist.models.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_experts=6,
    mlp_only_layers=[1],
    shared_expert_intermediate_size=4,
)


def build(config: ModelConfig = CONFIG, balance: BalanceConfig | None = None, seed: int = 0) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config, balance)
    model.initialize(seed)
    for layer in model.moe_layers():
        layer.balance.facts = LoadFacts.zeros(config.num_experts, torch.device("cpu"), num_domains=2)
    return model


def test_initial_weights_come_from_names_and_seed() -> None:
    """Trap 24. Planted: one generator for all parameters; the seed left out of the digest."""
    whole, again, other = build(), build(), build(seed=1)
    other_state = other.state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        if tensor.numel() > 1 and "norm" not in name and "bias_E" not in name:
            assert not torch.equal(tensor, other_state[name])
            assert tensor.std().item() == pytest.approx(0.02, rel=0.3)
    # A model that holds only some layers (a pipeline stage) starts with the same ones.
    stage = Transformer(CONFIG)
    del stage.layers["0"]
    stage.initialize(0)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in stage.state_dict().items())


def test_all_experts_start_different_and_shards_equal_the_whole() -> None:
    """Trap 24. Planted: the layer's name left out of the seed; local index instead of global id."""
    whole = build()
    weights = [expert for layer in whole.moe_layers() for expert in layer.experts.w_gate_up]
    assert len({weight.detach().numpy().tobytes() for weight in weights}) == 2 * 6
    part = Transformer(CONFIG)
    for layer in part.moe_layers():
        layer.experts.shard(2, 3)
    part.initialize(0)
    for ours, theirs in zip(part.moe_layers(), whole.moe_layers(), strict=True):
        assert torch.equal(ours.experts.w_gate_up, theirs.experts.w_gate_up[2:5])
        assert torch.equal(ours.experts.w_down, theirs.experts.w_down[2:5])


def test_tied_head_stays_tied_from_meta() -> None:
    model = build(CONFIG.model_copy(update={"tie_word_embeddings": True}))
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_expert_parameter_names() -> None:
    names = build().expert_parameter_names()
    assert names == {f"layers.{i}.moe.experts.{w}" for i in (0, 2) for w in ("w_gate_up", "w_down")}


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))


def test_unknown_parameters_are_named() -> None:
    model = Transformer(CONFIG)
    model.layers["1"].extra = Own()
    with pytest.raises(ValueError, match=r"layers.1.extra \(Own\).*reset_parameters"):
        model.initialize(0)


class Noisy(Expert):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x_RD: Tensor) -> Tensor:
        return self.dropout(self.inner(x_RD))


register_expert("noisy_in_tests")(Noisy)


def step(model: Transformer, ids: Tensor) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Gradients, facts, and the expert ids of every routing decision in forward and backward, by layer."""
    chosen: list[list[Tensor]] = [[] for _ in model.moe_layers()]
    for seen, layer in zip(chosen, model.moe_layers(), strict=True):
        layer.router.register_forward_hook(
            lambda _, __, routing, seen=seen: seen.append(routing.expert_ids_TK.detach().clone())
        )
        if layer.balance.facts is not None:
            layer.balance.facts.zero_()
    torch.manual_seed(3)
    model.zero_grad()
    loss = nn.functional.cross_entropy(
        model(ids, context=RoutingContext(token_scale=1 / ids.numel())).flatten(0, 1), ids.flatten()
    )
    loss.backward()
    facts = [t.clone() for layer in model.moe_layers() for t in vars(layer.balance.facts).values()]
    return [p.grad for p in model.parameters()], facts, chosen


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("expert", ["swiglu", "swiglu_loop", "noisy_in_tests"])
@pytest.mark.parametrize("ties", [False, True])
def test_recomputation_changes_nothing(mode: str, expert: str, ties: bool) -> None:
    """Traps 19 and 22. Planted: `recomputing()` left out of `_again` (facts counted twice)."""
    balance = BalanceConfig(router_jitter=0.1, expert_dropout=0.2, capacity_factor=1.2, router_z_loss_coef=0.01)
    model = build(CONFIG.model_copy(update={"expert": expert}), balance)
    if ties:
        for layer in model.moe_layers():
            nn.init.zeros_(layer.router.weight)
    ids = torch.randint(0, 40, (3, 16), generator=torch.Generator().manual_seed(0))
    plain = step(model, ids)
    model.gradient_checkpointing_enable(mode)
    again = step(model, ids)
    for ours, theirs in zip(again[0], plain[0], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(plain[1], again[1], strict=True))
    assert all(len(seen) == (2 if mode == "full" else 1) for seen in again[2])
    assert all(torch.equal(ids, seen[0]) for seen in again[2] for ids in seen)


def test_recomputed_routing_keeps_the_first_decision(replace: Replace) -> None:
    """Trap 22. Planted: top-k left out of `_DECISIONS`. The recomputation sees logits that order ties differently."""
    model = build()
    model.gradient_checkpointing_enable("full")
    calls = 0
    layer = next(model.moe_layers())
    original = layer.router.logits

    def unstable(x_TD: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        nudge = torch.linspace(0, 1e-3, 6) * (1 if calls == 1 else -1)
        return 0.0 * original(x_TD) + nudge

    replace(layer.router, "logits", unstable)
    _, _, chosen = step(model, torch.randint(0, 40, (2, 8)))
    assert calls == 2
    assert torch.equal(chosen[0][0], chosen[0][1])
    assert chosen[0][0].tolist() == [[5, 4]] * 16


def test_recomputation_is_off_without_gradients_and_can_be_switched_off() -> None:
    model = build()
    model.gradient_checkpointing_enable()
    assert {block.recompute for block in model.blocks()} == {"full"}
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64))
    model.gradient_checkpointing_enable("none")
    assert all(len(seen) == 1 for seen in step(model, torch.zeros(1, 4, dtype=torch.int64))[2])


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_all_parameters_get_gradients_in_bfloat16_modes(mode: str) -> None:
    ids = torch.randint(0, 40, (2, 16))
    for autocast in (True, False):
        model = build() if autocast else build().bfloat16()
        model.gradient_checkpointing_enable(mode)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(ids).float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert all(p.grad.dtype == p.dtype for p in model.parameters())


def test_evaluation_leaves_facts_bias_and_weights_alone() -> None:
    """Trap 29."""
    model = build(balance=BalanceConfig(bias_update_rate=0.1))
    step(model, torch.randint(0, 40, (2, 8)))

    def everything() -> list[Any]:
        facts = [t.clone() for layer in model.moe_layers() for t in vars(layer.balance.facts).values()]
        return [*(t.clone() for t in model.state_dict().values()), *facts, torch.get_rng_state()]

    before = everything()
    model.eval()
    with torch.no_grad():
        model(torch.zeros(2, 8, dtype=torch.int64))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
