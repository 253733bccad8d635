"""`parallel.dispatcher: static` equals `all_to_all` under the same capacity, and waits for no device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from run_files import complaint
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.auxiliary import LoadFacts
from moe_dist.models.context import RoutingContext
from moe_dist.models.moe import LocalDispatcher, MoE
from moe_dist.models.recompute import recompute
from moe_dist.parallel import dispatch
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.dispatchers import build_dispatcher

EXPERTS, TOP_K, HIDDEN, FACTOR = 8, 2, 16, 0.8
EXAMPLES = "moe_dist.verify.examples:"


@dataclass(frozen=True)
class Case:
    """A layer, a micro-batch (2, S) and what is done with them; `places` of an expert: 0.8 x 2 S x 2 / 8 and up."""

    length: int = 7
    places: int = 3
    padding: int = 0
    """Tokens at the end of the second sequence; of rank 1 all are."""
    same_choice: bool = False
    again: bool = False
    """Its activations are dropped and computed again."""
    model: dict[str, Any] = field(default_factory=dict)
    balance: dict[str, Any] = field(default_factory=dict)


CASES = {
    "plain": Case(balance={"router_z_loss_coef": 0.1}),
    "padding": Case(padding=4),
    "all to the same experts": Case(same_choice=True),
    "fewer tokens than experts": Case(length=2, places=1),
    "expert dropout": Case(balance={"expert_dropout": 0.3}),
    "recomputation": Case(again=True, padding=2),
    "fallback": Case(model={"router": f"{EXAMPLES}FailingRouter"}, balance={"fallback_expert": 1}),
    "shared expert": Case(model={"shared_expert_intermediate_size": 8}),
    "biases": Case(model={"expert": "swiglu_clamped"}),
    "own class with biases": Case(padding=4, model={"expert": f"{EXAMPLES}TwoLinears"}),
}
NOISE = Case(padding=4, model={"expert": f"{EXAMPLES}NoisyExpert"})


def layer_of(case: Case) -> MoE:
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": 2, "moe_intermediate_size": 8}
    model = sizes | {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K} | case.model
    torch.manual_seed(0)
    layer = MoE(ModelConfig.model_validate(model), BalanceConfig(capacity_factor=FACTOR, **case.balance), 3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if case.same_choice:
        torch.nn.init.zeros_(layer.router.weight)
    layer.balance.facts = LoadFacts.zeros(EXPERTS, torch.device("cpu"))
    return layer


def batch_of(case: Case, rank: int = 0) -> tuple[Tensor, RoutingContext]:
    x = torch.randn(2, case.length, HIDDEN, generator=torch.Generator().manual_seed(rank))
    if not case.padding:
        return x, RoutingContext(token_scale=0.1)
    valid = torch.ones(2, case.length, dtype=torch.bool)
    valid[1, -case.padding :] = False
    return x, RoutingContext(valid & (rank != 1), token_scale=0.1)


def passed(layer: MoE, case: Case, x: Tensor, context: RoutingContext) -> dict[str, Tensor]:
    """Output, facts and all gradients of one pass."""
    torch.manual_seed(1)  # of dropout
    x = x.clone().requires_grad_()
    out = recompute(lambda x: layer(x, context), x) if case.again else layer(x, context)
    (out * torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    facts = layer.balance.facts
    assert facts is not None
    found = {name: getattr(facts, name) for name in ("pairs_E", "dropped_E", "tokens", "sums", "fallbacks")}
    found |= {"out": out.detach(), "x": x.grad}
    return found | {name: parameter.grad for name, parameter in layer.named_parameters()}


def both_ways(case: Case, dtype: torch.dtype) -> tuple[float, list[tuple[int, int]]]:
    """Largest difference between the dispatchers relative to the largest number of each tensor; of each dispatcher
    how often it has told counts, and the bytes to another rank."""
    rank, size = 0, 1
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    x, context = batch_of(case, rank)
    results, traffic = [], []
    for kind in ("all_to_all", "static"):
        layer, clock = layer_of(case).to(dtype), Clock(torch.device("cpu"))
        if size == 1:
            layer.reach_experts_by(LocalDispatcher(EXPERTS, static=kind == "static"))
        else:
            layer.experts.shard(rank * EXPERTS // size, EXPERTS // size)
            layer.reach_experts_by(build_dispatcher(kind, dist.group.WORLD, EXPERTS, 3, clock))
        with patch.object(dispatch, "exchange_headers", wraps=dispatch.exchange_headers) as told:
            results.append(passed(layer, case, x.to(dtype), context))
            traffic.append((told.call_count, clock.take_traffic().bytes_to[(rank + 1) % size] if size > 1 else 0))
            layer.eval()
            results[-1]["evaluation"] = layer(x.to(dtype), context).detach()
    wanted, found = results
    assert wanted.keys() == found.keys()
    assert int(wanted["dropped_E"].sum()) > 0 or not bool(context.valid_BS is None or context.valid_BS.any())
    worst = 0.0
    for key, tensor in wanted.items():
        assert found[key].shape == tensor.shape
        worst = max(worst, float((found[key] - tensor).abs().max()) / (float(tensor.abs().max()) or 1.0))
    return worst, traffic


@pytest.mark.parametrize("name", CASES)
def test_as_the_sort_of_one_rank(name: str) -> None:
    """What a pass gives and counts, and an evaluation after it. Planted: empty places given the first pair, and places
    of an expert that begin one row early, each turned all cases red; pairs without a row that keep their weight eight.
    """
    assert both_ways(CASES[name], torch.float64)[0] < 1e-12
    assert both_ways(CASES[name], torch.float32)[0] < 1e-5


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_as_all_to_all(ranks: int, name: str) -> None:
    """Bytes are those of all places, in both directions of a step, whatever was chosen; nothing is told beside them but
    in evaluation, which has no capacity."""
    case = CASES[name]
    rows = EXPERTS // ranks * case.places
    trips = 4 + 2 * case.again  # that of dispatch and of combine forward, where that is repeated too, and backward
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for worst, (plain, static) in run_ranks(both_ways, ranks, case, dtype):
            assert worst < bound
            assert plain[0] == 1
            assert static == (0, trips * rows * HIDDEN * dtype.itemsize)


@pytest.mark.dist
def test_noise_is_told() -> None:
    """Experts that draw noise need the seeds and counts of peers, as by `all_to_all`."""
    for worst, traffic in run_ranks(both_ways, 2, NOISE, torch.float64):
        assert worst == 0.0
        assert traffic[0] == traffic[1]


@contextmanager
def group_of(ranks: int) -> Iterator[dist.ProcessGroup | None]:
    """Of so many ranks, of which this process is the first and the others are nowhere; None for one."""
    if ranks == 1:
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    yield dist.group.WORLD
    dist.destroy_process_group()


def on_no_device(kind: str, case: Case, group: dist.ProcessGroup | None) -> Tensor:
    """A pass forward and backward whose tensors have no numbers: whoever asks for one is refused."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):  # of which the kernel of experts knows the shapes
        layer = layer_of(case)
        layer.router.use_bias = True  # not by a look at its numbers, which is one for all passes
        if group is None:
            layer.reach_experts_by(LocalDispatcher(EXPERTS, static=kind == "static"))
        else:
            layer.experts.shard(0, EXPERTS // group.size())
            layer.reach_experts_by(build_dispatcher(kind, group, EXPERTS, 3, casts=True))
        return passed(layer, case, *batch_of(case))["x"]


ALONE = [(1, name) for name in CASES if "own class" not in name]  # these come one after the other, by their counts


@pytest.mark.parametrize(("ranks", "name"), [*ALONE, (2, "padding")])
def test_nothing_waits_for_the_device(ranks: int, name: str) -> None:
    with group_of(ranks) as group:
        assert on_no_device("static", CASES[name], group).shape == (2, CASES[name].length, HIDDEN)
        with pytest.raises(DataDependentOutputException):
            on_no_device("all_to_all", CASES[name], group)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("parallel: {dispatcher: static}", "experts have places by balance.capacity_factor; set it"),
        (
            "balance: {capacity_factor: 1.0}\nparallel: {dispatcher: static, dispatch_chunks: 2}",
            "each of parallel.dispatch_chunks=2 pieces would need all places",
        ),
        (
            "balance: {capacity_factor: 1.0}\nparallel: {dispatcher: static, ep_size: 2, expert_placement: balanced}",
            "ranks get as many rows wherever experts are",
        ),
    ],
)
def test_what_has_no_fixed_places_is_refused(tmp_path: Path, keys: str, said: str) -> None:
    assert f"parallel.dispatcher=static: {said}" in complaint(tmp_path, keys)
