"""Learning-rate schedules: warm-up, shape, floor, time budget."""

from __future__ import annotations

import pytest

from moe_dist.config import OptimizerConfig, TrainConfig
from moe_dist.train.schedule import learning_rate
from moe_dist.train.stopping import Pace, last_sample


def rates(total: int = 100, **options: object) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, **options)
    return [learning_rate(config, step, total) for step in range(total)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "cosine_with_restarts"])
def test_ends_at_the_floor_and_never_below(kind: str) -> None:
    found = rates(lr_scheduler_type=kind, warmup_steps=10)
    assert found[-1] == pytest.approx(0.1)
    assert max(found) == pytest.approx(1.0)
    assert min(found[10:]) >= 0.1 - 1e-12
    assert found[0] == pytest.approx(1 / 11)
    assert found[:10] == sorted(found[:10])


def test_cosine_half_way() -> None:
    assert rates(total=101, lr_scheduler_type="cosine")[50] == pytest.approx(0.55)
    assert rates(total=101, lr_scheduler_type="linear")[50] == pytest.approx(0.55)


def test_constant() -> None:
    assert set(rates(lr_scheduler_type="constant")) == {1.0}


def test_restarts_return_to_the_peak() -> None:
    found = rates(total=101, lr_scheduler_type="cosine_with_restarts", num_cycles=2)
    assert found[50] == pytest.approx(1.0)
    assert found[49] < 0.11


def test_restarts_come_at_their_step() -> None:
    """Trap 37. Seen to fail with the remainder of a product of floats: 1/49 of the run was still in its first cycle."""
    for cycles in (3, 7, 49, 98):
        found = rates(total=2 * cycles + 1, lr_scheduler_type="cosine_with_restarts", num_cycles=cycles)
        assert found[:-1:2] == pytest.approx([1.0] * cycles)
        assert found[-1] == pytest.approx(0.1)


def test_warmup_and_epochs_are_of_the_number_that_was_written() -> None:
    """Trap 37. Seen to fail with `ceil` of a product of floats: 8 steps of warm-up for 0.07 of 100."""
    for percent in range(1, 100):
        for total in (10, 100):
            wanted = -(-percent * total // 100)
            found = rates(total=total, warmup_ratio=percent / 100, lr_scheduler_type="constant")
            assert sum(rate < 1.0 for rate in found) == wanted
            epochs = TrainConfig(num_train_epochs=percent / 10)
            assert last_sample(epochs, Pace(4, total)) == -(-percent * total // 10)


def test_warmup_ratio_and_steps() -> None:
    assert rates(total=1000, warmup_ratio=0.03)[29] < max(rates(total=1000, warmup_ratio=0.03)) == 1.0
    assert rates(total=1000, warmup_ratio=0.03, warmup_steps=7) == rates(total=1000, warmup_steps=7)


def test_time_budget_moves_the_schedule() -> None:
    """Without a number of steps the clock is the progress; with both, whichever is further."""
    config = OptimizerConfig(learning_rate=1.0, lr_scheduler_type="linear")
    assert learning_rate(config, 5, None, time_share=0.25) == pytest.approx(0.75)
    assert learning_rate(config, 5, 1000, time_share=0.5) == pytest.approx(0.5)
    assert learning_rate(config, 999, 1000, time_share=0.5) == 0.0


@pytest.mark.parametrize("total", [None, 1000, 60], ids=["time alone", "time ends first", "steps end first"])
def test_warmup_ratio_is_of_whatever_ends_first(total: int | None) -> None:
    """Up for a tenth of the run, then down to the floor. Seen to fail with the ratio taken of the steps alone: without
    steps there was no warm-up, and a run that the clock ends long before its steps was warm-up to the end."""
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_ratio=0.1, lr_scheduler_type="linear")
    steps = 100 if total is None else min(100, total)
    found = [learning_rate(config, step, total, time_share=(step + 1) / 100) for step in range(steps)]
    top = found.index(max(found))
    assert top == pytest.approx(steps / 10, abs=1)
    assert max(found) == pytest.approx(1.0, abs=0.02)
    assert found[:top] == sorted(found[:top])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert found[-1] == pytest.approx(0.1, abs=0.02)
