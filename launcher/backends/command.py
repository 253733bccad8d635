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
from moe_dist.plan.elastic import chosen_keys, first_batch, fitting, no_layout, replan

TRAIN = ("-m", "moe_dist", "train")
"""What `moe-dist train` is to a Python."""


def for_world(
    config: Config,
    world_size: int,
    notice: Callable[[str], None] = lambda text: None,
    *,
    per_host: int | None = None,
    elsewhere: bool = False,
) -> Config:
    """`config` as this many ranks can run it, `per_host` of them on each host. Raises ConfigError when they cannot.

    `elsewhere`: the ranks start on other machines than this one, whose devices are not known here: unless
    `launch.cluster` names them, `parallel.layout=auto` is left to those machines.
    """
    if elsewhere and config.parallel.layout == "auto" and config.launch.cluster is None:
        check_world(config, world_size, given_batch())
        notice(
            "parallel.layout=auto: chosen where the ranks start, by their devices (launch.cluster=h100 chooses it now)"
        )
        return config
    config, sentence = replan(config, world_size, given_batch(), this_job(), per_host)
    if sentence is not None:
        notice(sentence)
    Layout.of(config, world_size)
    return config


def check_world(config: Config, world_size: int, batch: int | None = None) -> None:
    """Raises ConfigError where no layout of so many ranks keeps the global batch. Nothing is chosen for `auto`."""
    if config.parallel.layout == "given":
        config, _ = replan(config, world_size, batch)
        Layout.of(config, world_size)
        return
    batch = batch or first_batch(config, world_size)
    if not fitting(config, [world_size], batch):
        raise no_layout(config, world_size, batch)


def chosen(config: Config) -> list[str]:
    """Words after a run file that keep what `parallel.layout=auto` has chosen; none where it has not."""
    return chosen_keys(config) if config.parallel.layout == "auto" and config.parallel.planned_ranks else []


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
