"""Which device a rank gets, on a machine that says it has GPUs."""

from __future__ import annotations

import pytest
import torch

from moe_dist.config import LaunchConfig
from moe_dist.parallel.device import choose_device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append("is_available") or True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: asked.append("device_count") or 2)
    return asked


def test_more_ranks_than_gpus(two_gpus: list[str]) -> None:
    """NCCL takes one rank per device; gloo, asked for by name, lets ranks share one."""
    with pytest.raises(ValueError, match=r"rank 5 needs CUDA device 2, this machine has 2; .*launch\.backend=gloo"):
        choose_device(LaunchConfig(), rank=5, local_rank=2)
    shared = [choose_device(LaunchConfig(backend="gloo"), local_rank=rank).index for rank in range(4)]
    assert shared == [0, 1, 0, 1]
    assert choose_device(LaunchConfig(device="cpu"), local_rank=3).type == "cpu"
    assert set(two_gpus) == {"is_available", "device_count"}
