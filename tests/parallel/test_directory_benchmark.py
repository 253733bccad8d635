"""The benchmark of the experts' map finds every expert, and says so when it does not."""

from __future__ import annotations

import pytest
from patches import Replace

from moe_dist.parallel.layout import Layout
from tools.bench.directory import Computed, Network, measure, report, succeeded

NETWORK = Network(num_peers=12, num_experts=40, ep_size=4)


def test_every_expert_is_found_where_it_is_held() -> None:
    found = measure(NETWORK, Computed(NETWORK), batch_size=3)
    assert succeeded(found, NETWORK)
    assert (found["stores"], found["gets_right"], found["survived"]) == (120, 40, 12)
    assert "100.0% (120/120)" in report("computed", found, NETWORK)


@pytest.mark.parametrize(("block", "wrong"), [(range(10, 20), "gets_right"), (range(0), "stores")])
def test_a_rank_that_holds_something_else_is_no_success(block: range, wrong: str, replace: Replace) -> None:
    """The wrong term: the first ranks have the second's experts, or none."""
    right = Layout.experts_of

    def other(self: Layout, ep_rank: int, num_experts: int) -> range:
        return block if ep_rank == 0 else right(self, ep_rank, num_experts)

    replace(Layout, "experts_of", other)
    found = measure(NETWORK, Computed(NETWORK), batch_size=3)
    assert not succeeded(found, NETWORK)
    assert found[wrong] < {"gets_right": 40, "stores": 120}[wrong]
