"""A folder that gets its name only when all in it is written and proven."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_dist.config import ConfigError

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
)


def copy_tokenizer(source: Path, folder: Path) -> int:
    """Copy the files of a tokenizer that there are; returns how many."""
    there = [file for file in TOKENIZER_FILES if (source / file).is_file()]
    for file in there:
        shutil.copyfile(source / file, folder / file)
    return len(there)


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
    if os.path.lexists(output):
        raise ConfigError(f"--output {output}: is there already, and nothing is ever overwritten; give another folder")
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
