"""`lora.merge_and_save`: after a run with adapters, the model with them added, in a folder beside its checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.checkpoint.reading import locate
from moe_dist.checkpoint.storage import open_storage
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.config import Config
from moe_dist.parallel.status import Status
from moe_dist.train.result import TrainingResult

if TYPE_CHECKING:
    from moe_dist.pretrained.verification import Checked

_SIGN = 5.0
"""Seconds between two signs of life while a model is written."""


class MergeError(RuntimeError):
    """The run is saved, and its adapters could not be added to the model: the text says why, and how to do it."""


def merge(config: Config, result: TrainingResult, status: Status, say: Callable[[str], None]) -> Path | None:
    """Write what `moe-dist export --merge` writes of the weights that a run has ended with; None where it has not come
    to its end. One process does it, and the others wait for nothing.

    The folder is `merged-STEP` in `train.output_dir`, or where that is there `merged-STEP-2` and so on: nothing is
    overwritten. A start that had nothing left to do leaves it at what there is. Raises MergeError.
    """
    if not config.lora.merge_and_save or result.failed or result.signal is not None or result.weights is None:
        return None
    from moe_dist.pretrained.export import export

    found = locate(result.weights, open_storage("."))
    folder, number = config.train.output_dir / f"merged-{found.step}", 1
    if folder.exists() and not result.losses:
        say(f"merged: {folder} is there already")
        return folder
    while folder.exists():
        number += 1
        folder = folder.with_name(f"merged-{found.step}-{number}")
    problems: list[str] = []

    def note(check: Checked) -> None:
        problems.extend(f"{check.what}: {problem}" for problem in check.problems)

    try:
        with _alive(status):
            manifest, keys = found.storage.manifest(found.step), Keys(config.checkpoint.encryption_keys)
            done = export(found, manifest, keys, folder, merge=True, logits=False, on_check=note)
        if problems:
            raise ValueError(problems[0])
    except (OSError, ValueError, RuntimeError) as error:
        raise MergeError(
            f"lora.merge_and_save=true: {error}; the run is saved, and this tries again: moe-dist export {found} "
            f"--merge --output {folder}"
        ) from error
    size = f"{done.num_bytes / 1e6:,.1f} MB of {done.dtype}"
    say(f"merged: {found} with its model in {folder}: {done.model_type}, {size}; {'; '.join(done.notes)}")
    return folder


@contextmanager
def _alive(status: Status) -> Iterator[None]:
    """Whoever watches this rank hears that it goes on: a large model takes longer than a rank may stand still."""
    over = threading.Event()

    def tell() -> None:
        while not over.wait(_SIGN):
            status.alive()

    thread = threading.Thread(target=tell, name="merging", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
