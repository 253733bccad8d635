"""What could not be read, said at its size: how many documents, which share of the data, of which files."""

from __future__ import annotations

from collections.abc import Sequence

from moe_dist.data.corpus import SkippedDocument

MOST_FILES = 3


def losses(skipped: Sequence[SkippedDocument], kept: int | None) -> str:
    """One line about `skipped` beside `kept` documents that were read; None where nobody has counted them."""
    lost = sum(document.count or 0 for document in skipped)
    unknown = sum(document.count is None for document in skipped)
    share = "" if kept is None else f"of {kept + lost:,} documents ({_percent(lost, kept + lost)})"
    parts = [f"{lost:,} {share or 'documents'}"] if lost else []
    parts += [f"the rest of {unknown} file{'s' if unknown > 1 else ''} (of unknown size)"] if unknown else []
    files: dict[str, list[SkippedDocument]] = {}
    for document in skipped:
        files.setdefault(document.file, []).append(document)
    worst = sorted(files.items(), key=lambda item: -sum(1e18 if one.count is None else one.count for one in item[1]))
    named = "; ".join(_file(name, found) for name, found in worst[:MOST_FILES])
    more = f"; and {len(worst) - MOST_FILES} more files" if len(worst) > MOST_FILES else ""
    return f"{' and '.join(parts)} could not be read: {named}{more}"


def cut_off(truncated: Sequence[SkippedDocument]) -> str:
    """One line about conversations that were cut off to fit."""
    what = "1 conversation was" if len(truncated) == 1 else f"{len(truncated):,} conversations were"
    return f"{what} cut off at max_seq_length, the first: {truncated[0].reason}"


def _file(name: str, skipped: list[SkippedDocument]) -> str:
    lost = sum(document.count or 0 for document in skipped)
    first = next((document for document in skipped if document.count is None), skipped[0])
    return f"{name}: {f'{lost:,} documents, ' if lost > 1 else ''}{first.reason}"


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return "under 0.1 %" if share < 0.1 else f"{share:.1f} %" if share < 10 else f"{share:.0f} %"
