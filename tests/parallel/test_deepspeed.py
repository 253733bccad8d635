"""The DeepSpeed engine computes what one process computes: ep x ZeRO stage, accumulation, offload, options."""

from __future__ import annotations

import pytest
from parity import TOLERANCE, deviations, reference
from ranks import run_ranks
from tiny import train_and_tell

pytestmark = pytest.mark.dist


def compare(overrides: tuple[str, ...], ep_size: int, num_micro_batches: int, *engine: str) -> dict[str, float]:
    """Largest deviations of DeepSpeed on four ranks from our own engine in one process."""
    wanted = reference(overrides, num_micro_batches)
    overrides = (*overrides, "parallel.engine=deepspeed", *engine)
    worst: dict[str, float] = {}
    for found in run_ranks(train_and_tell, 4, overrides, ep_size, num_micro_batches):
        for key, value in deviations(found, wanted).items():
            worst[key] = max(worst.get(key, 0.0), value)
    return worst


@pytest.mark.parametrize("num_micro_batches", [4, 8], ids=["plain", "accumulated"])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_stages_agree_with_one_process(zero_stage: int, ep_size: int, num_micro_batches: int) -> None:
    worst = compare((), ep_size, num_micro_batches, f"parallel.zero_stage={zero_stage}")
    assert worst["initial"] == 0.0
    assert max(worst.values()) < TOLERANCE, worst
