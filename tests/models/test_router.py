"""The selection rule and routers of one's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.auxiliary import LoadFacts
from moe_dist.models.context import RoutingContext
from moe_dist.models.experts import Expert
from moe_dist.models.moe import MoE
from moe_dist.models.router import ROUTERS, Router, Routing, TopK, TopKRouter, build_router, register_router
from moe_dist.models.transformer import Transformer

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = ModelConfig(**SIZES, moe_intermediate_size=8, num_experts=4)


def test_example_of_the_guide() -> None:
    indices, weights = TopKRouter(num_experts=4, top_k=2)(torch.randn(8, 32, 4))
    assert indices.shape == weights.shape == (8, 32, 2)
    assert indices.dtype == torch.int64
    torch.testing.assert_close(weights.sum(-1), torch.ones(8, 32))


@settings(deadline=None, max_examples=60)
@given(
    sigmoid=st.booleans(),
    renormalise=st.booleans(),
    top_k=st.integers(1, 6),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_against_the_definition(sigmoid: bool, renormalise: bool, top_k: int, biased: bool, seed: int) -> None:
    """Trap 16. Planted: weights of the K highest logits by softmax over K when not renormalised."""
    torch.manual_seed(seed)
    logits = torch.randn(7, 6, dtype=torch.float64)
    bias = torch.randn(6) if biased else None
    kind = "sigmoid" if sigmoid else "softmax"
    rule = TopKRouter(6, top_k, scoring_func=kind, norm_topk_prob=renormalise, scaling_factor=1.5)
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    order = (scores if bias is None else scores + bias).argsort(-1, descending=True)[:, :top_k]
    expected = scores.gather(-1, order)
    if renormalise:
        expected = expected / expected.sum(-1, keepdim=True)
    indices, weights = rule(logits, bias)
    assert torch.equal(indices, order)
    torch.testing.assert_close(weights, 1.5 * expected.float(), rtol=1e-5, atol=1e-6)


def test_weights_survive_logits_far_below_zero() -> None:
    """Trap 23. Planted: weights / (weights.sum() + 1e-20) of sigmoid scores: 0 / 1e-20."""
    logits = torch.full((3, 4), -120.0).index_fill(1, torch.tensor([2]), -119.0)
    _, weights = TopKRouter(4, 2, scoring_func="sigmoid")(logits)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("n_group", [1, 2])
def test_a_broken_gate_keeps_ids_in_range(bad: float, n_group: int) -> None:
    logits = torch.randn(5, 8)
    logits[1], logits[2, 3] = bad, bad
    for scoring in ("softmax", "sigmoid"):
        rule = TopKRouter(8, 3, scoring_func=scoring, n_group=n_group, topk_group=1)
        indices, weights = rule(logits, torch.randn(8))
        assert ((indices >= 0) & (indices < 8)).all()
        assert weights[[0, 3, 4]].isfinite().all()
        assert all(len(set(row)) == 3 for row in indices.tolist())


def test_a_nan_token_spoils_only_itself() -> None:
    layer = MoE(SMALL, BalanceConfig(capacity_factor=1.0), 0)
    layer.experts.initialize(lambda expert: expert, 0.1)
    layer.eval()
    x = torch.randn(1, 6, 16)
    clean = layer(x)
    x[0, 2] = float("nan")
    out = layer(x)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(out[:, others], clean[:, others])
    layer.train()
    layer(x).sum().backward()


def test_top_1_renormalised_is_refused() -> None:
    """Trap 15. Planted: the check removed from `ModelConfig`."""
    with pytest.raises(ValidationError, match="the router never learns"):
        ModelConfig(num_experts_per_tok=1)
    layer = MoE(SMALL.model_copy(update={"num_experts_per_tok": 1, "norm_topk_prob": False}), BalanceConfig(), 0)
    layer.experts.initialize(lambda expert: expert, 0.1)
    layer.eval()
    layer(torch.randn(2, 8, 16)).square().sum().backward()
    assert layer.router.weight.grad.count_nonzero() > 0


def test_gradient_reaches_the_router_without_auxiliary_loss() -> None:
    """Trap 14. Planted: routing weights detached."""
    layer = MoE(SMALL, BalanceConfig(use_auxiliary_loss=False), 0)
    layer.experts.initialize(lambda expert: expert, 0.1)
    layer(torch.randn(2, 8, 16)).square().sum().backward()
    assert layer.router.weight.grad.norm() > 0


def test_float32_under_autocast_and_in_a_bfloat16_model() -> None:
    """Trap 17. Planted: `autocast(enabled=False)` and `.float()` of `Router` removed; logits in bfloat16."""
    torch.manual_seed(0)
    config = SMALL.model_copy(update={"hidden_size": 256, "num_experts": 64, "num_experts_per_tok": 8})
    router = build_router(config, BalanceConfig())
    x = torch.randn(2000, 256)
    exact = router(x)
    in_double = x.double() @ router.weight.double().T
    torch.testing.assert_close(exact.logits_TE.double(), in_double, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = router(x)
    assert torch.equal(mixed.expert_ids_TK, exact.expert_ids_TK)
    assert mixed.logits_TE.dtype == mixed.weights_TK.dtype == torch.float32
    half = router.bfloat16()(x.bfloat16())
    assert half.logits_TE.dtype == half.scores_TE.dtype == half.weights_TK.dtype == torch.float32
    assert agreement(half.expert_ids_TK, exact.expert_ids_TK) > 0.97


def agreement(a: Tensor, b: Tensor) -> float:
    return float((a[..., :, None] == b[..., None, :]).any(-1).float().mean())


def test_routing_of_a_bfloat16_model_agrees_with_float32() -> None:
    """Trap 17, through two layers of bfloat16 arithmetic. The plant is in the test above."""
    config = SMALL.model_copy(update={"num_experts": 16, "hidden_size": 64, "initializer_range": 0.1})
    model = Transformer(config)
    model.initialize(0)
    chosen: list[Tensor] = []
    for layer in model.moe_layers():
        layer.router.register_forward_hook(lambda _, __, routing: chosen.append(routing.expert_ids_TK))
    ids = torch.randint(0, 40, (4, 64))
    model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert [agreement(a, b) > 0.97 for a, b in zip(chosen[:2], chosen[2:], strict=True)] == [True, True]


def test_frozen_router_has_no_gradient() -> None:
    layer = MoE(SMALL, BalanceConfig(freeze_router=True), 0)
    layer.experts.initialize(lambda expert: expert, 0.1)
    x = torch.randn(2, 8, 16, requires_grad=True)
    layer(x).sum().backward()
    assert layer.router.weight.grad is None
    assert x.grad.norm() > 0


def test_selection_bias_moves_the_choice_and_not_the_weights() -> None:
    """Trap 19. Planted: the bias added to the scores that become weights."""
    router = build_router(SMALL.model_copy(update={"norm_topk_prob": False}), BalanceConfig(bias_update_rate=0.1))
    x = torch.randn(20, 16)
    router.bias_E[3] = 10.0
    routing = router(x)
    assert (routing.expert_ids_TK == 3).any(-1).all()
    torch.testing.assert_close(routing.weights_TK, routing.scores_TE.gather(1, routing.expert_ids_TK))


def test_a_bias_that_no_longer_moves_is_still_used() -> None:
    """Trap 34. Seen to fail with `use_bias` set by the rate: a run that goes on at rate 0 chose by scores alone. A run
    that never had one is bitwise without it."""
    moving = build_router(SMALL, BalanceConfig(bias_update_rate=0.1))
    with torch.no_grad():
        moving.bias_E.copy_(torch.randn(SMALL.num_experts))
    frozen = build_router(SMALL, BalanceConfig())
    frozen.weight = moving.weight
    x = torch.randn(50, 16)
    without = frozen(x)
    assert frozen.selection_bias is None
    frozen.bias_E.detach().copy_(moving.bias_E)  # as a checkpoint is read
    assert torch.equal(frozen(x).expert_ids_TK, moving(x).expert_ids_TK)
    assert torch.equal(frozen(x).weights_TK, moving(x).weights_TK)
    assert not torch.equal(frozen(x).expert_ids_TK, without.expert_ids_TK)
    removed = build_router(SMALL, BalanceConfig(use_selection_bias=False))
    removed.load_state_dict(frozen.state_dict())
    assert torch.equal(removed(x).expert_ids_TK, without.expert_ids_TK)
    with pytest.raises(ValueError, match="use_selection_bias=false"):
        BalanceConfig(use_selection_bias=False, bias_update_rate=0.1)


def test_jitter_only_in_training() -> None:
    router = build_router(SMALL, BalanceConfig(router_jitter=0.5))
    x = torch.randn(20, 16)
    assert not torch.equal(router(x).logits_TE, router(x).logits_TE)
    router.eval()
    assert torch.equal(router(x).logits_TE, router(x).logits_TE)


def test_temperature_divides_logits() -> None:
    """Weights and scores against the definition; 1 is bitwise nothing. Seen to fail with logits multiplied by it."""
    plain, cold = build_router(SMALL, BalanceConfig()), build_router(SMALL, BalanceConfig(router_temperature=0.5))
    cold.weight = plain.weight
    x = torch.randn(20, 16)
    torch.testing.assert_close(cold(x).logits_TE, 2 * plain(x).logits_TE)
    torch.testing.assert_close(cold(x).scores_TE, (plain(x).logits_TE / 0.5).softmax(-1))
    assert (cold(x).weights_TK.max(1).values > plain(x).weights_TK.max(1).values).all()
    cold.logits_temperature = 1.0
    assert torch.equal(cold(x).weights_TK, plain(x).weights_TK)


def test_temperature_moves_to_one() -> None:
    """Seen to fail with the temperature left where it starts."""
    config = BalanceConfig(router_temperature=3.0, router_temperature_steps=4)
    assert [config.temperature_at(step) for step in range(6)] == [3.0, 2.5, 2.0, 1.5, 1.0, 1.0]
    assert BalanceConfig(router_temperature=3.0).temperature_at(9) == 3.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_whose_gate_fails_goes_to_the_fallback_expert(bad: float) -> None:
    """Alone, with weight 1, counted, and without a gradient that is not a number; padding is not counted.

    Seen to fail without the hook: the gradient of the whole input was NaN, zero times the broken weight.
    """
    layer = MoE(SMALL, BalanceConfig(fallback_expert=3), 0)
    layer.experts.initialize(lambda expert: expert, 0.1)
    layer.balance.facts = LoadFacts.zeros(4, torch.device("cpu"))
    layer.router.weight.data[:, 0] = bad
    x = torch.randn(2, 6, 16, requires_grad=True)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 5] = False
    out = layer(x, RoutingContext(valid))
    alone = layer.experts(x.detach().flatten(0, 1), torch.tensor([0, 0, 0, 12])).view_as(x)
    torch.testing.assert_close(out[valid], alone[valid])
    assert layer.balance.facts.fallbacks == 11
    assert layer.balance.facts.pairs_E.tolist() == [0, 0, 0, 11]
    out[valid].square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


class Failing(Router):
    """Fails for some tokens, and shuts an expert out for all."""

    def logits(self, x_TD: Tensor) -> Tensor:
        logits_TE = super().logits(x_TD).masked_fill(torch.arange(4) == 2, -float("inf"))
        return logits_TE.masked_fill(x_TD[:, :1] > 0.5, float("nan"))


def test_the_others_go_where_they_went() -> None:
    """Seen to fail with `isfinite` of every logit as the test: a router that shuts out an expert failed always."""
    config = SMALL.model_copy(update={"router": f"{__name__}:Failing"})
    safe, plain = build_router(config, BalanceConfig(fallback_expert=0)), build_router(config, BalanceConfig())
    plain.weight = safe.weight
    x = torch.randn(50, 16)
    failed = x[:, 0] > 0.5
    routing, wanted = safe(x), plain(x)
    assert torch.equal(routing.failed_T, failed)
    assert torch.equal(routing.expert_ids_TK[~failed], wanted.expert_ids_TK[~failed])
    torch.testing.assert_close(routing.weights_TK[~failed], wanted.weights_TK[~failed])
    assert routing.expert_ids_TK[failed].tolist() == [[0, 4]] * int(failed.sum())
    assert routing.weights_TK[failed].tolist() == [[1.0, 0.0]] * int(failed.sum())
    for option in ({"fallback_expert": 0}, {"router_temperature": 2.0}):
        with pytest.raises(ValueError, match=r"it overrides forward, where .* have no effect; override logits"):
            build_router(SMALL.model_copy(update={"router": f"{__name__}:Plain"}), BalanceConfig(**option))


@pytest.mark.parametrize("num_padding", [0, 5])
def test_expert_choice_against_the_paper(num_padding: int) -> None:
    """Zhou et al. 2022, section 3.2, with its letters: S = softmax(X W_g), G, I = TopK(S^T, k), P = onehot(I),
    X_in = P X, X_out[l] = sum over i, j of P[i,j,l] G[i,j] X_e[i,j], k = n c / e. Output and gradients.

    Seen to fail with weights divided by their sum, with each token choosing experts, and with padding chosen.
    """
    torch.manual_seed(0)
    config = SMALL.model_copy(update={"router": "expert_choice"})
    layer = MoE(config, BalanceConfig(use_auxiliary_loss=False), 0)
    layer.experts.initialize(lambda expert: expert, 0.3)
    x = torch.randn(2, 12, 16, requires_grad=True)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 12 - num_padding :] = False
    out = layer(x, RoutingContext(valid if num_padding else None))

    twin = x.detach().clone().requires_grad_()
    tokens = twin[valid]
    n, e, c = len(tokens), 4, 2
    S = (tokens @ layer.router.weight.detach().T).softmax(-1)
    G, I = S.T.topk(-(-n * c // e), dim=1)  # noqa: E741
    P = nn.functional.one_hot(I, n).float()
    X_in = torch.einsum("ijl,ld->ijd", P, tokens)
    counts = torch.eye(e, dtype=torch.int64) * I.shape[1]
    X_e = torch.stack([layer.experts(X_in[i], counts[i]) for i in range(e)])
    wanted = torch.einsum("ijl,ij,ijd->ld", P, G, X_e)
    torch.testing.assert_close(out[valid], wanted)
    assert not out[~valid].any()
    per_token = P.sum((0, 1))
    assert per_token.min() < 2 < per_token.max()  # not what top-k would do
    out.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def test_expert_choice_takes_the_first_of_equal_tokens() -> None:
    """Equal but for rounding, which depends on the layout. Seen to fail, and layouts to differ by 6e-3 after two steps,
    with the scores as they are."""
    router = build_router(SMALL.model_copy(update={"router": "expert_choice"}), BalanceConfig())
    ids = router(torch.ones(8, 16) + 1e-7 * torch.arange(8)[:, None].flip(0)).expert_ids_TK
    assert torch.equal(ids, torch.where(torch.arange(8)[:, None] < 4, torch.arange(4), 4))
    assert router(torch.empty(0, 16)).expert_ids_TK.shape == (0, 4)


class Cosine(Router):
    """A person's own router: other logits, the configured rule."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts)
        self.temperature = nn.Parameter(torch.ones(()))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.ones_(self.temperature)

    def logits(self, x_TD: Tensor) -> Tensor:
        x_TD, weight = (nn.functional.normalize(tensor, dim=-1) for tensor in (x_TD, self.weight.float()))
        return x_TD @ weight.T * 5 * self.temperature


