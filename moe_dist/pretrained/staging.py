"""A folder that gets its name only when all in it is written and proven."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_dist.config import ConfigError


def refuse_existing(output: Path) -> None:
    """Raises ConfigError for a path at which there is something."""
    if os.path.lexists(output):
        raise ConfigError(f"--output {output}: is there already, and nothing is ever overwritten; give another folder")


class NewFolder:
    """`path`: where to write; `output`: what `publish` calls it."""

    def __init__(self, output: Path) -> None:
        self.output, self.path = output, output.with_name(f"{output.name}.partial")

    def publish(self) -> None:
        """Give it its name. Raises ConfigError where somebody else has taken that."""
        if os.path.lexists(self.output):
            raise ConfigError(f"--output {self.output}: has been made in the meantime; give another folder")
        self.path.rename(self.output)


@contextmanager
def new_folder(output: Path, made_by: str) -> Iterator[NewFolder]:
    """Inside, `DIR.partial` is there to be written; afterwards nothing of it, unless it was published.

    Raises ConfigError for an `output` that is there, and for what a process that was killed has left behind.
    """
    refuse_existing(output)
    folder = NewFolder(output)
    try:
        folder.path.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"{folder.path}: left behind by {made_by} that was stopped, unless one is writing it now; remove it"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)
