"""Document sources that stand on Hugging Face `datasets`: any `IterableDataset`, and Parquet files."""

from __future__ import annotations

import copy
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from moe_dist.data.columns import Wanted
from moe_dist.data.hub import causes, is_data_error
from moe_dist.data.sources import Entry, Unreadable, fail, value_of_row


class StreamSource:
    """One document per row of a `datasets.IterableDataset`."""

    fingerprint: str | None = None  # nothing tells that a stream has stayed the same

    def __init__(self, dataset: Any, name: str, wanted: Wanted, explain: Callable[[], str] | None = None) -> None:
        """`explain`: says which file is to blame, "" when it cannot tell; None: errors are left as they are."""
        self._pristine = dataset
        self._explain = explain
        self._active: Any = None
        self._name = name
        self._wanted = wanted
        # datasets does not save the content of its shuffle buffers: such a stream can only be replayed.
        self._exact_state = not _has_shuffle_buffer(getattr(dataset, "_ex_iterable", None))

    def entries(self, start: int = 0, state: Any = None) -> Iterator[Entry]:
        # A copy per pass: an IterableDataset keeps its position inside, so two passes over one would mix.
        self._active = copy.deepcopy(self._pristine)
        if state is not None:
            self._active.load_state_dict(state)
        row = 0 if state is None else start
        rows = iter(self._active)
        while True:
            try:
                value = next(rows)
            except StopIteration:
                return
            except Exception as error:
                if self._explain is None or not is_data_error(error):
                    raise
                why = self._explain() or causes(error)
                raise ValueError(f"dataset {self._name!r} cannot be read after {row} rows: {why}") from error
            if row >= start:
                yield Entry(
                    f"{self._name}:{row}",
                    partial(value_of_row, value, self._wanted, self._name, "row", row),
                )
            row += 1

    def state(self) -> Any:
        return self._active.state_dict() if self._exact_state and self._active is not None else None


def _has_shuffle_buffer(node: Any, depth: int = 0) -> bool:
    """Whether a chain of `datasets` iterables holds a shuffle buffer anywhere (walks its attributes)."""
    if isinstance(node, list | tuple):
        return any(_has_shuffle_buffer(item, depth + 1) for item in node)
    if depth > 50 or not type(node).__module__.startswith("datasets."):
        return False
    if "shuffle" in type(node).__name__.lower():
        return True
    return any(_has_shuffle_buffer(child, depth + 1) for child in vars(node).values())


class ParquetSource:
    """One document per row of Parquet files, each streamed through `datasets`."""

    def __init__(self, files: Sequence[tuple[str, str]], wanted: Wanted, fingerprint: str | None = None) -> None:
        self._files = files
        self._wanted = wanted
        self.fingerprint = fingerprint
        self._file = 0
        self._rows: StreamSource | None = None
        self._rows_read = 0

    def entries(self, start: int = 0, state: Any = None) -> Iterator[Entry]:
        if state is None:
            for position, entry in enumerate(self._entries(0, 0, None)):
                if position >= start:
                    yield entry
        else:
            yield from self._entries(state["file"], state["row"], state["rows"])

    def _entries(self, first_file: int, first_row: int, state: Any) -> Iterator[Entry]:
        for index in range(first_file, len(self._files)):
            id_, path = self._files[index]
            self._file, self._rows, self._rows_read = index, None, 0
            if index == first_file and state is not None:
                self._rows_read = first_row
            elif index == first_file and first_row:
                continue  # the saved point was an entry standing for the broken rest of this file
            try:
                self._rows = open_parquet(id_, path, self._wanted)
                for entry in self._rows.entries(self._rows_read, state if index == first_file else None):
                    self._rows_read += 1
                    yield entry
            except Unreadable as error:
                self._rows, self._rows_read = None, self._rows_read + 1
                yield Entry(id_, partial(fail, error))
            except Exception as error:  # pyarrow and datasets raise many types for a damaged page
                rest = max(1, parquet_rows(path) - self._rows_read)
                reason = f"damaged Parquet data ({type(error).__name__}: {error}), {rest} rows are not read"
                broken = Unreadable(path, "row", self._rows_read, reason, rest)
                self._rows, self._rows_read = None, self._rows_read + 1
                yield Entry(f"{id_}:{self._rows_read - 1}", partial(fail, broken))

    def state(self) -> Any:
        rows = self._rows.state() if self._rows is not None else None
        return {"file": self._file, "row": self._rows_read, "rows": rows}


def parquet_columns(path: str) -> list[str]:
    """Column names of a Parquet file; raises `Unreadable` when its footer cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        return [str(name) for name in pyarrow.parquet.read_schema(path).names]
    except (OSError, pyarrow.ArrowException) as error:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        reason = f"truncated, or not a Parquet file ({error}): nothing of its {size:,} bytes is read"
        raise Unreadable(path, "byte", size, reason, None) from None


def parquet_rows(path: str) -> int:
    """Rows of a Parquet file by its footer."""
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(path).num_rows)


def open_parquet(id_: str, path: str, wanted: Wanted) -> StreamSource:
    """A stream over the rows of one Parquet file, only the columns that are used; raises `Unreadable`."""
    columns = parquet_columns(path)
    selected = wanted.selected(columns)
    if not set(selected) & set(columns) or (not wanted.is_talk and wanted.text_field not in columns):
        rows, what = parquet_rows(path), "conversation" if wanted.is_talk else f"column {wanted.text_field!r}"
        raise Unreadable(path, "row", 0, f"no {what} in {rows} rows (columns: {columns})", rows)
    from datasets import load_dataset

    stream = load_dataset("parquet", data_files=[glob.escape(path)], split="train", streaming=True)
    return StreamSource(stream.select_columns(selected), id_, wanted)