class Plain(Router):
    """A person's own router that answers with a plain tuple, by the helper."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts)
        self.weight = None
        self.gate = nn.Sequential(nn.Linear(hidden_size, 8), nn.Tanh(), nn.Linear(8, num_experts))

    def forward(self, hidden_states: Tensor) -> TopK:
        return self.select_experts(self.gate(hidden_states).softmax(-1))


class Swapped(Plain):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        indices, weights = super().forward(hidden_states)
        return weights, indices


class Hashed(Plain):
    """A person's own router with buffers: a constant, and one drawn at random; and one inside a module."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts)
        self.register_buffer("temperature", torch.tensor(0.7))
        self.register_buffer("planes", torch.randn(hidden_size, 3), persistent=False)
        self.gate.register_buffer("scale", torch.full((num_experts,), 2.0))


def test_buffers_of_an_own_router_have_their_values() -> None:
    """On the meta device they have none. Seen to fail with `to_empty` alone: whatever the memory held."""
    ROUTERS._entries.pop("mine", None)
    register_router("mine")(Hashed)
    models = []
    for layers in (None, [1]):
        with torch.device("meta"):
            models.append(Transformer(SMALL.model_copy(update={"router": "mine"}), layers=layers))
        torch.manual_seed(len(models))
        models[-1].initialize(0)
    first, second = (moe.router for moe in models[0].moe_layers())
    (alone,) = (moe.router for moe in models[1].moe_layers())
    assert first.temperature == torch.tensor(0.7)
    assert torch.equal(first.gate.scale, torch.full((SMALL.num_experts,), 2.0))
    assert not torch.equal(first.planes, second.planes)
    assert all(torch.equal(a, b) for a, b in zip(second.buffers(), alone.buffers(), strict=True))


