"""Files that are not what their source reads: refused by the name of their format, before anything is counted.

Read line by line, a compressed file or a table of another kind is a few hundred broken documents, and the thousands in
it are never missed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

_COMPRESSED = {
    "zstd": (b"\x28\xb5\x2f\xfd", (".zst", ".zstd")),
    "xz": (b"\xfd7zXZ\x00", (".xz",)),
    "bzip2": (b"BZh", (".bz2",)),
    "zip": (b"PK\x03\x04", (".zip",)),
    "lz4": (b"\x04\x22\x4d\x18", (".lz4",)),
}
_TABLES = {
    "Parquet": (b"PAR1", (".parquet",)),
    "Arrow": (b"ARROW1", (".arrow", ".feather")),
    "CSV": (b"", (".csv", ".tsv")),
}
_GZIP = b"\x1f\x8b"
_BYTES = 512
_LOOKED_INTO = 100


def check_formats(files: Sequence[tuple[str, str]], source: str) -> None:
    """Raises ValueError naming the first file, the format it has, and what to do.

    `files`: (id, path). Names are looked at in all of them, beginnings in the first hundred and the first of each
    ending: a corpus may have a million files.
    """
    seen: set[str] = set()
    for number, (_, path) in enumerate(files):
        ending = os.path.splitext(path)[1].lower()
        start = b""
        if ending not in seen or number < _LOOKED_INTO:
            seen.add(ending)
            try:
                with open(path, "rb") as file:
                    start = file.read(_BYTES)
            except OSError:
                continue  # the corpus names it when it gets there
        found = _format(start, ending, source)
        if found:
            raise ValueError(f"{path}: {found}")


def _format(start: bytes, ending: str, source: str) -> str:
    """What is wrong with a file that begins so and is called so, and the way out; "" for nothing."""
    for name, (magic, endings) in _COMPRESSED.items():
        if ending in endings or (start and start.startswith(magic)):
            return f"compressed by {name}, which is not read; unpack it (.gz is read as it is), or leave it out of path"
    if start.startswith(_GZIP) and ending != ".gz":
        return "compressed by gzip, but not called .gz; rename it"
    folder = "data.source=huggingface data.name=FOLDER reads a folder of such files"
    for name, (magic, endings) in _TABLES.items():
        if name == "Parquet" and source == "parquet":
            continue
        if (magic and start.startswith(magic)) or (ending in endings and source != "text"):
            way = "set data.source=parquet" if name == "Parquet" else folder
            return f"{name}, which data.source={source} does not read; {way}, or leave it out of path"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if source == "jsonl" and text.startswith(b"[") and not _is_token_list(text):
        return f"one JSON array, not an object on each line; write a line for each of its entries, or {folder}"
    if source == "parquet" and text.startswith((b"{", b"[")):
        return "JSON, not Parquet; set data.source=jsonl"
    return ""


def _is_token_list(text: bytes) -> bool:
    """Whether the first line is an array of its own: broken rows, which the corpus names one by one."""
    line, newline, _ = text.partition(b"\n")
    return bool(newline) and line.rstrip().endswith(b"]")
