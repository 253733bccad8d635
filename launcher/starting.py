"""A command that starts a training, with the variables it needs: to be shown, or to be run. Imports no torch."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from typing import NoReturn

from moe_dist.config_loading import ConfigError

TRAIN = ("-m", "launcher", "train")
"""What `moe-dist train` is to a Python."""


@dataclass(frozen=True)
class Start:
    """A command and the variables it is given besides those that are there."""

    variables: dict[str, str]
    command: tuple[str, ...]

    def __str__(self) -> str:
        """As one types it into a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*variables, shlex.join(self.command)])

    def become(self) -> NoReturn:
        """This process becomes the command. Raises ConfigError when there is no such program."""
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            os.execvpe(self.command[0], self.command, {**os.environ, **self.variables})
        except OSError as error:
            raise ConfigError(f"{self.command[0]}: {error.strerror}") from error
