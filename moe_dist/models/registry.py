"""Names for classes, so that a YAML file can choose a person's own router or expert."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Generic, TypeVar, cast

T = TypeVar("T", bound=Callable)


class Registry(Generic[T]):
    """Registered names, and `package.module:Class` for anything importable."""

    def __init__(self, key: str, what: str) -> None:
        self.key, self.what = key, what
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make a class available under `name` in the configuration."""

        def add(entry: T) -> T:
            if self._entries.setdefault(name, entry) is not entry:
                raise ValueError(f"{self.key}={name}: a {self.what} of that name is registered already")
            return entry

        return add

    def resolve(self, name: str) -> T:
        """The class called `name`. Raises ValueError naming what is known."""
        if name in self._entries:
            return self._entries[name]
        if ":" in name:
            module_name, _, attribute = name.partition(":")
            try:
                return cast(T, getattr(importlib.import_module(module_name), attribute))
            except (ImportError, AttributeError) as error:
                raise ValueError(f"{self.key}={name}: cannot be imported ({error})") from error
        near = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"{self.key}={name}: known are {', '.join(sorted(self._entries))}, or package.module:Class{hint}"
        )
