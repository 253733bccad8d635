"""The arithmetic of the mesh: every axis cuts the ranks into groups, and the axes fit each other."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config import Config, ConfigError
from moe_dist.parallel.layout import Axis, GridRow, Layout, describe

SIZES = st.integers(1, 6)
LAYOUTS = st.builds(lambda pp, edp, ep: Layout(pp * edp * ep, pp, ep), SIZES, SIZES, SIZES)
AXES: tuple[Axis, ...] = ("pp", "dp", "edp", "ep")


@given(LAYOUTS)
def test_sizes_multiply(layout: Layout) -> None:
    assert layout.pp_size * layout.edp_size * layout.ep_size == layout.world_size
    assert layout.dp_size == layout.edp_size * layout.ep_size


@given(LAYOUTS)
def test_coordinates_and_ranks_are_each_other_backwards(layout: Layout) -> None:
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert places == sorted(places)
    assert [layout.rank_at(*place) for place in places] == list(range(layout.world_size))
    for pp, edp, ep in places:
        assert pp in range(layout.pp_size)
        assert edp in range(layout.edp_size)
        assert ep in range(layout.ep_size)


@given(LAYOUTS)
def test_the_groups_of_an_axis_partition_the_ranks(layout: Layout) -> None:
    sizes = (layout.pp_size, layout.dp_size, layout.edp_size, layout.ep_size)
    for axis, size in zip(AXES, sizes, strict=True):
        groups = layout.groups(axis)
        assert {len(group) for group in groups} == {size}
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert all(group == sorted(group) for group in groups)


@given(LAYOUTS)
def test_members_of_a_group_differ_in_one_coordinate(layout: Layout) -> None:
    for axis, position in (("pp", 0), ("edp", 1), ("ep", 2)):
        for group in layout.groups(axis):  # type: ignore[arg-type]
            places = [layout.coordinates(rank) for rank in group]
            assert [place[position] for place in places] == list(range(len(group)))
            assert len({place[:position] + place[position + 1 :] for place in places}) == 1


@given(LAYOUTS)
def test_ep_groups_are_neighbours_and_dp_is_edp_times_ep(layout: Layout) -> None:
    for group in layout.groups("ep"):
        assert group == list(range(group[0], group[0] + layout.ep_size))
    for stage, group in enumerate(layout.groups("dp")):
        inside = [ep for ep in layout.groups("ep") if layout.coordinates(ep[0])[0] == stage]
        across = [edp for edp in layout.groups("edp") if layout.coordinates(edp[0])[0] == stage]
        assert sorted(chain(*inside)) == sorted(chain(*across)) == group
        assert all(len(set(one) & set(other)) == 1 for one in inside for other in across)
        assert [layout.dp_index(rank) for rank in group] == list(range(layout.dp_size))


@given(LAYOUTS, SIZES)
def test_the_ranks_of_an_ep_group_hold_each_expert_once(layout: Layout, share: int) -> None:
    num_experts = share * layout.ep_size
    blocks = [layout.experts_of(ep, num_experts) for ep in range(layout.ep_size)]
    assert [expert for block in blocks for expert in block] == list(range(num_experts))
    assert {len(block) for block in blocks} == {share}


def test_a_layout_as_a_table() -> None:
    grid = describe(Layout(world_size=8, pp_size=2, ep_size=2), num_experts=6)
    assert grid.experts == (range(3), range(3, 6))
    assert grid.rows == (
        GridRow(0, 0, (0, 1)),
        GridRow(0, 1, (2, 3)),
        GridRow(1, 0, (4, 5)),
        GridRow(1, 1, (6, 7)),
    )


def test_what_a_world_can_hold() -> None:
    config = Config.model_validate({"parallel": {"ep_size": 4}})
    assert Layout.of(config, 8) == Layout(8, 1, 4)
    with pytest.raises(ConfigError) as caught:
        Layout.of(config, 6)
    assert str(caught.value) == (
        "world_size=6: not a multiple of parallel.pp_size=1 x parallel.ep_size=4; "
        "allowed: 4, 8, 12, ... ranks, or parallel.ep_size one of 1, 2"
    )


def test_what_sharding_asks_of_a_world() -> None:
    hybrid = Config.model_validate({"parallel": {"zero_stage": 3, "shard_size": 4}})
    assert Layout.of(hybrid, 8) == Layout(8)
    with pytest.raises(ConfigError, match=r"parallel\.shard_size=4: must divide the 6 replicas"):
        Layout.of(hybrid, 6)
    deepspeed = Config.model_validate({"parallel": {"zero_stage": 1, "engine": "deepspeed"}})
    assert Layout.of(deepspeed, 2) == Layout(2)
    with pytest.raises(ConfigError, match=r"parallel\.engine=deepspeed: needs two ranks or more"):
        Layout.of(deepspeed, 1)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (lambda: Layout(0), "world_size=0: a whole number above 0"),
        (lambda: Layout(4, ep_size=-2), "ep_size=-2: a whole number above 0"),
        (lambda: Layout(6, pp_size=2, ep_size=2), "allowed: 4, 8, 12"),
        (lambda: Layout(4).coordinates(4), "rank=4: from 0 to 3"),
        (lambda: Layout(4).groups("tp"), "axis='tp': one of pp, dp, edp, ep"),  # type: ignore[arg-type]
        (lambda: Layout(4, ep_size=4).experts_of(4, 8), "ep_rank=4: from 0 to 3"),
        (lambda: describe(Layout(4, ep_size=4), 6), "num_experts=6: not a multiple of ep_size=4"),
    ],
)
def test_impossible_questions_name_what_is_allowed(layout: object, message: str) -> None:
    assert callable(layout)
    with pytest.raises(ValueError) as caught:
        layout()
    assert message in str(caught.value)


def test_commands_built_on_this_answer_without_torch() -> None:
    modules = "moe_dist.config, moe_dist.parallel.layout, moe_dist.models.counts"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0
