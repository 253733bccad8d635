"""Where documents come from: files and rows, each read only when its turn comes.

A source yields `Entry` objects in one fixed order. Reading an entry gives a text (or token ids) or raises
`Unreadable`; the `Corpus` above decides whether that skips the document or stops the run.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, NoReturn, Protocol

from moe_dist.data.chat_template import Overlong
from moe_dist.data.columns import Wanted
from moe_dist.data.tokenised import TokenRow

READ_ERRORS = (OSError, EOFError, zlib.error)
ROWS_PER_READ = 256


class Unreadable(Exception):
    """What cannot be read: where (`where`, `offset` counted in `unit`), why, and how many documents that are.

    `count` is None for the rest of a file when nobody knows how much that was. `stops`: it may not be left out.
    """

    def __init__(
        self, where: str, unit: str, offset: int, reason: str, count: int | None = 1, stops: bool = False
    ) -> None:
        super().__init__(f"{where}, {unit} {offset}: {reason}")
        self.where, self.unit, self.offset, self.reason, self.count = where, unit, offset, reason, count
        self.stops = stops


@dataclass(frozen=True)
class Entry:
    """A document not read yet; `read()` gives its text or its tokens, or raises `Unreadable`."""

    id: str
    read: Callable[[], str | TokenRow]


class Source(Protocol):
    """Entries in a fixed order, from any point of it.

    `fingerprint` changes when the content may have changed (None: unknown). `state()` is what
    `entries(state=...)` needs to go on right after the entry handed out last; None means that the number of
    entries handed out, given as `start`, is enough.
    """

    fingerprint: str | None

    def entries(self, start: int = 0, state: Any = None) -> Iterator[Entry]: ...

    def state(self) -> Any: ...


def fail(error: Unreadable) -> NoReturn:
    """The `read` of an entry already known to be unreadable."""
    raise error


def open_bytes(path: str) -> IO[bytes]:
    """`path` opened for reading, decompressed when its name ends in .gz."""
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def decode_utf8(raw: bytes, where: str, offset: int = 0) -> str:
    """`raw` as text; raises `Unreadable` with the offset of the first bad byte, counted from `offset`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = "truncated inside a UTF-8 character" if "unexpected end" in error.reason else "not UTF-8 text"
        raise Unreadable(where, "byte", offset + error.start, f"{reason} ({error.reason})") from None


def read_text_file(path: str) -> str:
    """The whole file as text, line ends untouched, a leading byte order mark dropped."""
    chunks: list[bytes] = []
    try:
        with open_bytes(path) as file:
            while chunk := file.read(1 << 20):
                chunks.append(chunk)
    except READ_ERRORS as error:
        raise Unreadable(path, "byte", sum(map(len, chunks)), f"cannot be read ({error})") from None
    return decode_utf8(b"".join(chunks), path).removeprefix("\ufeff")


def value_of_row(row: Any, wanted: Wanted, where: str, unit: str, offset: int) -> str | TokenRow:
    """What `wanted` reads of `row`; raises `Unreadable`."""
    try:
        value = wanted.value(row)
    except ValueError as error:
        raise Unreadable(where, unit, offset, str(error), stops=isinstance(error, Overlong)) from None
    if isinstance(value, TokenRow) and value.note:
        return value._replace(note=f"{where}, {unit} {offset}: {value.note}")
    return value


class FileSource:
    """One document per text file."""

    def __init__(self, files: Sequence[tuple[str, str]], fingerprint: str | None = None) -> None:
        """`files`: (document id, path) in the order to read them."""
        self._files = files
        self.fingerprint = fingerprint

    def entries(self, start: int = 0, state: Any = None) -> Iterator[Entry]:
        for id_, path in self._files[start:]:
            yield Entry(id_, partial(read_text_file, path))

    def state(self) -> Any:
        return None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two roles or contents of a turn JSON would quietly take the last."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice!r} is given twice")
    return dict(pairs)


