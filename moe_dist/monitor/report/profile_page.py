"""`profile.html` and its short form on the terminal: where the time and the memory of a step go."""

from __future__ import annotations

import html
import string
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.monitor.rank_facts import PHASE_KEYS
from moe_dist.monitor.sinks.text import compact, memory
from moe_dist.parallel.flight import ALL, Overlap
from moe_dist.parallel.state_bytes import StateBytes

PAGE = Path(__file__).with_name("profile_page.html")
ALL_TO_ALL = "all-to-all"


@dataclass(frozen=True)
class PartTime:
    """A part of the model; `layer` None: not of a layer."""

    layer: int | None
    name: str
    direction: str
    """`forward` or `backward`."""
    seconds: float
    """Per step, without parts inside it."""


@dataclass(frozen=True)
class Operator:
    """An operator of PyTorch, per step."""

    name: str
    calls: float
    seconds: float
    """Its own, without operators inside it."""


@dataclass(frozen=True)
class RankProfile:
    """What one rank has measured, per step."""

    rank: int
    phases: dict[str, float]
    """Seconds, by the keys of PHASE_KEYS."""
    parts: list[PartTime]
    operators: list[Operator]
    """Those with most seconds."""
    sent_bytes: int
    """By all-to-all to other ranks."""
    state: StateBytes | None
    """Measured; None where nobody can."""
    predicted: StateBytes
    """By the formulas of docs/parallelism.md."""
    saved: list[tuple[int | None, str, int]]
    """(layer, part, bytes) kept from forward for backward."""
    peak_bytes: int
    """Peak of the allocator; 0 on CPU."""
    layers: list[int]
    """Numbers of the layers on this rank."""
    overlap: list[Overlap]
    """Messages waited for and hidden, per step, all of them last; empty where nobody can see them."""


@dataclass(frozen=True)
class Profile:
    """A profile of all ranks."""

    sentence: str
    layout: list[str]
    steps: int
    tokens_per_step: int
    flops_per_token: int
    device: str
    ranks: list[RankProfile]
    with_compute: bool
    with_memory: bool

    @property
    def step_seconds(self) -> float:
        """Mean over ranks of all phases of a step."""
        return sum(sum(rank.phases.values()) for rank in self.ranks) / len(self.ranks)

    def phases(self) -> dict[str, float]:
        """Seconds of a step by the name of the phase, mean over ranks; those with any."""
        means = {
            name: sum(rank.phases[key] for rank in self.ranks) / len(self.ranks) for key, name in PHASE_KEYS.items()
        }
        return {name: seconds for name, seconds in means.items() if seconds}

    def parts(self) -> dict[tuple[int | None, str], dict[str, float]]:
        """Seconds of a step by (layer, part) and direction, mean over the ranks that have the part."""
        found: dict[tuple[int | None, str], dict[str, float]] = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
        holders: dict[tuple[int | None, str], set[int]] = defaultdict(set)
        for rank in self.ranks:
            for part in rank.parts:
                found[part.layer, part.name][part.direction] += part.seconds
                holders[part.layer, part.name].add(rank.rank)
        return {
            key: {direction: seconds / len(holders[key]) for direction, seconds in both.items()}
            for key, both in sorted(found.items(), key=lambda item: (item[0][0] is None, item[0][0] or 0, item[0][1]))
        }

    def talking(self) -> tuple[float, float]:
        """Seconds of a step in all-to-all, and in all other parts of the model, mean over ranks."""
        talk = sum(part.seconds for rank in self.ranks for part in rank.parts if part.name == ALL_TO_ALL)
        total = sum(part.seconds for rank in self.ranks for part in rank.parts)
        return talk / len(self.ranks), (total - talk) / len(self.ranks)

    def overlap(self) -> list[Overlap]:
        """Messages by layer and kind, mean over the ranks that have any; all of them last."""
        found: dict[tuple[int | None, str], list[Overlap]] = defaultdict(list)
        for rank in self.ranks:
            for one in rank.overlap:
                if one.exposed or one.hidden:
                    found[one.layer, one.kind].append(one)
        means = [
            Overlap(*key, *(sum(column) / len(ones) for column in list(zip(*ones, strict=True))[2:]))
            for key, ones in found.items()
        ]
        return sorted(means, key=lambda one: (one.kind == ALL, one.layer is None, one.layer or 0, one.kind))


