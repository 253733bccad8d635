"""What `moe-dist check` prints of a Hugging Face folder that training starts from."""

from __future__ import annotations

from moe_dist.config import Config, ConfigError
from moe_dist.parallel.layout import Layout
from moe_dist.pretrained.reading_plan import Reading, reading_plan
from moe_dist.train.run_summary import byte_size

_MOST_RANGES = 3


def plan_of(config: Config, world_size: int) -> list[Reading]:
    """What every rank reads. Raises ConfigError for a folder that is wrong."""
    try:
        return reading_plan(config, Layout.of(config, world_size))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def print_reading(config: Config, plan: list[Reading], *, in_detail: bool) -> None:
    """Bytes that each rank reads; `in_detail`: of which files, where."""
    print(f"\n{config.model.from_pretrained}: every tensor is there, in the shape of this model")
    for reading in plan:
        files = f"{len(reading.ranges)} file{'s' if len(reading.ranges) > 1 else ''}"
        print(
            f"  {_ranks(reading)} {'read' if len(reading.ranks) > 1 else 'reads'} {byte_size(reading.num_bytes)}: "
            f"{reading.num_tensors:,} tensors of {files}"
        )
        for file, ranges in reading.ranges.items() if in_detail else ():
            shown = " ".join(f"{start}-{end}" for start, end in ranges[:_MOST_RANGES])
            more = f" and {len(ranges) - _MOST_RANGES:,} more ranges" if len(ranges) > _MOST_RANGES else ""
            print(f"    {file}  {byte_size(sum(end - start for start, end in ranges))}  bytes {shown}{more}")


def _ranks(reading: Reading) -> str:
    ranks = ", ".join(map(str, reading.ranks[:8])) + (", ..." if len(reading.ranks) > 8 else "")
    return f"rank{'s' if len(reading.ranks) > 1 else ''} {ranks}"
