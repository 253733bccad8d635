"""Token arrays kept on disk between runs, and shared by the processes of one machine."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moe_dist.data.corpus import SkippedDocument

KEPT_SECONDS = 30 * 24 * 3600.0
"""After the last start that has used them."""
Stored = tuple[
    npt.NDArray[Any], npt.NDArray[np.int64], list[SkippedDocument], npt.NDArray[np.int32] | None, list[SkippedDocument]
]


class CacheEntry:
    """The files of one packed corpus: tokens, document starts, labels where it has some, and a JSON file that makes
    them valid.

    Several processes may save the same entry at once: each file is written aside and renamed, and the JSON
    file comes last, so a reader sees a whole entry or none.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder
        self._tokens = folder / f"{key}.tokens.npy"
        self._starts = folder / f"{key}.starts.npy"
        self._labels = folder / f"{key}.labels.npy"
        self._facts = folder / f"{key}.json"

    def load(self) -> Stored | None:
        """The stored arrays mapped read-only, or None when there is no whole entry."""
        try:
            facts = json.loads(self._facts.read_text(encoding="utf-8"))
            tokens = np.load(self._tokens, mmap_mode="r")
            starts = np.load(self._starts)
            skipped = [SkippedDocument(**item) for item in facts["skipped"]]
            truncated = [SkippedDocument(**item) for item in facts["truncated"]]
            labels = np.load(self._labels, mmap_mode="r") if facts["labels"] else None
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ):  # missing, cut short, or of another version: made anew
            return None
        if len(tokens) != facts.get("num_tokens") or len(starts) != facts.get("num_documents"):
            return None
        if labels is not None and len(labels) != len(tokens):
            return None
        with suppress(OSError):  # of somebody else, or read-only
            for path in (self._tokens, self._starts, self._labels, self._facts):
                if labels is not None or path != self._labels:
                    os.utime(path)
        return tokens, starts, skipped, labels, truncated

    def save(
        self,
        tokens: npt.NDArray[Any],
        starts: npt.NDArray[np.int64],
        skipped: Sequence[SkippedDocument],
        labels: npt.NDArray[np.int32] | None = None,
        truncated: Sequence[SkippedDocument] = (),
    ) -> None:
        """Write the entry; raises OSError where the folder cannot be written."""
        self._folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "num_tokens": len(tokens),
            "num_documents": len(starts),
            "skipped": [asdict(item) for item in skipped],
            "truncated": [asdict(item) for item in truncated],
            "labels": labels is not None,
        }
        _write_aside(self._tokens, lambda file: np.save(file, tokens))
        _write_aside(self._starts, lambda file: np.save(file, starts))
        if labels is not None:
            _write_aside(self._labels, lambda file: np.save(file, labels))
        _write_aside(self._facts, lambda file: file.write(json.dumps(facts).encode()))
        self._forget_old_ones()

    def _forget_old_ones(self) -> None:
        """Leave out what nobody has read for a month, also what a process that was killed had begun."""
        for path in self._folder.iterdir():
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    path.unlink()


def _write_aside(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
