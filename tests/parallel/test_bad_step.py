"""Trap 9: one bad number in one expert of one rank, and every rank skips the step."""

from __future__ import annotations

import parity
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import micro_batches

from moe_dist.parallel.engines.fsdp import FSDPEngine
from moe_dist.verify.trial import Trial

pytestmark = pytest.mark.dist


def with_infinity_in_an_expert(overrides: tuple[str, ...], pp_size: int) -> tuple[bool, bool]:
    """A step in which a gradient of an expert of rank 3 is infinite: (skipped, nothing moved) here."""
    trial = Trial(*parity.on_layout(overrides, 2, 8, pp_size))
    before, names = trial.weights, sorted(trial.model.expert_parameter_names())
    # The step is skipped for what this puts in, or not at all.
    if dist.get_rank() == 3 and isinstance(trial.engine, FSDPEngine):
        trial.engine.reduce = lambda: trial.engine.views[names[0]].flatten()[:1].fill_(float("inf"))
    elif dist.get_rank() == 3:
        factor = torch.ones(dict(trial.model.named_parameters())[names[0]].shape)
        factor.view(-1)[0] = float("inf")
        dict(trial.model.named_parameters())[names[0]].register_hook(lambda gradient: gradient * factor)
    skipped = trial.step(trial.share(micro_batches(8)), 0, 1e-2).skipped
    return skipped, all(torch.equal(before[name], value) for name, value in trial.weights.items())


@pytest.mark.parametrize(
    ("overrides", "pp_size"),
    [
        ((), 1),
        (("parallel.zero_stage=1",), 1),
        (("parallel.zero_stage=3",), 1),
        (("model.num_hidden_layers=4",), 2),
        (("model.num_hidden_layers=4", "parallel.zero_stage=1"), 2),
        (("parallel.engine=deepspeed", "parallel.zero_stage=1"), 1),
        (("parallel.engine=deepspeed", "parallel.zero_stage=2"), 1),
    ],
    ids=["zero 0", "zero 1", "zero 3", "pp 2", "pp 2, zero 1", "DeepSpeed 1", "DeepSpeed 2"],
)
def test_all_ranks_skip_with_one_expert(overrides: tuple[str, ...], pp_size: int) -> None:
    """Seen to fail without the norm's sum over `ep` (over `pp`, `dp` for DeepSpeed): some ranks updated, some not."""
    assert run_ranks(with_infinity_in_an_expert, 4, overrides, pp_size) == [(True, True)] * 4