def terminal_lines(profile: Profile) -> list[str]:
    """The short form: phases, layers, all-to-all, memory."""
    of_memory = f"  memory of rank 0            {_state_words(profile.ranks[0])}"
    if not profile.with_compute:
        return [of_memory]
    step = profile.step_seconds
    lines = [
        f"{profile.steps} steps, {1000 * step:.1f} ms each, {compact(profile.tokens_per_step / step)} tokens/s",
        "",
    ]
    for name, seconds in sorted(profile.phases().items(), key=lambda item: -item[1]):
        lines.append(f"  {name:<26}{1000 * seconds:>10.2f} ms {seconds / step:>6.1%}")
    lines += ["", f"  {'part':<26}{'forward':>10} ms {'backward':>10} ms, all layers"]
    by_name: dict[str, dict[str, float]] = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for (_, name), both in profile.parts().items():
        for direction, seconds in both.items():
            by_name[name][direction] += seconds
    for name, both in sorted(by_name.items(), key=lambda item: -sum(item[1].values())):
        lines.append(f"  {name:<26}{1000 * both['forward']:>10.2f}    {1000 * both['backward']:>10.2f}")
    talk, compute = profile.talking()
    lines += ["", f"  all-to-all against compute  {1000 * talk:.2f} ms : {1000 * compute:.2f} ms"]
    if messages := profile.overlap():
        lines += ["", f"  {'messages':<26}{'waited for':>10} ms {'hidden':>10} ms"]
        for one in messages:
            numbers = f"{1000 * one.exposed:>10.2f}    {1000 * one.hidden:>10.2f} {one.share:>9.1%}"
            lines.append(f"  {_messages(one):<26}{numbers}")
    return [*lines, of_memory]


def _messages(one: Overlap) -> str:
    return one.kind if one.layer is None else f"layer {one.layer}, {one.kind}"


def _state_words(rank: RankProfile) -> str:
    state = rank.state or rank.predicted
    parts = [f"{memory(getattr(state, kind))} {kind}" for kind in ("weights", "gradients", "optimizer")]
    saved = sum(size for _, _, size in rank.saved)
    return ", ".join(parts + ([f"{memory(saved)} activations"] if saved else []))


