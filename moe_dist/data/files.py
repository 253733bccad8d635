"""Which files a corpus is made of: globs, the standard library, and checks made before anything is read."""

from __future__ import annotations

import difflib
import glob
import hashlib
import logging
import os
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from moe_dist.data.columns import Wanted
from moe_dist.data.sources import READ_ERRORS, Unreadable, open_bytes

logger = logging.getLogger(__name__)

LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def standard_library_files() -> list[tuple[str, str]]:
    """(id, path) of each .py file of Python's standard library, tests and installed packages left out.

    The id is the path inside the library; sorted by it, so that equal Pythons give equal order.
    Raises ValueError where the library is not there as files.
    """
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT_FOLDERS]
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                found.append((Path(path).relative_to(root).as_posix(), path))
    if not found:
        raise ValueError(f"no .py file under {root}: this Python comes without library sources, use another source")
    return sorted(found)


Paths = str | Path | Sequence[str | Path] | Mapping[str, str | Sequence[str]]
"""One glob, several, or names with one or several each."""


class Domains:
    """Named sources: `names`, and the number of the one a document comes from."""

    def __init__(self, names: Sequence[str], of_file: Mapping[str, int]) -> None:
        self.names, self._of_file = tuple(names), of_file

    def of(self, id_: str) -> int:
        """The domain of the document with this id: that of a file, or of a file and a row."""
        return self._of_file[id_ if id_ in self._of_file else id_.rpartition(":")[0]]


def matching_files(path: Paths | None, source: str) -> list[tuple[str, str]]:
    """(id, path) of the files that the glob or globs match, in the order of the globs, sorted within each.

    The id is the path after the fixed folders of the glob, so it does not depend on where the data lies; a
    file matched twice is taken once, and an id met twice is made unique by the number of its glob. Raises
    ValueError naming a glob without files, and what is there instead.
    """
    if path is None or (not isinstance(path, str | Path) and not path):
        raise ValueError(f"data source {source!r} needs `path`, a file or a glob such as 'corpus/**/*.txt'")
    return [(id_, match) for _, id_, match in _matches(_patterns(path))]


def domains(path: Paths | None, source: str) -> Domains | None:
    """Which name each of `matching_files` has; None when there are no two names."""
    if not isinstance(path, Mapping) or len(path) < 2:
        return None
    number_of = [number for number, globs in enumerate(path.values()) for _ in _patterns(globs)]
    return Domains(tuple(path), {id_: number_of[glob] for glob, id_, _ in _matches(_patterns(path))})


def _patterns(path: Paths) -> list[str]:
    if isinstance(path, Mapping):
        return [pattern for globs in path.values() for pattern in _patterns(globs)]
    return [str(path)] if isinstance(path, str | Path) else [str(item) for item in path]


def _matches(patterns: Sequence[str]) -> list[tuple[int, str, str]]:
    """(number of the glob, id, path), each file once."""
    files: list[tuple[int, str, str]] = []
    ids: set[str] = set()
    seen: set[str] = set()
    empty: list[str] = []
    for number, pattern in enumerate(patterns):
        expanded = os.path.expanduser(pattern)
        root = _fixed_folder(expanded)
        candidates = [expanded] if os.path.isfile(expanded) else glob.glob(expanded, recursive=True)
        matches = [match for match in candidates if os.path.isfile(match)]
        if not matches and len(patterns) > 1 and os.path.isdir(root) and not os.listdir(root):
            empty.append(pattern)  # a part without documents, as an empty file is
            continue
        if not matches:
            raise ValueError(f"path {pattern!r} matches no file: {_what_is_there(expanded)}")
        named = sorted((Path(match).relative_to(root).as_posix(), match) for match in matches)
        for id_, match in named:
            if os.path.realpath(match) in seen:
                continue
            seen.add(os.path.realpath(match))
            unique = id_ if id_ not in ids else f"{number}/{id_}"
            ids.add(unique)
            files.append((number, unique, match))
    if not files:
        raise ValueError(f"path {', '.join(map(repr, empty))} matches no file: the folders are empty")
    if empty:
        logger.warning("no document in %s: the folder is empty", ", ".join(map(repr, empty)))
    return files


def fingerprint(kind: str, files: Iterable[tuple[str, str]]) -> str:
    """A hash over the ids, sizes and times of change of `files`."""
    digest = hashlib.sha256(kind.encode())
    for id_, path in files:
        facts = os.stat(path)
        digest.update(f"\0{id_}\0{facts.st_size}\0{facts.st_mtime_ns}".encode())
    return digest.hexdigest()


def check_jsonl_field(files: Sequence[tuple[str, str]], wanted: Wanted) -> None:
    """`Wanted.check` on the first row that can be read; rows further on are checked when they are read."""
    import json

    for _, path in files:
        try:
            with open_bytes(path) as file:
                for number, raw in enumerate(islice(file, 100), start=1):
                    try:
                        row = json.loads(raw)
                    except ValueError:  # broken or not UTF-8: the corpus names it when it gets there
                        continue
                    if isinstance(row, dict):
                        wanted.check(list(row), f"{path}, line {number},")
                        return
        except READ_ERRORS:
            continue


def check_parquet_field(files: Sequence[tuple[str, str]], wanted: Wanted) -> None:
    """`Wanted.check` on the first file whose footer can be read."""
    from moe_dist.data.dataset_sources import parquet_columns

    for _, path in files:
        try:
            columns = parquet_columns(path)
        except Unreadable:
            continue
        wanted.check(columns, path)
        return


def _fixed_folder(pattern: str) -> str:
    """The folder part of a glob before its first wildcard."""
    folder = pattern
    while glob.has_magic(folder) or folder == pattern:
        parent = os.path.dirname(folder)
        if parent == folder:
            break
        folder = parent
    return folder


def _what_is_there(pattern: str) -> str:
    """A few words on what lies near a glob that matched nothing."""
    if os.path.isdir(pattern):
        return f"it is a folder, give a glob such as {os.path.join(pattern, '**', '*')!r}"
    folder = _fixed_folder(pattern)
    while folder and not os.path.isdir(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    names = sorted(os.listdir(folder or "."))
    rest = os.path.relpath(pattern, folder or ".").split(os.sep)[0]
    near = difflib.get_close_matches(rest, names, n=3, cutoff=0.5) or names[:5]
    return f"the folder {folder or '.'!r} holds {near if near else 'nothing'}" + (
        f" and {len(names) - len(near)} more" if len(names) > len(near) else ""
    )
