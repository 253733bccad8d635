"""A value that is not finite is found wherever it stands, in every type."""

from __future__ import annotations

import pytest
import torch

from moe_dist.checkpoint.shards import NAMES, Piece, Shard
from moe_dist.checkpoint.storage.manifest import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1, 500, 998, 999])
def test_one_value_in_a_thousand(dtype: torch.dtype, value: float, place: int) -> None:
    """Seen to fail without the infinities, and without the NaNs, of `check_finite`."""
    shard = Shard("x", [Piece("weights", (0, 0), (10, 100), NAMES[dtype], (10, 100))])
    (view,) = shard.views
    view.copy_(torch.randn(10, 100))
    shard.check_finite()
    view.view(-1)[place] = value
    with pytest.raises(CheckpointError, match="weights holds a value that is not finite"):
        shard.check_finite()


def test_what_cannot_be_infinite_is_let_pass() -> None:
    pieces = [
        Piece("count", (), (), "F32", ()),
        Piece("none", (0,), (0,), "F32", (0,)),
        Piece("n", (0,), (3,), "I64", (3,)),
    ]
    shard = Shard("x", pieces)
    for view in shard.views:
        view.fill_(7)
    shard.check_finite()