class GuideRouter(Router):
    """As the guide writes it: the base class is given nothing, and the helper alone decides."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate = nn.Linear(hidden_size, num_experts)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        router_probs = torch.softmax(self.gate(hidden_states), dim=-1)
        return self.select_experts(router_probs)


class GuideExpert(Expert):
    """As the guide writes it, with dropout inside."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(hidden_size, intermediate_size),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(intermediate_size, hidden_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_classes_of_the_guide_train() -> None:
    """Seen to end with a TypeError: `super().__init__()` missed hidden_size and num_experts or intermediate_size."""
    indices, weights = GuideRouter(16, 4)(torch.randn(3, 5, 16))
    assert indices.shape == weights.shape == (3, 5, 2)
    config = SMALL.model_copy(
        update={"router": f"{__name__}:GuideRouter", "expert": f"{__name__}:GuideExpert", "num_experts_per_tok": 3}
    )
    with torch.device("meta"):
        model = Transformer(config, BalanceConfig(bias_update_rate=0.1))
    model.initialize(0)
    for layer in model.moe_layers():
        assert layer.router.top_k == 3
        assert torch.equal(layer.router.bias_E, torch.zeros(4))
    ids = torch.randint(0, 40, (2, 12))
    nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_router_without_sizes_and_without_logits_is_named() -> None:
    class Nothing(Router):
        def __init__(self, hidden_size: int, num_experts: int) -> None:
            super().__init__()

    with pytest.raises(ValueError, match=r"model\.router: Nothing has no weight: .* override logits or forward"):
        Nothing(16, 4)(torch.randn(3, 16))