def write_page(profile: Profile, path: Path) -> None:
    """The page: one file, no script, no network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = string.Template(PAGE.read_text(encoding="utf-8")).substitute(
        sentence=_text(profile.sentence),
        layout=_text("\n".join(profile.layout)),
        lead=_text(_lead(profile)),
        **{name: table(profile) if profile.with_compute else _NOT_TIMED for name, table in _TIMES.items()},
        memory=_memory_table(profile),
        saved=_saved_table(profile),
    )
    path.write_text(text, encoding="utf-8")


def _lead(profile: Profile) -> str:
    if not profile.with_compute:
        return f"Steps of {profile.tokens_per_step:,} tokens; no time was measured."
    step = profile.step_seconds
    flops = profile.flops_per_token * profile.tokens_per_step / step
    return (
        f"{profile.steps} steps of {profile.tokens_per_step:,} tokens: {1000 * step:.1f} ms a step, "
        f"{profile.tokens_per_step / step:,.0f} tokens per second, {flops / 1e9:,.1f} GFLOP/s by the model's active "
        "parameters. Times are per step; profiling itself costs some of them."
    )


def _phase_table(profile: Profile) -> str:
    step = profile.step_seconds
    rows = []
    for key, name in PHASE_KEYS.items():
        seconds = profile.phases().get(name, 0.0)
        if seconds:
            each = [f"{1000 * rank.phases[key]:.2f}" for rank in profile.ranks[:8]]
            rows.append([name, _bar(seconds / step), f"{1000 * seconds:.2f}", f"{seconds / step:.1%}", *each])
    ranks = [f"rank {rank.rank}" for rank in profile.ranks[:8]]
    return _table(["phase", "", "ms, mean of ranks", "share", *ranks], rows)


def _talk_table(profile: Profile) -> str:
    rows = []
    for rank in profile.ranks:
        talk = sum(part.seconds for part in rank.parts if part.name == ALL_TO_ALL)
        total = sum(part.seconds for part in rank.parts)
        share = talk / total if total else 0.0
        numbers = [f"{1000 * talk:.2f}", f"{1000 * (total - talk):.2f}", f"{share:.1%}", memory(rank.sent_bytes)]
        rows.append([f"rank {rank.rank}", _bar(share), *numbers])
    return _table(["", "", "all-to-all, ms", "compute, ms", "all-to-all share", "sent to others"], rows)


def _overlap_table(profile: Profile) -> str:
    rows = []
    for one in profile.overlap():
        numbers = [f"{1000 * one.exposed:.3f}", f"{1000 * one.hidden:.3f}", f"{one.share:.1%}"]
        rows.append([_messages(one), _bar(one.share), *numbers])
    if not rows:
        return "<p>None were seen: nobody is there to send to, or the host does not see when they land (CUDA).</p>"
    return _table(["messages", "", "waited for, ms", "hidden, ms", "hidden of both"], rows)


def _part_table(profile: Profile) -> str:
    parts = profile.parts()
    whole = sum(sum(both.values()) for both in parts.values()) or 1.0
    rows = []
    for layer in dict.fromkeys(layer for layer, _ in parts):
        inside = {name: both for (number, name), both in parts.items() if number == layer}
        total = {way: sum(both[way] for both in inside.values()) for way in ("forward", "backward")}
        title = "not of a layer" if layer is None else f"layer {layer}"
        rows.append([f"<b>{title}</b>", *_times(total, whole)])
        ordered = sorted(inside.items(), key=lambda item: -sum(item[1].values()))
        rows += [[f"&emsp;{_text(name)}", *_times(both, whole)] for name, both in ordered]
    return _table(["part", "", "forward, ms", "backward, ms", "share of the model"], rows)


def _times(both: dict[str, float], whole: float) -> list[str]:
    share = sum(both.values()) / whole
    return [_bar(share), f"{1000 * both['forward']:.3f}", f"{1000 * both['backward']:.3f}", f"{share:.1%}"]


def _operator_table(profile: Profile) -> str:
    first = profile.ranks[0].operators
    whole = profile.step_seconds
    rows = [
        [_text(one.name), _bar(one.seconds / whole), f"{one.calls:.1f}", f"{1000 * one.seconds:.3f}"] for one in first
    ]
    return _table(["operator, rank 0", "", "calls", "own time, ms"], rows)


def _memory_table(profile: Profile) -> str:
    rows = []
    for rank in profile.ranks:
        saved = sum(size for _, _, size in rank.saved)
        for owner in ("weights", "gradients", "optimizer"):
            predicted = getattr(rank.predicted, owner)
            measured = "-" if rank.state is None else f"{getattr(rank.state, owner):,}"
            rows.append([f"rank {rank.rank}", owner, measured, f"{predicted:,}", memory(predicted)])
        if profile.with_memory:
            rows.append([f"rank {rank.rank}", "activations", f"{saved:,}", "-", memory(saved)])
            if rank.peak_bytes:
                rows.append([f"rank {rank.rank}", "peak", f"{rank.peak_bytes:,}", "-", memory(rank.peak_bytes)])
    return _table(["", "owner", "bytes, measured", "bytes, by formula", ""], rows)


def _saved_table(profile: Profile) -> str:
    if not profile.with_memory:
        return "<p>Run with --memory to see what each part keeps for backward.</p>"
    total = sum(size for _, _, size in profile.ranks[0].saved) or 1
    rows = [
        ["-" if layer is None else str(layer), _text(name), _bar(size / total), f"{size:,}", f"{size / total:.1%}"]
        for layer, name, size in sorted(profile.ranks[0].saved, key=lambda one: -one[2])
    ]
    return _table(["layer", "part, rank 0", "", "bytes kept for backward", "share"], rows)


_TIMES = {
    "phases": _phase_table,
    "talk": _talk_table,
    "overlap": _overlap_table,
    "parts": _part_table,
    "operators": _operator_table,
}
"""Sections that need --compute."""
_NOT_TIMED = "<p>Run with --compute to see where the time goes.</p>"


def _bar(share: float) -> str:
    width = 100 * min(1.0, max(0.0, share))
    return f'<span class="bar" aria-hidden="true"><span style="width:{width:.1f}%"></span></span>'


def _text(words: object) -> str:
    return html.escape(str(words))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; whoever gives them escapes them."""
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in titles)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
