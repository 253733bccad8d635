"""The whole layer: padding, capacity, dropout, shared expert, determinism."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.auxiliary import LoadFacts
from moe_dist.models.context import RoutingContext
from moe_dist.models.moe import MoE
from moe_dist.models.swiglu import swiglu

CONFIG = ModelConfig(
    hidden_size=16, num_attention_heads=2, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2
)


def build(balance: BalanceConfig | None = None, **changes: object) -> MoE:
    torch.manual_seed(0)
    layer = MoE(ModelConfig.model_validate(CONFIG.model_dump() | changes), balance or BalanceConfig(), 3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.balance.facts = LoadFacts.zeros(layer.num_experts, torch.device("cpu"), num_domains=2)
    return layer


def one_token_at_a_time(layer: MoE, x_TD: Tensor) -> Tensor:
    """The layer's definition, without any batching."""
    routing = layer.router(x_TD)
    out = []
    for token, ids, weights in zip(x_TD, routing.expert_ids_TK, routing.weights_TK, strict=True):
        rows = [swiglu(token @ layer.experts.w_gate_up[e]) @ layer.experts.w_down[e] for e in ids.tolist()]
        row = sum(weight * row for weight, row in zip(weights, rows, strict=True))
        out.append(row if layer.shared_expert is None else row + layer.shared_expert(token))
    return torch.stack(out)


