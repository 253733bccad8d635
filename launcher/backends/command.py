"""A command that starts a training, with the variables it needs: to be shown, or to be run. Imports no torch."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from launcher.connect.environment import given_batch, this_job
from moe_dist.config import Config, ConfigError
from moe_dist.parallel.layout import Layout
from moe_dist.train.elastic import replan

TRAIN = ("-m", "moe_dist", "train")
"""What `moe-dist train` is to a Python."""


def for_world(config: Config, world_size: int, notice: Callable[[str], None] = lambda text: None) -> Config:
    """`config` as this many ranks can run it. Raises ConfigError when they cannot."""
    config, sentence = replan(config, world_size, given_batch(), this_job())
    if sentence is not None:
        notice(sentence)
    Layout.of(config, world_size)
    return config


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
