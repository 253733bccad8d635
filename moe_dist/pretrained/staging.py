"""A folder that gets its name when all in it is written and proven, and of which else nothing is left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_dist.config import ConfigError


class Staging:
    """`folder`: where to write. `publish` gives it the name `output`; without that it is removed."""

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output.with_name(f"{output.name}.partial")

    def publish(self) -> None:
        """All is right. Raises ConfigError when somebody has made `output` meanwhile."""
        if os.path.lexists(self.output):
            raise ConfigError(f"--output {self.output}: has been made in the meantime; give another folder")
        self.folder.rename(self.output)


def refuse_existing(output: Path) -> None:
    """Raises ConfigError for a path at which there is something."""
    if os.path.lexists(output):
        raise ConfigError(f"--output {output}: is there already, and nothing is ever overwritten; give another folder")


@contextmanager
def staged(output: Path) -> Iterator[Staging]:
    """A new folder beside `output`. Raises ConfigError where that is there, or left behind."""
    refuse_existing(output)
    staging = Staging(output)
    try:
        staging.folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"{staging.folder}: left behind by an export that was stopped, unless one is writing it now; remove it"
        ) from None
    try:
        yield staging
    finally:
        shutil.rmtree(staging.folder, ignore_errors=True)
