"""Which device a rank gets, on a machine that says it has GPUs."""

from __future__ import annotations

import pytest
import torch
from patches import Replace

from moe_dist.config import LaunchConfig
from moe_dist.parallel.device import choose_device


def test_more_ranks_than_gpus(replace: Replace) -> None:
    """NCCL takes one rank per device; gloo, asked for by name, lets ranks share one."""
    replace(torch.cuda, "is_available", lambda: True)
    replace(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"rank 5 needs CUDA device 2, this machine has 2; .*launch\.backend=gloo"):
        choose_device(LaunchConfig(), rank=5, local_rank=2)
    shared = [choose_device(LaunchConfig(backend="gloo"), local_rank=rank).index for rank in range(4)]
    assert shared == [0, 1, 0, 1]
    assert choose_device(LaunchConfig(device="cpu"), local_rank=3).type == "cpu"
