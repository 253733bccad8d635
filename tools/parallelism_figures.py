"""The figures of docs/parallelism.md: when each rank of a pipeline computes, and what each rank holds.

    python tools/parallelism_figures.py            both, as the page shows them

Orders are those of PyTorch's schedules, played with stages of equal length and forward, input gradients and weight
gradients of equal length; bytes are those of `moe-dist check`.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_dist.config import Config, load_config, load_mapping
from moe_dist.parallel.layout import Layout, pp_rank_of_stage
from moe_dist.parallel.pipeline import _SCHEDULES
from moe_dist.parallel.state_bytes import state_bytes

RANKS, MICRO_BATCHES = 4, 8
MODEL, WORLD, UNIT = "qwen3_30b_a3b.yaml", 16, 7e9
UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}
MARKS = {"B": "#", "I": "-", "W": "+"}
Order = list[tuple[str, int, int]]
"""(F, B, I or W; stage; micro-batch) as one rank runs them. B is I and W in one piece."""


def order_of_every_rank(config: Config) -> list[Order]:
    """As PyTorch runs them; needs a process group of `pp_size`, real or not."""
    places, count = pp_rank_of_stage(config), config.train.gradient_accumulation_steps
    if config.parallel.schedule == "1f1b":  # what PyTorch tells of this one leaves the first forward pass out
        return [list(_one_forward_one_backward(rank, len(places), count)) for rank in places]
    hidden = torch.empty(1, device="meta")
    mine = [
        PipelineStage(torch.nn.Identity(), stage, len(places), torch.device("cpu"), hidden, hidden)
        for stage, place in enumerate(places)
        if place == 0
    ]
    several = config.parallel.stages_per_rank > 1
    schedule = _SCHEDULES[config.parallel.schedule](mine if several else mine[0], count, loss_fn=lambda *_: None)
    return [list(_computations(actions)) for _, actions in sorted(schedule.pipeline_order.items())]


def _one_forward_one_backward(rank: int, num_stages: int, count: int) -> Iterator[tuple[str, int, int]]:
    ahead = min(count, num_stages - rank)
    yield from (("F", rank, number) for number in range(ahead))
    for number in range(count):
        yield "B", rank, number
        if number + ahead < count:
            yield "F", rank, number + ahead


def _computations(actions: Iterable[Any]) -> Iterator[tuple[str, int, int]]:
    for action in actions:
        if action is not None and action.sub_actions:  # DualPipeV means these to overlap; here one after the other
            yield from _computations(action.sub_actions)
        elif action is not None and action.computation_type.value in UNITS:
            yield action.computation_type.value, action.stage_index, action.microbatch_index


def timeline(orders: list[Order], num_stages: int, length: int) -> list[str]:
    """A line for each rank: every action as soon as its rank is free and what it needs is there. `length`: of F."""
    ends: dict[tuple[str, int, int], int] = {}
    lines, waiting = [""] * len(orders), [list(order) for order in orders]

    def start(kind: str, stage: int, number: int) -> int | None:
        if kind == "F":
            need = ("F", stage - 1, number) if stage else None
        elif kind == "W":
            need = ("I", stage, number)
        else:
            need = ("I", stage + 1, number) if stage < num_stages - 1 else ("F", stage, number)
        return 0 if need is None else ends.get(need)

    while any(waiting):
        before = len(ends)
        for rank, order in enumerate(waiting):
            while order and (begin := start(*order[0])) is not None:
                kind, stage, number = order.pop(0)
                mark = MARKS.get(kind, (string.digits + string.ascii_lowercase)[number])
                lines[rank] = lines[rank].ljust(begin, ".") + mark * UNITS[kind] * length
                ends["I" if kind == "B" else kind, stage, number] = len(lines[rank])
        assert len(ends) > before, "the ranks wait for each other"
    return [line.ljust(max(map(len, lines)), ".") for line in lines]


def schedules() -> str:
    """Every schedule on RANKS ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    blocks = []
    for name in _SCHEDULES:
        tree = {
            "model": {"num_hidden_layers": 2 * RANKS},
            "parallel": {"pp_size": RANKS, "schedule": name},
            "train": {"gradient_accumulation_steps": MICRO_BATCHES},
        }
        config = load_mapping(tree, (), notice=lambda text: None)
        # One stage on a rank is as long as two.
        lines = timeline(order_of_every_rank(config), config.parallel.num_stages, 2 // config.parallel.stages_per_rank)
        idle = sum(line.count(".") for line in lines) / sum(map(len, lines))
        blocks.append("\n".join([f"{name}, {idle:.0%} idle", *(f"  rank {n}  {line}" for n, line in enumerate(lines))]))
    dist.destroy_process_group()
    return "\n\n".join(blocks)


def memory() -> str:
    """Bytes of weights (w), gradients (g) and optimizer (o) on each of WORLD ranks, by ep_size and zero_stage."""
    config = load_config(Path(__file__).parents[1] / "configs" / MODEL, (), notice=lambda text: None)
    lines = []
    for ep_size in (1, 8):
        for zero_stage in (0, 1):
            config.parallel.ep_size, config.parallel.zero_stage = ep_size, zero_stage
            (held,) = state_bytes(config, Layout(WORLD, 1, ep_size))
            bar = "".join(
                mark * round(size / UNIT)
                for mark, size in (("w", held.weights), ("g", held.gradients), ("o", held.optimizer))
            )
            stages = "1, 2, 3" if zero_stage else "0"
            lines.append(f"ep {ep_size}  zero {stages:<8}{held.total / 1e9:>7.1f} GB  {bar}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(schedules(), memory(), sep="\n\n")
