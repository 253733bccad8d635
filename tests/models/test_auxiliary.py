"""Auxiliary losses and load facts against plain loops in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.auxiliary import (
    ROUTER_SUMS,
    LoadBalance,
    LoadFacts,
    count_load,
    inject_loss,
    load_balancing_loss,
    z_loss,
)
from moe_dist.models.context import RoutingContext
from moe_dist.models.moe import MoE
from moe_dist.models.recompute import recomputing
from moe_dist.models.router import Router
from moe_dist.models.routing import Routing, TopKRouter
from moe_dist.models.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    moe_intermediate_size=8,
    num_experts=4,
    num_experts_per_tok=2,
)


def losses_by_loop(
    logits: Tensor, ids: Tensor, valid: Tensor, groups: list[list[int]], top_k: int, sigmoid: bool
) -> tuple[Tensor, Tensor]:
    """Sum over groups of n * E * sum_e f_e * P_e, and the sum of squared log-sum-exps; one token at a time."""
    num_experts = logits.shape[1]
    balance = squares = torch.zeros((), dtype=torch.float64)
    for tokens in groups:
        tokens = [token for token in tokens if valid[token]]
        pairs, mass = [0] * num_experts, torch.zeros(num_experts, dtype=torch.float64)
        for token in tokens:
            scores = logits[token].sigmoid() if sigmoid else logits[token].exp()
            mass = mass + scores / scores.sum()
            for expert in ids[token].tolist():
                pairs[expert] += 1
            squares = squares + logits[token].exp().sum().log() ** 2
        if tokens:
            share = torch.tensor(pairs, dtype=torch.float64) / (top_k * len(tokens))
            balance = balance + len(tokens) * num_experts * (share * mass / len(tokens)).sum()
    return balance, squares


@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_losses_and_gradients_against_a_loop(scope: Any, sigmoid: bool, padded: bool) -> None:
    """Traps 10 and 11 within a rank, 21. Planted: mean over groups instead of the token-weighted sum;
    division by T instead of the valid tokens of the group; padding tokens left in the scores, or in the
    squares of the logits."""
    torch.manual_seed(0)
    batch, length, num_experts, top_k = 3, 5, 6, 2
    logits = torch.randn(batch * length, num_experts, requires_grad=True)
    valid = torch.ones(batch, length, dtype=torch.bool)
    if padded:
        valid[0, 3:], valid[2, 1:] = False, False
    rule = TopKRouter(num_experts, top_k, scoring_func="sigmoid" if sigmoid else "softmax")
    ids, weights = rule(logits)
    chosen = ids.masked_fill(~valid.flatten()[:, None], num_experts)
    scores = rule.log_scores(logits).softmax(-1)
    config = BalanceConfig(router_aux_loss_coef=0.3, router_z_loss_coef=0.07, aux_loss_scope=scope)
    balance = LoadBalance(config, num_experts, top_k)
    balance.facts = LoadFacts.zeros(num_experts, torch.device("cpu"))
    routing = Routing(weights, chosen, scores, logits)
    ours = balance.losses(routing, batch, RoutingContext(valid if padded else None, 1 / 13))
    assert ours is not None
    assert ours.dtype == torch.float32

    exact = logits.detach().double().requires_grad_()
    rows = [list(range(b * length, (b + 1) * length)) for b in range(batch)]
    groups = rows if scope == "sequence" else [[token for row in rows for token in row]]
    aux, z = losses_by_loop(exact, ids, valid.flatten(), groups, top_k, sigmoid)
    expected = (0.3 * aux + 0.07 * z) / 13
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(ours, logits)
    (exact_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-7)

    facts = balance.facts
    assert facts.tokens == valid.sum()
    assert torch.equal(facts.pairs_E, count_load(chosen, num_experts, 1)[0])
    sums = dict(zip(ROUTER_SUMS, facts.sums, strict=True))
    torch.testing.assert_close(sums["aux_loss"], aux.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums["z_loss"], z.detach(), rtol=1e-5, atol=1e-6)
    shares = scores.detach().double()[valid.flatten()]
    torch.testing.assert_close(sums["router_entropy"], -(shares * shares.log()).sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums["router_confidence"], shares.max(1).values.sum(), rtol=1e-5, atol=1e-5)
    squares = logits.detach().double()[valid.flatten()].square().mean(1).sum()
    torch.testing.assert_close(sums["router_logits_mean_square"], squares, rtol=1e-5, atol=1e-5)


def test_balanced_is_one_and_collapsed_is_experts_over_k() -> None:
    """Planted: division by top_k left out (Hugging Face's scale)."""
    num_tokens, num_experts, top_k = 64, 8, 2
    tokens = torch.tensor([num_tokens])
    even = torch.arange(num_tokens * top_k).view(num_tokens, top_k) % num_experts
    scores = torch.full((num_tokens, num_experts), 1 / num_experts)
    value = load_balancing_loss(scores, count_load(even, num_experts, 1), tokens, top_k) / num_tokens
    torch.testing.assert_close(value, torch.tensor(1.0))
    collapsed = torch.zeros(num_tokens, top_k, dtype=torch.int64)
    collapsed[:, 1] = 1
    scores = torch.zeros(num_tokens, num_experts)
    scores[:, :2] = 0.5
    value = load_balancing_loss(scores, count_load(collapsed, num_experts, 1), tokens, top_k) / num_tokens
    torch.testing.assert_close(value, torch.tensor(num_experts / top_k))


def test_every_collapsed_layer_is_seen() -> None:
    """Eight layers, each on its own pair of experts: pooled over layers they would look balanced (1.0)."""
    model = Transformer(
        CONFIG.model_copy(update={"num_hidden_layers": 8, "num_experts": 16}),
        BalanceConfig(bias_update_rate=1e-3),
    )
    model.initialize(0)
    for layer in model.moe_layers():
        layer.balance.facts = LoadFacts.zeros(16, torch.device("cpu"))
        with torch.no_grad():
            layer.router.weight.zero_()
            layer.router.bias_E[2 * layer.layer : 2 * layer.layer + 2] = 1.0
        layer.router.register_forward_hook(skew)
    model(torch.randint(0, 40, (4, 8)))
    aux = [*ROUTER_SUMS].index("aux_loss")
    values = [float(layer.balance.facts.sums[aux] / layer.balance.facts.tokens) for layer in model.moe_layers()]
    assert values == pytest.approx([8.0] * 8, rel=1e-3)
    pooled = sum(layer.balance.facts.pairs_E for layer in model.moe_layers())
    assert pooled.unique().numel() == 1


def skew(_: Any, __: Any, routing: Routing) -> Routing:
    """All the score mass on the chosen experts, as a collapsed router gives."""
    scores = torch.zeros_like(routing.scores_TE).scatter(1, routing.expert_ids_TK, 0.5)
    return Routing(routing.weights_TK, routing.expert_ids_TK, scores, routing.logits_TE)


def test_global_scope_uses_the_given_load_and_leaves_local_counts_alone() -> None:
    """Trap 13. Planted: `reduce_load` called with the counts themselves instead of a packed copy."""
    torch.manual_seed(0)
    config = BalanceConfig(aux_loss_scope="global_batch")
    balance = LoadBalance(config, 4, 2, layer=7)
    balance.facts = LoadFacts.zeros(4, torch.device("cpu"))
    logits = torch.randn(10, 4)
    ids, weights = TopKRouter(4, 2)(logits)
    routing = Routing(weights, ids, logits.softmax(-1), logits)
    other = torch.tensor([7, 0, 1, 12, 10])

    def reduce(layer: int, counts: Tensor) -> Tensor:
        assert layer == 7
        return counts.add_(other)

    ours = balance.losses(routing, 2, RoutingContext(token_scale=1 / 20, reduce_load=reduce))
    local = count_load(ids, 4, 1)
    assert torch.equal(balance.facts.pairs_E, local[0])
    assert balance.facts.tokens == 10
    share = (local[0] + other[:4]) / (2 * 20)
    torch.testing.assert_close(ours, 0.01 * 4 * (share * logits.softmax(-1).sum(0)).sum() / 20)
    known = RoutingContext(
        token_scale=1 / 20,
        global_load={7: (local + other[:4], torch.tensor([20]))},
        reduce_load=lambda layer, counts: pytest.fail("the load is known already"),
    )
    torch.testing.assert_close(balance.losses(routing, 2, known), ours)


def test_sums_of_parts_are_the_whole() -> None:
    """Traps 10 and 11. Planted: the loss divided by its own token count instead of `token_scale`.

    With known global load, micro-batches of unequal length add up to one batch, gradients too.
    """
    torch.manual_seed(0)
    balance = LoadBalance(BalanceConfig(aux_loss_scope="global_batch", router_z_loss_coef=0.1), 6, 2)
    logits = torch.randn(24, 6, requires_grad=True)
    context = RoutingContext(token_scale=1 / 24)

    def loss(part: Tensor, context: RoutingContext = context) -> Tensor:
        ids, weights = TopKRouter(6, 2)(part)
        value = balance.losses(Routing(weights, ids, part.softmax(-1), part), 1, context)
        assert value is not None
        return value

    whole = loss(logits)
    ids, _ = TopKRouter(6, 2)(logits)
    known = replace(context, global_load={0: (count_load(ids, 6, 1), torch.tensor([24]))})
    parts = loss(logits[:5], known) + loss(logits[5:7], known) + loss(logits[7:], known)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, logits), torch.autograd.grad(whole, logits))


