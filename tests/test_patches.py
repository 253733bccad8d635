"""What a test puts in the place of a function must be called, or the test proves nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from patches import replaced

FILES = sorted(Path(__file__).parent.rglob("*.py"))


def test_what_nothing_calls_is_a_failure() -> None:
    thing = SimpleNamespace(answer=lambda: 1)
    with replaced(thing, "answer", lambda: 2):
        assert thing.answer() == 2
    assert thing.answer() == 1
    with pytest.raises(AssertionError, match=r"answer of .* nothing has called"), replaced(thing, "answer", lambda: 2):
        pass
    with pytest.raises(KeyError), replaced(thing, "answer", lambda: 2):
        raise KeyError  # not hidden


def replacements(tree: ast.Module) -> Iterator[ast.expr]:
    """What is handed to `monkeypatch.setattr` and `patch.object`."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        if (of, node.func.attr) in {("monkeypatch", "setattr"), ("patch", "setattr"), ("patch", "object")}:
            yield node.args[-1]


def unwatched(source: str) -> list[int]:
    """Lines that replace a function without `replaced` or the fixture `replace`; not those that forbid a call."""
    tree = ast.parse(source)
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return [
        value.lineno
        for value in replacements(tree)
        if (isinstance(value, ast.Lambda) and "pytest.fail(" not in ast.unparse(value.body))
        or {name.id for name in (value, getattr(value, "func", None)) if isinstance(name, ast.Name)} & functions
    ]


def test_no_function_is_replaced_unwatched() -> None:
    files = [file for file in FILES if file.name != "patches.py"]
    found = [f"{file.name}:{line}" for file in files for line in unwatched(file.read_text())]
    assert found == [], "the fixture `replace` or patches.replaced says whether it was called"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("monkeypatch.setattr(a, 'b', lambda: 1)", [1]),
        ("monkeypatch.setattr('a.b', lambda: 1)", [1]),
        ("with patch.object(a, 'b', wrong): pass\ndef wrong(): pass", [1]),
        ("monkeypatch.setattr(a, 'b', wrong_by(2))\ndef wrong_by(n): return lambda: n", [1]),
        ("monkeypatch.setattr(a, 'b', 0.1)", []),
        ("monkeypatch.setattr(a, 'b', lambda: pytest.fail('begun'))", []),
    ],
)
def test_what_is_found(line: str, found: list[int]) -> None:
    assert unwatched(line) == found
