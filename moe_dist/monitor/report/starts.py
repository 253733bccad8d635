"""Every start of a run: when, on how many ranks, in which layout, and how it ended."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import yaml

from moe_dist.monitor.run_log import Row, RunLog

TITLES = ("start", "time (UTC)", "first step", "ranks", "layout", "batch", "how it ended")


def starts_table(run: RunLog) -> list[list[str]]:
    """A row for each start, with the TITLES; what `parallel.elastic` has planned anew is in layout and batch."""
    rows: list[list[str]] = []
    steps = [start["step"] for start in run.starts]
    for row in run.endings:
        if row["kind"] == "run":
            rows.append([*_facts(len(rows) + 1, row, steps[len(rows)]), "no end was logged"])
        elif row["kind"] in ("failure", "summary") and rows:
            rows[-1][-1] = row["reason"]
    return rows


def _facts(number: int, start: Row, step: int | None) -> list[str]:
    moment = datetime.fromtimestamp(start["time"], UTC).strftime("%Y-%m-%d %H:%M:%S") if "time" in start else "-"
    # The last line of the grid is the layout in words, with what it means for dense parameters.
    layout = (start.get("layout") or ["-"])[-1].partition(";")[0]
    settings: Any = yaml.safe_load(start.get("config_text", "")) or {}
    train = settings.get("train", {})
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    batch = " x ".join(str(train[key]) for key in keys if key in train)
    if len(train.keys() & set(keys)) == 2 and start.get("world_size"):
        pp_size = settings.get("parallel", {}).get("pp_size", 1)
        replicas = start["world_size"] // pp_size
        batch += f" x {replicas} = {train[keys[0]] * train[keys[1]] * replicas}"
    first = "-" if step is None else f"{step:,}"
    return [str(number), moment, first, f"{start['world_size']} on {start['device']}", layout, batch or "-"]
