"""What `moe-dist checkpoint` prints: tables for people, plain values for programs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_dist.checkpoint.config_diff import Change
from moe_dist.checkpoint.reading import CheckpointRef
from moe_dist.checkpoint.storage.manifest import Manifest
from moe_dist.checkpoint.tools.listing import Listed, Verdict

if TYPE_CHECKING:
    from moe_dist.checkpoint.tools.inspecting import Difference, Entry, Tensors

_SHORT = 12
"""Hexadecimal digits of a hash that people are shown."""


def size(count: float) -> str:
    """12 bytes, 3.4 MB."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def age(seconds: float | None) -> str:
    """4 min, 3.5 h."""
    if seconds is None:
        return "?"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}" if unit == "min" else f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def print_steps(where: str, rows: Sequence[Listed], leftovers: Mapping[str, int]) -> None:
    """One line per step."""
    if not rows:
        print(f"{where}: no checkpoint")
    else:
        table = _table("step", "state", "size", "shards", "layout", "metrics", "age", "encrypted", right=(0, 2, 3, 6))
        for row in rows:
            table.add_row(*map(escape, _step_cells(row)))
        print(where)
        _print(table)
        for row in rows:
            for line in row.problems:
                print(f"damaged: {line}")
    for name, taken in leftovers.items():
        print(f"left over from a save that was cut short: {name} ({size(taken)})")


def _step_cells(row: Listed) -> list[str]:
    manifest = row.manifest
    state = "damaged" if row.problems else "complete"
    if manifest is None:
        return [str(row.checkpoint.step), state, "?", "?", "?", "?", "?", "?"]
    layout = manifest.layout
    shape = " ".join(f"{axis} {layout[axis]}" for axis in ("pp", "edp", "ep") if axis in layout)
    metrics = " ".join(f"{name}={value:.4f}" for name, value in sorted(manifest.metrics.items())) or "-"
    sealed = "no" if manifest.encryption is None else f"key {manifest.encryption.key_id[:8]}"
    shards = str(len(manifest.files) - 1)
    return [str(manifest.step), state, size(manifest.num_bytes), shards, shape, metrics, age(row.age_seconds), sealed]


def step_as_json(row: Listed) -> dict[str, Any]:
    """The same for programs."""
    manifest = row.manifest
    found: dict[str, Any] = {"step": row.checkpoint.step, "path": str(row.checkpoint), "problems": row.problems}
    if manifest is not None:
        found |= {
            "bytes": manifest.num_bytes,
            "shards": len(manifest.files) - 1,
            "layout": manifest.layout,
            "metrics": manifest.metrics,
            "created": manifest.created,
            "age_seconds": row.age_seconds,
            "run": manifest.run,
            "generation": manifest.generation,
            "key_id": manifest.encryption and manifest.encryption.key_id,
        }
    return found


def print_verdicts(where: str, verdicts: Mapping[CheckpointRef, Verdict]) -> None:
    """A line per step and per problem, and one that sums up."""
    for found, (wrong, note) in verdicts.items():
        said = "ok" if not wrong else f"{len(wrong)} problems" if len(wrong) > 1 else "1 problem"
        print(f"{found.folder}: {said}{f' ({note})' if note else ''}")
        for line in wrong:
            print(f"  {line}")
    bad = [found.folder for found, verdict in verdicts.items() if verdict.problems]
    count = len(verdicts)
    noun = "checkpoint" if count == 1 else "checkpoints"
    print(f"{where}: {count - len(bad)} of {count} {noun} verified{'; not ' + ', '.join(bad) if bad else ''}")