def parse_json_line(raw: bytes, path: str, line: int, offset: int, wanted: Wanted) -> str | TokenRow:
    """The document on one line of a JSONL file; raises `Unreadable` naming file, line and byte."""
    where = f"{path}, line {line}"
    text = decode_utf8(raw, where, offset).removeprefix("\ufeff")
    try:
        row = json.loads(text, object_pairs_hook=_without_doubles if wanted.is_talk else None)
    except json.JSONDecodeError as error:
        at = offset + len(text[: error.pos].encode("utf-8"))
        raise Unreadable(where, "byte", at, f"broken JSON ({error.msg})") from None
    except ValueError as error:
        raise Unreadable(where, "byte", offset, str(error)) from None
    except RecursionError:
        raise Unreadable(where, "byte", offset, "JSON nested too deeply") from None
    if not isinstance(row, dict):
        raise Unreadable(where, "byte", offset, f"a JSON {type(row).__name__}, not an object")
    return value_of_row(row, wanted, where, "byte", offset)


def _share_read(file: IO[bytes], path: str) -> float:
    """How far into the file on disk the reader has come, compressed or not."""
    on_disk = getattr(file, "fileobj", None) or file
    return min(1.0, float(on_disk.tell()) / max(1, os.path.getsize(path)))


def _rest_of(path: str, line: int, offset: int, share: float | None, error: Exception) -> Unreadable:
    """All lines after `line`; `share` of the file was read before them, None where the file has been cut off."""
    if share is None:
        rest, count = "the file is cut off, and everything after this line is missing; nobody knows how much", None
    elif not line or not share:
        rest, count = "nothing of the file is read", None
    else:
        count = max(1, round(line * (1 - share) / share))
        rest = f"the rest of the file, about {100 * (1 - share):.0f} % of it, is not read"
    return Unreadable(f"{path}, line {line + 1}", "byte", offset, f"cannot be read ({error}): {rest}", count)


class JsonlSource:
    """One document per line of JSONL files. Not through `datasets`, which cannot name a broken line."""

    def __init__(self, files: Sequence[tuple[str, str]], wanted: Wanted, fingerprint: str | None = None) -> None:
        self._files = files
        self._wanted = wanted
        self.fingerprint = fingerprint

    def entries(self, start: int = 0, state: Any = None) -> Iterator[Entry]:
        for position, entry in enumerate(self._all_entries()):
            if position >= start:
                yield entry

    def _all_entries(self) -> Iterator[Entry]:
        for id_, path in self._files:
            line = offset = 0
            share: float | None = 0.0
            try:
                with open_bytes(path) as file:
                    try:
                        for raw in file:
                            line += 1
                            if raw.strip():
                                parse = partial(parse_json_line, raw, path, line, offset, self._wanted)
                                yield Entry(f"{id_}:{line}", parse)
                            offset += len(raw)
                    except READ_ERRORS as error:
                        share = None if isinstance(error, EOFError) else _share_read(file, path)
                        raise
            except READ_ERRORS as error:
                yield Entry(f"{id_}:{line + 1}", partial(fail, _rest_of(path, line, offset, share, error)))

    def state(self) -> Any:
        return None


class RowSource:
    """One document per row of a list or a `datasets.Dataset`."""

    def __init__(self, rows: Any, name: str, wanted: Wanted, fingerprint: str | None = None) -> None:
        self._rows = rows
        self._name = name
        self._wanted = wanted
        self.fingerprint = fingerprint

    def entries(self, start: int = 0, state: Any = None) -> Iterator[Entry]:
        for begin in range(start, len(self._rows), ROWS_PER_READ):
            rows = self._rows[begin : begin + ROWS_PER_READ]
            if isinstance(rows, dict):  # a slice of a datasets.Dataset is a dict of columns
                rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
            for row, value in enumerate(rows, start=begin):
                yield Entry(
                    f"{self._name}:{row}",
                    partial(value_of_row, value, self._wanted, self._name, "row", row),
                )

    def state(self) -> Any:
        return None