@pytest.mark.parametrize("shared", [0, 12])
@pytest.mark.parametrize("experts", ["swiglu", "swiglu_loop"])
def test_equals_its_definition(shared: int, experts: str) -> None:
    layer = build(BalanceConfig(use_auxiliary_loss=False), shared_expert_intermediate_size=shared, expert=experts)
    x = torch.randn(2, 7, 16, requires_grad=True)
    upstream = torch.randn(2, 7, 16)
    ours, theirs = layer(x), one_token_at_a_time(layer, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(ours, theirs)
    wanted = (x, *layer.parameters())
    for a, b in zip(
        torch.autograd.grad(ours, wanted, upstream),
        torch.autograd.grad(theirs, wanted, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("capacity_factor", [None, 0.6])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
def test_padding_changes_nothing(capacity_factor: float | None, scope: str) -> None:
    """Trap 21. Planted: capacity from all tokens; padding ids not replaced before `drop_over_capacity`; the
    mask not passed to the losses."""
    balance = BalanceConfig(
        capacity_factor=capacity_factor, router_aux_loss_coef=1.0, router_z_loss_coef=0.1, aux_loss_scope=scope
    )
    x = torch.randn(2, 6, 16)
    padding = torch.randn(2, 5, 16) * 3
    layer = build(balance)
    out = layer(x, RoutingContext(torch.ones(2, 6, dtype=torch.bool), 1 / 12))
    out.square().sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    facts = layer.balance.facts

    # Padding first, so that it would take the places of real tokens.
    padded = build(balance)
    mask = torch.cat((torch.zeros(2, 5), torch.ones(2, 6)), 1).bool()
    x_padded = torch.cat((padding, x), 1).requires_grad_()
    out_padded = padded(x_padded, RoutingContext(mask, 1 / 12))
    torch.testing.assert_close(out_padded[:, 5:], out)
    assert out_padded[:, :5].count_nonzero() == 0
    out_padded[:, 5:].square().sum().backward()
    for ours, theirs in zip(padded.parameters(), gradients, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=1e-6)
    assert x_padded.grad is not None
    assert x_padded.grad[:, :5].count_nonzero() == 0
    assert facts is not None
    assert padded.balance.facts is not None
    for name in ("pairs_E", "dropped_E", "tokens", "sums"):
        torch.testing.assert_close(getattr(padded.balance.facts, name), getattr(facts, name), rtol=1e-6, atol=1e-6)


def test_capacity_drops_late_pairs_and_counts_what_was_wanted() -> None:
    """Trap 19 (facts before dropping). Planted: `_route` counting the load after `drop_over_capacity`."""
    layer = build(BalanceConfig(capacity_factor=1.0))
    with torch.no_grad():
        layer.router.weight.zero_()
    x = torch.randn(1, 8, 16)
    ids = layer.router(x[0]).expert_ids_TK[0]
    out = layer(x)
    facts = layer.balance.facts
    assert facts is not None
    assert facts.pairs_E[ids].tolist() == [8, 8]
    assert int(facts.dropped_E.sum()) == 16 - 2 * 4  # places: 1.0 x 8 tokens x 2 of 4 experts = 4 each
    assert (out[0, :4].abs().sum(-1) > 0).all()
    assert out[0, 4:].count_nonzero() == 0
    layer.eval()
    assert (layer(x).abs().sum(-1) > 0).all()


def test_places_are_those_of_the_written_factor() -> None:
    """Trap 37. Seen to fail with `ceil` of a float32 product: 901 places for 1.2 * 2 * 3000 / 8, and in one size of a
    hundred. With and without padding."""
    for top_k, num_experts in ((1, 4), (2, 8), (3, 7), (8, 160)):
        for factor in ("0.5", "1", "1.1", "1.2", "1.25", "1.3", "2.05", "0.3333333333333333"):
            balance = BalanceConfig(capacity_factor=float(factor))
            with torch.device("meta"):
                config = {"num_experts": num_experts, "num_experts_per_tok": top_k, "norm_topk_prob": False}
                layer = MoE(ModelConfig.model_validate(CONFIG.model_dump() | config), balance, 0)
            share = Fraction(1, 3) if factor.startswith("0.3") else Fraction(factor)
            for num_tokens in (*range(0, 5000, 125), 16_777_217, 50_000_000):
                wanted = max(1, math.ceil(share * top_k * num_tokens / num_experts))
                ids = torch.empty((), dtype=torch.int64).expand(num_tokens, top_k)
                assert int(layer._capacity(ids, None)) == wanted, (factor, top_k, num_experts, num_tokens)
                if num_tokens < 1000:
                    valid = torch.arange(num_tokens + 7) < num_tokens
                    assert int(layer._capacity(ids, valid)) == wanted


@pytest.mark.parametrize("capacity_factor", [0.25, 1.0])
def test_capacity_leaves_auxiliary_losses_alone(capacity_factor: float) -> None:
    """They see what the router wanted: alone, they give the router the same gradient with and without drops.

    Planted: no auxiliary loss where a capacity is set; losses of those pairs only that found a place.
    """
    balance = {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.1}
    x = torch.randn(2, 16, 16)

    def gradient(**more: float) -> Tensor:
        layer = build(BalanceConfig.model_validate(balance | more))
        (0.0 * layer(x).sum()).backward()
        return layer.router.weight.grad

    wanted = gradient()
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(gradient(capacity_factor=capacity_factor), wanted, rtol=0, atol=0)


def test_all_tokens_on_one_expert_gives_every_parameter_a_gradient() -> None:
    """Trap 4."""
    layer = build(norm_topk_prob=False, num_experts_per_tok=1)
    with torch.no_grad():
        layer.router.weight.zero_()[2] = 1.0
    x = torch.rand(2, 8, 16)
    layer(x).sum().backward()
    assert layer.balance.facts is not None
    assert layer.balance.facts.pairs_E.tolist() == [0, 0, 16, 0]
    assert layer.experts.w_gate_up.grad[[0, 1, 3]].count_nonzero() == 0
    assert layer.experts.w_gate_up.grad[2].count_nonzero() > 0


def test_no_valid_token_at_all() -> None:
    """Trap 5 within a rank: the graph stays whole."""
    layer = build(BalanceConfig(router_z_loss_coef=0.1, capacity_factor=1.0))
    x = torch.randn(2, 4, 16, requires_grad=True)
    out = layer(x, RoutingContext(torch.zeros(2, 4, dtype=torch.bool)))
    out.sum().backward()
    assert out.count_nonzero() == 0
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in layer.parameters())


def test_expert_dropout_drops_contributions_in_training_only() -> None:
    layer = build(BalanceConfig(expert_dropout=0.5))
    x = torch.randn(4, 64, 16)
    dropped = layer(x)
    share = (dropped.abs().sum(-1) == 0).float().mean()
    assert 0.15 < share < 0.35  # both of two experts: 0.25
    layer.eval()
    torch.testing.assert_close(layer(x), build().eval()(x))


def test_two_runs_are_bitwise_equal() -> None:
    """Trap 28. Planted: as in test_permute.py, an `index_add_` in random order."""
    results = []
    for _ in range(2):
        layer = build(num_experts=8, num_experts_per_tok=4)  # two summands would commute
        torch.seed()
        x = torch.randn(4, 40, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_layer_is_near_float32() -> None:
    layer = build()
    x = torch.randn(2, 32, 16)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    assert (mixed.float() - exact).norm() < 1e-2 * exact.norm()


def test_evaluation_leaves_no_trace() -> None:
    """Traps 19 and 29. Planted: `if self.training` removed in `MoE._route`; jitter without the training check."""
    layer = build(BalanceConfig(bias_update_rate=0.1, router_jitter=0.1, expert_dropout=0.1, capacity_factor=0.5))
    layer(torch.randn(2, 8, 16))
    facts = layer.balance.facts
    assert facts is not None
    state = [t.clone() for t in (*layer.state_dict().values(), *vars(facts).values(), torch.get_rng_state())]
    layer.eval()
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer(x)
    layer(x)
    after = [*layer.state_dict().values(), *vars(facts).values(), torch.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