@pytest.mark.parametrize("kind", [Cosine, Plain, Swapped])
def test_a_persons_own_router_trains(kind: type[Router]) -> None:
    """Planted: `Routing(*decision)` for tuples (TopK has the indices first)."""
    ROUTERS._entries.pop("mine", None)
    register_router("mine")(kind)
    with torch.device("meta"):
        model = Transformer(SMALL.model_copy(update={"router": "mine"}))
    model.initialize(0)
    before = [p.detach().clone() for layer in model.moe_layers() for p in layer.router.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (2, 12))
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    after = [p for layer in model.moe_layers() for p in layer.router.parameters()]
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_fsdp_finds_the_tensors_that_its_modules_return() -> None:
    """Of PyTorch 2.11 too, which knows no dataclasses: weights of a router were freed in backward (ZeRO 3).

    Planted: `Routing` without `tensors_inside`.
    """
    model = Transformer(SMALL)
    sharded = [*model.stages, *model.blocks(), *(part for layer in model.moe_layers() for part in layer.children())]
    unseen: list[type] = []

    def look(module: nn.Module, arguments: tuple, output: object) -> None:
        leaves = tree_leaves(output)
        assert any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves), type(module)
        unseen.extend(type(leaf) for leaf in leaves if not isinstance(leaf, (Tensor, bool)))

    for module in sharded:
        module.register_forward_hook(look)
    model(torch.zeros(1, 4, dtype=torch.int64))
    assert unseen == []


