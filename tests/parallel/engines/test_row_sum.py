"""An embedding's gradient by the rows that tokens have touched is what the whole matrix summed is, in fewer bytes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn

from moe_dist.parallel.engines.gradient_buffer import GradientBuffer
from moe_dist.parallel.engines.row_sum import RowSum

pytestmark = pytest.mark.dist
V, D = 40, 3


def filled(rows: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Other numbers on every rank."""
    torch.manual_seed(dist.get_rank())
    matrix = torch.zeros(V, D, dtype=dtype)
    matrix[rows] = torch.randn(len(rows), D, dtype=dtype)
    return matrix


def by_rows(rows: list[list[int]], half: bool, always: bool) -> tuple[Tensor, Tensor] | None:
    """What the sum of rows and that of whole matrices come to; None where the former does not pay."""
    mine = filled(rows[dist.get_rank()])
    whole = mine.to(torch.bfloat16).float() if half else mine.clone()
    dist.all_reduce(whole)
    assert dist.group.WORLD is not None
    started = RowSum(mine, dist.group.WORLD, torch.bfloat16 if half else torch.float32, always).start()
    if started is None:
        return None
    for work in started.works:
        work.wait()
    started.finish()
    return mine, whole


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        [[1, 5, 39], [0, 5]],
        [[], [3]],
        [[], []],
        [[1, 5, 39], [0, 5], [], [39, 38, 2, 5]],
    ],
)
def test_rows_add_up_to_the_whole(rows: list[list[int]], half: bool) -> None:
    """Rows of several ranks and of one, ranks with more and fewer, one without any."""
    found = run_ranks(by_rows, len(rows), rows, half, False)
    assert all(torch.equal(summed, found[0][0]) for summed, _ in found)
    for summed, whole in found:
        assert torch.allclose(summed, whole, rtol=1e-6)
        if len(rows) == 2:
            assert torch.equal(summed, whole)


def test_all_ranks_send_the_whole_where_one_has_filled_much() -> None:
    rows = [list(range(V // 2 + 1)), [4]]
    assert run_ranks(by_rows, 2, rows, False, False) == [None, None]
    for summed, whole in run_ranks(by_rows, 2, rows, False, True):
        assert torch.equal(summed, whole)


def not_a_number() -> Tensor:
    mine = torch.zeros(V, D)
    mine[7, 1] = float("nan") if dist.get_rank() else 0.0
    assert dist.group.WORLD is not None
    started = RowSum(mine, dist.group.WORLD, torch.float32, False).start()
    assert started is not None
    for work in started.works:
        work.wait()
    started.finish()
    return mine


def test_what_is_not_a_number_reaches_everyone() -> None:
    for summed in run_ranks(not_a_number, 2):
        assert summed.isnan().nonzero().tolist() == [[7, 1]]


def elements_sent(tokens: int, how: dict[str, bool]) -> tuple[Tensor, int]:
    """The gradients of an embedding and a layer summed during backward, and how many numbers went into messages."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D))
    buffer = GradientBuffer(model.named_parameters(), torch.device("cpu"), dist.group.WORLD, 16, by_rows=how)
    sent = 0
    gather, reduce = dist.all_gather, dist.all_reduce

    def gathered(everyones: list[Tensor], mine: Tensor, **options: object) -> object:
        nonlocal sent
        sent += mine.numel()
        return gather(everyones, mine, **options)

    def reduced(whole: Tensor, **options: object) -> object:
        nonlocal sent
        sent += whole.numel()
        return reduce(whole, **options)

    dist.all_gather, dist.all_reduce = gathered, reduced
    try:
        buffer.zero()
        buffer.reduce_early()
        model(torch.arange(tokens) + dist.get_rank()).square().sum().backward()
        buffer.send_rest()
        buffer.wait()
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    return buffer.flat.clone(), sent


def test_a_buffer_sends_rows_of_the_embedding_alone() -> None:
    linear = D * D + D
    name = "0.weight"
    for whole, rows, many in zip(
        run_ranks(elements_sent, 2, 4, {}),
        run_ranks(elements_sent, 2, 4, {name: False}),
        run_ranks(elements_sent, 2, V - 1, {name: False}),
        strict=True,
    ):
        assert whole[1] == V * D + linear
        assert rows[1] == 1 + 4 + 4 * D + linear  # how many, which, what
        assert many[1] == 1 + V * D + linear
        assert torch.equal(whole[0], rows[0])
