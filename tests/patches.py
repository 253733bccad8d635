"""A function in the place of another for a while, and a failure where nothing has called it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

Replace = Callable[[Any, str, Callable[..., Any]], None]
"""The fixture `replace` (conftest.py): owner, name, what comes in its place until the test ends."""


@contextmanager
def replaced(owner: Any, name: str, wrong: Callable[..., Any]) -> Iterator[None]:
    """Inside, `owner.name` is `wrong`. Raises AssertionError in the end when it was never called: a test that watches
    or breaks what nothing runs any more would pass for ever.
    """
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return wrong(*arguments, **options)

    with patch.object(owner, name, counted):
        yield
    assert calls, f"{name} of {owner}: nothing has called what the test put in its place"
