"""A person's own experts in one process: initial values, idle ones, noise, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.experts import EXPERTS, Expert, ExpertList, Experts, build_experts
from moe_dist.models.moe import MoE
from moe_dist.models.noise import Sources
from moe_dist.models.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=20,
    num_hidden_layers=1,
    hidden_size=8,
    num_attention_heads=2,
    moe_intermediate_size=4,
    num_experts=6,
    expert="mine",
)


def own(kind: type[nn.Module]) -> ModelConfig:
    """The configuration with this class for its experts."""
    EXPERTS._entries.pop("mine", None)
    EXPERTS.register("mine")(kind)
    return CONFIG


class Biased(Experts):
    """Stacked, with a vector and a third matrix of each expert, a table of all, and a constant of each."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size)
        self.bias = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.w_more = nn.Parameter(torch.empty(num_experts, hidden_size, hidden_size))
        self.register_buffer("table", torch.randn(3))


def built(first: int, count: int) -> Experts:
    with torch.device("meta"):
        model = Transformer(own(Biased))
    (moe,) = model.moe_layers()
    moe.experts.shard(first, count)
    model.initialize(0)
    return moe.experts


def test_every_stacked_parameter_starts_from_the_seed_of_its_expert() -> None:
    """Seen to fail with w_gate_up and w_down alone: the others held what the memory held."""
    whole, part = built(0, 6), built(2, 3)
    assert torch.equal(part.table, whole.table)
    assert whole.table.abs().min() > 0
    for name, parameter in whole.named_parameters():
        assert torch.equal(part.get_parameter(name), parameter[2:5])
    assert whole.bias.count_nonzero() == 0
    assert float(whole.w_more.detach().std()) == pytest.approx(CONFIG.initializer_range, rel=0.2)
    assert len({expert.detach().numpy().tobytes() for expert in whole.w_more}) == 6
    plain = Experts(6, 8, 4)
    plain.initialize(lambda expert: expert, 0.1)
    more = Biased(6, 8, 4)
    more.initialize(lambda expert: expert, 0.1)
    assert all(torch.equal(more.get_parameter(name), weight) for name, weight in plain.named_parameters())


class Shared(Experts):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.norm = nn.RMSNorm(sizes[1])


class Single(Experts):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(sizes[1]))


class Counted(Experts):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("seen", torch.zeros(sizes[0], 2))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Shared, r"Shared.norm.weight is \[8\]; a parameter of stacked experts .* one row per expert, \[6, ...\]"),
        (Single, r"Single.scale is \[8\]"),
        (Counted, r"Counted.seen is a buffer with one row per expert.*requires_grad=False"),
    ],
)
def test_what_a_stack_cannot_hold_is_named(kind: type[nn.Module], words: str) -> None:
    """A layout would cut it wrongly, or reduce its gradient as that of single experts."""
    with pytest.raises(ValueError, match=words):
        build_experts(own(kind))


class Dropped(Expert):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x_RD: Tensor) -> Tensor:
        return self.dropout(self.inner(x_RD))


class Stray(Expert):
    def forward(self, x_RD: Tensor) -> Tensor:
        return F.dropout(x_RD, 0.5, self.training)


class StrayStack(Experts):
    def forward(self, rows_RD: Tensor, rows_per_expert: Tensor) -> Tensor:
        return F.dropout(super().forward(rows_RD, rows_per_expert), 0.5, self.training)


def test_noise_of_an_expert_does_not_depend_on_its_neighbours() -> None:
    """Rule 8: the same (micro-batch, expert) draws the same, alone or beside others, and leaves no trace in the random
    state. Planted: the seed without the expert's id (all alike); one run for all sources."""
    experts = ExpertList(lambda: Dropped(8, 4), 3)
    for expert in experts.experts.values():
        expert.load_state_dict(experts.experts["0"].state_dict())
    rows_SE = torch.tensor([[2, 0, 3], [1, 0, 3]])
    x = torch.ones(9, 8)
    assert experts.draws_noise
    state = torch.get_rng_state()
    both = experts(x, rows_SE.sum(0), Sources(rows_SE, [5, 7])).split([2, 1, 3, 3])
    assert torch.equal(torch.get_rng_state(), state)
    first = experts(x[:5], rows_SE[0], Sources(rows_SE[:1], [5])).split([2, 3])
    second = experts(x[:4], rows_SE[1], Sources(rows_SE[1:], [7])).split([1, 3])
    assert all(map(torch.equal, both, (first[0], second[0], first[1], second[1])))
    assert not torch.equal(both[2], both[3])
    assert not torch.equal(both[0], both[2][:2])
    experts.eval()
    assert not experts.draws_noise


class Always(Stray):
    has_noise = True

    def forward(self, x_RD: Tensor) -> Tensor:
        return F.dropout(x_RD, 0.5)


@pytest.mark.parametrize("kind", [Stray, StrayStack, Always])
def test_noise_that_nobody_was_told_of_is_refused(kind: type[nn.Module]) -> None:
    """In evaluation there is none to be told of: it would change with the layout."""
    layer = MoE(own(kind), BalanceConfig(), 0).train(kind is not Always)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 4, 8)
    words = "draws random numbers in a way .* draws in training only, .*has_noise = True"
    with pytest.raises(ValueError, match=f"{kind.__name__} {words}"):
        layer(x)
    assert layer.train(kind is Always)(x).isfinite().all()


def test_dtype_of_an_expert_without_rows_is_that_of_the_others() -> None:
    """Or ranks would send rows of different widths."""
    experts = ExpertList(lambda: Dropped(8, 4), 2)
    with torch.autocast("cpu", torch.bfloat16):
        for counts in ([0, 0], [3, 0]):
            out = experts(torch.randn(sum(counts), 8, requires_grad=True), torch.tensor(counts))
            assert out.dtype == torch.bfloat16
            out.float().sum().backward()
    assert all(p.grad is not None for p in experts.parameters())


class Named(Experts):
    """Has an `activation` of its own, a module."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size)
        self.activation = nn.GELU()


def test_an_own_stack_keeps_its_attributes() -> None:
    """Seen red: `model.hidden_act` was written over an attribute that only happened to have that name."""
    experts = build_experts(own(Named).model_copy(update={"hidden_act": "gelu"}))
    assert isinstance(experts.activation, nn.GELU)
