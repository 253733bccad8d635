"""Standard output whose reader has gone, as in `moe-dist check CONFIG | head -1`. Imports nothing of others."""

from __future__ import annotations

import os
import select
import signal
import sys

EXIT_PIPE = 128 + signal.SIGPIPE
"""As a shell tells of a program that SIGPIPE has ended. Training goes on without a reader, and never ends so."""


class Output:
    """Standard output as it is at the start: libraries put /dev/null in its place and end with 1, without a word."""

    def __init__(self) -> None:
        self._copy = os.dup(1)

    def has_no_reader(self) -> bool:
        """Whether nobody can read what is printed. From then on that goes nowhere, also what is still buffered."""
        poll = select.poll()
        poll.register(self._copy, 0)
        if not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
            return False
        mute(1)
        return True


def mute(number: int) -> None:
    """Point a stream to /dev/null: the interpreter writes what is left when it ends, and would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def complain(text: str) -> None:
    """One line on standard error, wherever that leads: who has asked for something gets at least the exit code."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        mute(2)


def clean(text: str) -> str:
    """What a model has written, for standard output: a terminal gets a dot for each character that could steer it."""
    if not sys.stdout.isatty():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else "·" for char in text)
