"""`say("export", run, "-o", folder)`: a command of moe-dist in this process."""

from __future__ import annotations

import sys

import pytest
from command_line import Said, Say

from launcher.cli import commands


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["moe-dist", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            code = commands.run()
        except SystemExit as end:  # typer.Exit of a command that is not standalone returns its code
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return call