def test_sigmoid_scores_cannot_game_the_loss() -> None:
    """Trap 23. Planted: scores as `sigmoid / (sum + 1e-9)`: at logits of -60 the loss falls to 0."""
    for level in (0.0, -60.0, -110.0):
        router = Router(4, 8)
        router.rule = TopKRouter(8, 2, scoring_func="sigmoid")
        torch.nn.init.constant_(router.weight, level / 4)
        routing = router(torch.ones(32, 4))
        assert (routing.logits_TE == level).all()
        balance = LoadBalance(BalanceConfig(router_aux_loss_coef=1.0), 8, 2)
        value = balance.losses(routing, 1, RoutingContext(token_scale=1 / 32))
        assert value is not None
        assert value >= 1.0 - 1e-5
        assert torch.autograd.grad(value, router.weight)[0].isfinite().all()


def test_z_loss_is_stable_and_skips_padding() -> None:
    logits = torch.tensor([[1000.0, 1000.0], [0.0, 0.0], [float("nan"), 1.0]])
    valid = torch.tensor([True, True, False])
    expected = (1000 + math.log(2)) ** 2 + math.log(2) ** 2
    torch.testing.assert_close(z_loss(logits, valid), torch.tensor(expected))
    gradient = torch.autograd.grad(z_loss(logits.requires_grad_(), valid), logits)[0]
    assert gradient[:2].isfinite().all()


