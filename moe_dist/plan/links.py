"""Seconds of collectives, by which ranks of a group share a host: ranks are numbered with ep fastest, then edp, then pp
(`moe_dist/parallel/layout.py`), and hosts hold consecutive ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_dist.parallel.layout import Layout
from moe_dist.plan.cluster import Cluster


@dataclass(frozen=True)
class Group:
    """`size` ranks, `together` of them on each host (the smallest such number)."""

    size: int
    together: int

    @property
    def crosses(self) -> bool:
        return self.together < self.size


def group_of(layout: Layout, axis: str, per_host: int, size: int | None = None) -> Group:
    """Groups along `ep`, `edp`, `dp` or `pp`; `size`: of parts of them that are neighbours along the axis."""
    stride = {"ep": 1, "dp": 1, "edp": layout.ep_size, "pp": layout.dp_size}[axis]
    whole = {"ep": layout.ep_size, "dp": layout.dp_size, "edp": layout.edp_size, "pp": layout.pp_size}[axis]
    size = size or whole
    if stride >= per_host:
        return Group(size, 1)
    together = max(1, per_host // stride)
    if together >= size:
        # A group that does not begin where a host does is cut where the host ends.
        span = stride * size
        return (
            Group(size, size) if per_host % span == 0 or layout.world_size <= per_host else Group(size, size // 2 or 1)
        )
    return Group(size, together)


def exchange(group: Group, sent: float, cluster: Cluster) -> float:
    """Seconds of an all-to-all; `sent`: bytes that one rank sends to the others of the group."""
    if group.size == 1:
        return 0.0
    inside = sent * (group.together - 1) / (group.size - 1)
    outside = sent - inside
    link, network = _bandwidths(cluster)
    seconds = max(inside / link, outside / network)
    return seconds + _latency(group, cluster)


def half_all_reduce(group: Group, size: float, cluster: Cluster, pieces: int = 1) -> float:
    """Seconds of an all-gather or a reduce-scatter of `size` bytes of one rank's whole: half an all-reduce. They travel
    in `pieces`, each a collective of its own."""
    if group.size == 1:
        return 0.0
    link, network = _bandwidths(cluster)
    hosts = math.ceil(group.size / group.together)
    inside = size * (group.together - 1) / group.together / link
    outside = size / group.together * (hosts - 1) / hosts / network
    return inside + outside + pieces * _latency(group, cluster)


def send(crosses: bool, size: float, cluster: Cluster) -> float:
    """Seconds of one message to a neighbour."""
    link, network = _bandwidths(cluster)
    return size / (network if crosses else link) + (cluster.network_latency if crosses else cluster.link_latency)


def _bandwidths(cluster: Cluster) -> tuple[float, float]:
    network = min(cluster.network_bandwidth, cluster.link_bandwidth)
    return cluster.link_bandwidth * cluster.link_efficiency, network * cluster.link_efficiency


def _latency(group: Group, cluster: Cluster) -> float:
    return (cluster.network_latency if group.crosses else cluster.link_latency) * (1 + math.log2(group.size)) / 2
