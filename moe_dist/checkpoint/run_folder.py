"""What runs have written into a run folder: all else in there is somebody's, and is not touched. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from moe_dist.checkpoint.lock import FILE, LAST_STEP
from moe_dist.checkpoint.storage import LocalStorage, set_aside_name, step_folder
from moe_dist.checkpoint.storage.manifest import CheckpointError

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
REFERENCE = "reference.safetensors"
"""Log-probabilities of preferences under the start of a run."""
_WRITTEN_OVER = (CONFIG, METRICS, REFERENCE, "targets.json")
"""Files of which a run does not keep what it finds, or not all of it."""
_KEPT = ("train.log", "logs/rank-*.log", "tb/**/events.out.tfevents.*", "report.html", "profile.html", LAST_STEP)
_HEADER = re.compile(r"# Written by moe-dist for run ([0-9a-f]+), sha256 ([0-9a-f]{64}): [^\n]*\n")


def with_header(text: str, run: str) -> str:
    """config.yaml of a run: with a first line that tells whose it is, and whether a person has edited it."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"# Written by moe-dist for run {run}, sha256 {digest}: edit a copy, a run writes this file anew\n{text}"


def _run_of(config: Path) -> str | None:
    """The run that has written a config.yaml; None when none has, or somebody has edited it since."""
    with suppress(OSError, UnicodeDecodeError):
        text = "" if config.is_symlink() else config.read_bytes().decode()
        match = _HEADER.match(text)
        if match and hashlib.sha256(text[match.end() :].encode()).hexdigest() == match[2]:
            return match[1]
    return None


def _is_as_noted(folder: Path) -> bool:
    """Whether config.yaml is what a start of the run noted beside it, to the letter: from before the first line."""
    with suppress(OSError, ValueError, AttributeError):
        text = (folder / CONFIG).read_text()
        with (folder / METRICS).open("rb") as lines:
            return any(b'"kind": "run"' in line and json.loads(line).get("config_text") == text for line in lines)
    return False


def refuse_foreign(folder: Path, run: str | None) -> None:
    """Raises CheckpointError naming a file that a run would write over, and that no run has written.

    `run`: whose folder this is; None when there has never been one, or its lock was not copied with the folder.
    """
    config = folder / CONFIG
    if os.path.lexists(config):
        wrote = _run_of(config)
        if wrote is None and run is not None and _is_as_noted(folder):
            return
        copied = run is None and wrote is not None and (folder / METRICS).is_file()
        if wrote is None or (wrote != run and not copied):
            what = "is not as a run has written it there" if run is not None else "was not written by a run"
            raise CheckpointError(
                f"train.output_dir={folder}: {config} {what}, and this run would write over it: rename it, or "
                "choose another train.output_dir"
            )
        return
    found = [name for name in _WRITTEN_OVER if run is None and os.path.lexists(folder / name)]
    if found:
        raise CheckpointError(
            f"train.output_dir={folder}: {folder / found[0]} was not written by a run, and this run would change it: "
            "rename it, or choose another train.output_dir"
        )


def move_earlier_run(folder: Path) -> Path | None:
    """Move what earlier runs have written into a new folder inside `folder`, and return that; None: there is nothing.

    All of it or nothing: raises CheckpointError naming what cannot be moved. Folders that are links are not followed.
    """
    entries = _own_entries(folder)
    if not entries:
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (f"earlier-{stamp}{suffix}" for suffix in ("", *(f"-{number}" for number in range(1, 1000))))
    aside = next(path for name in names if not os.path.lexists(path := folder / name))
    moved: list[Path] = []
    entry = Path(".")
    try:
        aside.mkdir()
        for entry in entries:
            (aside / entry).parent.mkdir(parents=True, exist_ok=True)
            os.rename(folder / entry, aside / entry)
            moved.append(entry)
        shutil.copyfile(folder / FILE, aside / FILE)  # it can be gone on with, there
    except OSError as error:
        for back in reversed(moved):
            os.rename(aside / back, folder / back)
        (aside / FILE).unlink(missing_ok=True)
        _remove_empty_folders(aside, entries)
        with suppress(OSError):
            aside.rmdir()
        raise CheckpointError(
            f"checkpoint.resume=never: {folder / entry} cannot be moved into {aside}: {error.strerror}; move it "
            "yourself, or choose another train.output_dir"
        ) from error
    _remove_empty_folders(folder, moved)
    return aside


def _own_entries(folder: Path) -> list[Path]:
    """Paths inside `folder`, the checkpoints first."""
    storage = LocalStorage(folder)
    with suppress(FileNotFoundError):
        names = sorted(os.listdir(folder))
        paths = [folder / step_folder(step) for step in storage.candidates() if storage.is_ours(step)]
        paths += [folder / name for name in names if set_aside_name(name)]
        paths += [path for pattern in (*_WRITTEN_OVER, *_KEPT) for path in sorted(folder.glob(pattern))]
        return [path.relative_to(folder) for path in paths if _is_plain(path, folder)]
    return []


def _is_plain(path: Path, folder: Path) -> bool:
    """Whether neither a file nor a folder on the way to it is a link."""
    between = [path, *(above for above in path.parents if above.is_relative_to(folder) and above != folder)]
    return not any(one.is_symlink() for one in between)


def _remove_empty_folders(folder: Path, entries: Iterable[Path]) -> None:
    """Remove the folders in which these entries lay as far as nothing is in them now."""
    for parent in sorted({above for entry in entries for above in entry.parents} - {Path(".")}, reverse=True):
        with suppress(OSError):
            (folder / parent).rmdir()
