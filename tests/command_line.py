"""What a command says and how it ends, in this process: the fixture `say` is in conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Said(NamedTuple):
    code: int
    out: str
    err: str


Say = Callable[..., Said]
