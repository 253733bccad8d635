"""Which rank is where: the arithmetic of the mesh, without a process group.

Ranks are counted with ep fastest, then edp, then pp slowest:

    rank = (pp * edp_size + edp) * ep_size + ep          dp = edp * ep_size + ep

`ep` ranks share out the experts of every layer, `edp` ranks hold the same experts and see different data, and
their product `dp` is the number of replicas of everything that is not an expert. Neighbouring ranks are an ep
group, because its all-to-all is the traffic that profits most from the fast links inside a machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from moe_dist.config import Config, ConfigError
from moe_dist.models.counts import split_layers

Axis = Literal["pp", "dp", "edp", "ep"]


@dataclass(frozen=True)
class Layout:
    """`world_size` ranks as pp x edp x ep. Raises ConfigError when they do not come out even."""

    world_size: int
    pp_size: int = 1
    ep_size: int = 1

    def __post_init__(self) -> None:
        for key in ("world_size", "pp_size", "ep_size"):
            value = getattr(self, key)
            if value < 1:
                raise ConfigError(f"{key}={value}: a whole number above 0")
        share = self.pp_size * self.ep_size
        if self.world_size % share:
            raise ConfigError(
                f"world_size={self.world_size}: not a multiple of parallel.pp_size={self.pp_size} x "
                f"parallel.ep_size={self.ep_size}; allowed: {share}, {2 * share}, {3 * share}, ... ranks"
            )

    @classmethod
    def of(cls, config: Config, world_size: int) -> Layout:
        """The layout a configuration asks for on this many ranks.

        Raises ConfigError with the world sizes, and the ep_size values, that would do instead, and for sharding that
        this many ranks cannot do.
        """
        pp_size, ep_size, num_experts = (
            config.parallel.pp_size,
            config.parallel.ep_size,
            config.model.num_experts,
        )
        try:
            layout = cls(world_size, pp_size, ep_size)
        except ConfigError as error:
            per_stage = world_size // pp_size if world_size % pp_size == 0 else 0
            ep_sizes = [n for n in range(1, min(per_stage, 4096) + 1) if per_stage % n == num_experts % n == 0]
            hint = f", or parallel.ep_size one of {', '.join(map(str, ep_sizes))}" if ep_sizes else ""
            raise ConfigError(f"{error}{hint}") from None
        shard_size = config.parallel.shard_size
        if shard_size is not None and layout.dp_size % shard_size:
            raise ConfigError(f"parallel.shard_size={shard_size}: must divide the {layout.dp_size} replicas (dp)")
        if config.parallel.engine == "deepspeed" and world_size == 1:
            raise ConfigError("parallel.engine=deepspeed: needs two ranks or more; allowed for one process: torch")
        return layout

    @property
    def dp_size(self) -> int:
        """Replicas of what is not an expert."""
        return self.world_size // self.pp_size

    @property
    def edp_size(self) -> int:
        """Replicas of each expert."""
        return self.dp_size // self.ep_size

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pp, edp, ep) of a rank; raises ValueError for a rank outside the world."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank={rank}: from 0 to {self.world_size - 1} (world_size={self.world_size})")
        rest, ep = divmod(rank, self.ep_size)
        pp, edp = divmod(rest, self.edp_size)
        return pp, edp, ep

    def rank_at(self, pp: int, edp: int, ep: int) -> int:
        """The rank at these coordinates: `coordinates` backwards."""
        return (pp * self.edp_size + edp) * self.ep_size + ep

    def dp_index(self, rank: int) -> int:
        """Which of the dp_size replicas a rank is: the slice of the global batch it reads."""
        _, edp, ep = self.coordinates(rank)
        return edp * self.ep_size + ep

    def groups(self, axis: Axis) -> list[list[int]]:
        """All groups of one axis: ranks that differ in that coordinate only, in its order."""
        pps, edps, eps = range(self.pp_size), range(self.edp_size), range(self.ep_size)
        if axis == "pp":
            return [[self.rank_at(pp, edp, ep) for pp in pps] for edp in edps for ep in eps]
        if axis == "dp":
            return [[self.rank_at(pp, edp, ep) for edp in edps for ep in eps] for pp in pps]
        if axis == "edp":
            return [[self.rank_at(pp, edp, ep) for edp in edps] for pp in pps for ep in eps]
        if axis == "ep":
            return [[self.rank_at(pp, edp, ep) for ep in eps] for pp in pps for edp in edps]
        raise ValueError(f"axis={axis!r}: one of {', '.join(get_args(Axis))}")

    def experts_of(self, ep_rank: int, num_experts: int) -> range:
        """Ids of the experts that ep rank `ep_rank` holds of a layer: a contiguous block.

        Raises ValueError for an ep rank outside the group, or experts that ep_size does not divide.
        """
        if not 0 <= ep_rank < self.ep_size:
            raise ValueError(f"ep_rank={ep_rank}: from 0 to {self.ep_size - 1} (ep_size={self.ep_size})")
        if num_experts % self.ep_size:
            raise ValueError(f"num_experts={num_experts}: not a multiple of ep_size={self.ep_size}")
        share = num_experts // self.ep_size
        return range(ep_rank * share, (ep_rank + 1) * share)


def refuse_unplanned(config: Config, world_size: int) -> None:
    """Raises ConfigError where `parallel.layout=auto` has not chosen for this many ranks: commands do, at the start."""
    parallel = config.parallel
    if parallel.layout == "auto" and parallel.planned_ranks != world_size:
        raise ConfigError(
            f"parallel.layout=auto: no layout has been chosen for {world_size} ranks; moe-dist train chooses one, and "
            f"in a program moe_dist.plan.elastic.replan(config, {world_size})"
        )


def stages_of(config: Config) -> list[range]:
    """Layers of every pipeline stage, first to last: as `parallel.stages` says, or balanced."""
    if config.parallel.stages is None:
        return split_layers(config.model, config.parallel.num_stages)
    ends = [sum(config.parallel.stages[: count + 1]) for count in range(len(config.parallel.stages))]
    return [range(end - size, end) for size, end in zip(config.parallel.stages, ends, strict=True)]


def pp_rank_of_stage(config: Config) -> list[int]:
    """The `pp` coordinate that runs each stage: round and round, or down and up again for schedules in V shape."""
    parallel = config.parallel
    numbers = list(range(parallel.pp_size))
    if parallel.schedule in ("zero_bubble", "dualpipe_v"):
        return numbers + numbers[::-1] if parallel.pp_size > 1 else numbers
    return numbers * parallel.stages_per_rank


def layers_by_pp_rank(config: Config) -> list[list[range]]:
    """For each `pp` coordinate the layers of its stages."""
    pairs = list(zip(pp_rank_of_stage(config), stages_of(config), strict=True))
    return [[layers for owner, layers in pairs if owner == pp_rank] for pp_rank in range(config.parallel.pp_size)]


@dataclass(frozen=True)
class GridRow:
    """One ep group: the ranks of one pipeline stage and one expert replica, by ep coordinate."""

    pp: int
    edp: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """A layout as a table: rows are (pp, edp), columns are ep, and each column holds `experts[column]`."""

    layout: Layout
    experts: tuple[range, ...]
    rows: tuple[GridRow, ...]


def describe(layout: Layout, num_experts: int) -> Grid:
    """The layout as plain data for whoever prints it; raises ValueError as `Layout.experts_of` does."""
    experts = tuple(layout.experts_of(ep, num_experts) for ep in range(layout.ep_size))
    rows = tuple(GridRow(*layout.coordinates(group[0])[:2], tuple(group)) for group in layout.groups("ep"))
    return Grid(layout, experts, rows)