def print_tensors(
    found: CheckpointRef, manifest: Manifest, listing: Iterable[Entry], experts: bool, everything: bool
) -> None:
    """Tensors one per line; stacks of experts summed up, or with `experts` one line per expert."""
    plain: list[Entry] = []
    stacks: dict[str, list[Entry]] = {}
    hidden: list[Entry] = []
    for entry in listing:
        if not everything and not entry.name.startswith("model."):
            hidden.append(entry)
        elif entry.expert is None:
            plain.append(entry)
        else:
            stacks.setdefault(entry.name, []).append(entry)
    layout = " ".join(f"{axis} {count}" for axis, count in sorted(manifest.layout.items()))
    print(f"{found}: step {manifest.step}, run {manifest.run} start {manifest.generation}, written under {layout}")
    table = _table("tensor", "type", "shape", "norm", "sha256", right=(3,))
    for entry in sorted(plain, key=lambda entry: natural(entry.name)):
        table.add_row(escape(entry.name), entry.dtype, _shape(entry.shape), f"{entry.norm:.5g}", entry.sha256[:_SHORT])
    _print(table)
    if stacks and experts:
        table = _table("experts of", "expert", "type", "shape", "norm", "sha256", right=(1, 4))
        for name in sorted(stacks, key=natural):
            for one in stacks[name]:
                cells = [one.dtype, _shape(one.shape), f"{one.norm:.5g}", one.sha256[:_SHORT]]
                table.add_row(escape(name), str(one.expert), *cells)
        _print(table)
    elif stacks:
        columns = ("experts of", "count", "type", "shape", "least norm", "mean", "greatest norm")
        table = _table(*columns, right=(1, 4, 5, 6))
        for name in sorted(stacks, key=natural):
            parts = stacks[name]
            low, high = min(parts, key=lambda e: e.norm), max(parts, key=lambda e: e.norm)
            mean = sum(part.norm for part in parts) / len(parts)
            ends = [f"{end.norm:.5g} (E{end.expert:02d})" for end in (low, high)]
            cells = [str(len(parts)), low.dtype, _shape(low.shape), ends[0], f"{mean:.5g}", ends[1]]
            table.add_row(escape(name), *cells)
        _print(table)
        print("--experts shows each one")
    if hidden:
        print(f"and {len({entry.name for entry in hidden})} tensors of the optimizer: --all")


def tensors_as_json(listing: Iterable[Entry]) -> list[dict[str, Any]]:
    """Every tensor and expert."""
    return [{**entry._asdict(), "shape": list(entry.shape)} for entry in listing]


def print_differences(one: Tensors, other: Tensors, found: Sequence[Difference], keys: Sequence[Change]) -> None:
    """Tensors and experts that differ, the model before the optimizer, then the configuration."""
    total = len(one.manifest.tensors)
    names = {row.name for row in found}
    print(f"{one.found} and {other.found}: {len(names)} of {total} tensors differ")
    if found:
        table = _table("tensor", "expert", "relative L2 difference", right=(1, 2))
        for row in sorted(found, key=lambda row: (natural(row.name), row.expert or 0)):
            if row.name.startswith("model."):
                table.add_row(escape(row.name), *_difference_cells(row))
        _print(table)
        state = {row.name for row in found if not row.name.startswith("model.")}
        if state:
            worst = max((row.relative or 0.0, row.name) for row in found if row.name in state)
            print(f"and {len(state)} tensors of the optimizer, the most in {worst[1]} ({worst[0]:.3g}); --json has all")
    for change in keys:
        print(f"configured otherwise: {change.key}: {change.before} -> {change.now}")
    if not keys:
        print("configured alike")


def _difference_cells(row: Difference) -> tuple[str, str]:
    expert = "" if row.expert is None else str(row.expert)
    return expert, row.reason or f"{row.relative:.3g}"


def difference_as_json(row: Difference) -> dict[str, Any]:
    """`relative` null: cannot be subtracted, or the first is all zeros."""
    relative = row.relative if row.relative is not None and row.relative != float("inf") else None
    return {**row._asdict(), "relative": relative}


def natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _table(*columns: str, right: tuple[int, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, header_style="dim", justify="right" if index in right else "left", overflow="fold")
    return table


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe has no width: what is grepped for must be on one line
        console = Console(highlight=False, width=240)
    console.print(table)