def test_router_by_import_path_and_by_wrong_name() -> None:
    config = SMALL.model_copy(update={"router": f"{__name__}:Plain"})
    assert isinstance(build_router(config, BalanceConfig()), Plain)
    with pytest.raises(ValueError, match=r"model.router=topkk: .*did you mean topk\?"):
        build_router(SMALL.model_copy(update={"router": "topkk"}), BalanceConfig())


def test_tuples_that_are_no_routing_are_refused() -> None:
    with pytest.raises(ValueError, match="expert ids"):
        Routing.of((torch.rand(3, 2), torch.rand(3, 2)))
    with pytest.raises(ValueError, match="expert ids"):
        Routing.of((torch.zeros(3, 1, dtype=torch.int64), torch.rand(3, 2)))


def test_top_k_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k=5: between 1 and num_experts=4"):
        TopKRouter(4, 5)


def test_helper_follows_the_configured_rule() -> None:
    router = Router(8, 4, top_k=2)
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.2, 0.0]], requires_grad=True)
    indices, weights = router.select_experts(probabilities)
    assert indices.tolist() == [[3, 2], [0, 2]]
    torch.testing.assert_close(weights, torch.tensor([[4 / 7, 3 / 7], [7 / 9, 2 / 9]]))
    assert weights.requires_grad