def test_counts_are_exact_int64() -> None:
    """Trap 18. Planted: counts in bfloat16 (and in float32 beyond 2**24)."""
    facts = LoadFacts.zeros(2, torch.device("cpu"))
    assert facts.pairs_E.dtype == facts.dropped_E.dtype == facts.tokens.dtype == torch.int64
    balance = LoadBalance(BalanceConfig(), 2, 1)
    balance.facts = facts
    facts.pairs_E += torch.tensor([2**24, 2**40])
    for size in (601, 663, 700):
        ids = torch.zeros(size, 1, dtype=torch.int64)
        ids[0] = 1
        balance.losses(Routing(torch.ones(size, 1), ids), 1, RoutingContext())
    assert facts.pairs_E.tolist() == [2**24 + 600 + 662 + 699, 2**40 + 3]
    assert count_load(torch.full((1, 40_001), 1), 2, 1).tolist() == [[0, 40_001]]


def test_injected_loss_gets_gradient_one_whatever_the_upstream() -> None:
    """Trap 12. Planted: the upstream gradient's scale handed to the loss."""
    x, w = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    out = inject_loss(x, w.square())
    assert torch.equal(out, x)
    (out * 1000).sum().backward()
    assert w.grad == 4.0
    assert torch.equal(x.grad, torch.full((3,), 1000.0))


def test_router_gradient_is_that_of_the_summed_loss() -> None:
    """Trap 12. Planted: `inject_loss` left out of `MoE.forward`."""
    torch.manual_seed(0)
    layer = MoE(CONFIG, BalanceConfig(router_aux_loss_coef=0.5, router_z_loss_coef=0.1), 0)
    layer.experts.initialize(lambda expert: expert, 0.1)
    x = torch.randn(2, 6, 16)
    (0.0 * layer(x, RoutingContext(token_scale=1 / 12))).sum().backward()
    injected = layer.router.weight.grad.clone()
    routing = layer.router(x.flatten(0, 1))
    value = layer.balance.losses(routing, 2, RoutingContext(token_scale=1 / 12))
    (expected,) = torch.autograd.grad(value, layer.router.weight)
    assert injected.norm() > 0
    torch.testing.assert_close(injected, expected)


def test_nothing_is_counted_twice_or_in_evaluation() -> None:
    """Traps 19 and 29. Planted: `is_recomputing()` ignored in `_record`; `if self.training` removed in `MoE._route`."""
    layer = MoE(CONFIG, BalanceConfig(capacity_factor=0.5), 0)
    layer.experts.initialize(lambda expert: expert, 0.1)
    facts = layer.balance.facts = LoadFacts.zeros(4, torch.device("cpu"))
    x = torch.randn(2, 6, 16)
    layer(x)
    assert (int(facts.tokens), int(facts.pairs_E.sum())) == (12, 24)
    dropped, sums = int(facts.dropped_E.sum()), facts.sums.clone()
    assert dropped > 0
    with recomputing():
        layer(x)
    layer.eval()
    layer(x)
    assert (int(facts.tokens), int(facts.pairs_E.sum()), int(facts.dropped_E.sum())) == (12, 24, dropped)
    assert torch.equal(facts.sums, sums)
    facts.zero_()
    assert not any(t.any() for t in (facts.pairs_E, facts.dropped_E, facts.tokens, facts.sums))
