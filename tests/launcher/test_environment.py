"""What a starter leaves in the environment, and what cannot be."""

from __future__ import annotations

import pytest

from launcher.environment import Environment, detect, started_by_torchrun
from moe_dist.config_loading import ConfigError

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}


def test_alone() -> None:
    assert not started_by_torchrun({})
    assert detect({}) == Environment(rank=0, local_rank=0, world_size=1, local_world_size=1)
    assert not detect({}).is_distributed


def test_one_of_many() -> None:
    assert started_by_torchrun(TORCHRUN)
    assert detect(TORCHRUN) == Environment(rank=5, local_rank=1, world_size=8, local_world_size=4)
    assert detect(TORCHRUN).is_distributed


def test_a_world_of_one_needs_no_address() -> None:
    assert not detect({"RANK": "0", "WORLD_SIZE": "1"}).is_distributed


def test_without_local_variables_all_ranks_are_on_one_machine() -> None:
    ours = {name: value for name, value in TORCHRUN.items() if not name.startswith("LOCAL")}
    assert detect(ours) == Environment(rank=5, local_rank=5, world_size=8, local_world_size=8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": "8"}, "RANK=8: from 0 to 7"),
        ({"RANK": "-1"}, "RANK=-1: from 0 to 7"),
        ({"RANK": "first"}, "RANK=first: a whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=: a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4: from 0 to 3"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: from 0 to 3"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "soon"}, "MASTER_PORT=soon"),
        ({"RANK": None}, "RANK is not set, but WORLD_SIZE=8"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set, but RANK=5"),
    ],
    ids=str,
)
def test_contradictions_are_named(change: dict[str, str | None], said: str) -> None:
    environ = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        detect(environ)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
