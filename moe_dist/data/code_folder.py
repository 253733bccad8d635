"""A folder of source code as samples: each file, and each of its functions and types; what is left out has a reason."""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

LANGUAGES = {
    "py": "python",
    "rs": "rust",
    "go": "go",
    "js": "javascript",
    "ts": "typescript",
    "java": "java",
    "kt": "kotlin",
    "c": "c",
    "h": "c",
    "cc": "c++",
    "cpp": "c++",
    "hpp": "c++",
    "cs": "c#",
    "swift": "swift",
    "scala": "scala",
}
_LEFT_OUT_FOLDERS = {"node_modules", "target", "build", "dist", "vendor", "third_party", "venv", "__pycache__"}
_LARGEST, _SMALLEST, _SHORTEST_PART = 1_000_000, 32, 3
_SECRETS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an AWS key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a token of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{36}\b|\bgithub_pat_\w{60,}",
    "a token of Slack": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "a password or key in quotes": (
        r"(?i)\b\w*(password|passwd|secret|api_?key|access_?token)\b\s*[:=]\s*[\"'](?=[^\"'\s]*\d)[^\"'\s]{16,}[\"']"
    ),
}
_COPYLEFT = re.compile(
    r"SPDX-License-Identifier:\s*\(?(A?GPL|LGPL|SSPL|BUSL|CC-BY-(NC|SA))|GNU (Affero |Lesser |Library )?General Public"
    r"|proprietary and confidential",
    re.IGNORECASE,
)
_GENERATED = re.compile(r"@generated|DO NOT EDIT|(auto-?|automatically )generated (by|file|code)", re.IGNORECASE)
# The first line of a definition, in languages whose bodies stand in braces.
_BRACED = re.compile(
    r"(?:(?:pub(?:\([\w:]+\))?|public|private|protected|internal|static|final|abstract|async|unsafe|const|export|default|"
    r"extern|inline|override|open|sealed|data)\s+)*"
    r"(?:(?:fn|func|function|class|struct|enum|trait|interface|impl|mod|object|fun|def)\b[^;=]*"
    r"|[\w:<>\*&\[\], ]+\([^;=]*\)\s*)(?:\{|$)"
)
_NO_DEFINITION = re.compile(r"(?:if|for|while|switch|match|return|else|catch|use)\b|//|/\*|\*|\}")
_LONGEST_HEAD = 300
_SHINGLE, _HASHES, _BANDS = 5, 64, 16
_SIMILAR = 0.8


@dataclass(frozen=True)
class CodeSample:
    """`kind`: "file" or "part"; `line`: the first of it, from 1."""

    path: str
    language: str
    kind: str
    line: int
    text: str


@dataclass
class Prepared:
    """How many of what: `left_out` has the reason and the path of each file that is not taken."""

    files: int = 0
    parts: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def reasons(self) -> dict[str, list[str]]:
        """The paths by reason, the most frequent first."""
        found: dict[str, list[str]] = {}
        for reason, path in self.left_out:
            found.setdefault(reason.partition(":")[0], []).append(path)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def samples_of_folder(folder: Path, counts: Prepared, any_licence: bool = False) -> Iterator[CodeSample]:
    """Samples of the source files below `folder`, in the order of their paths, counted in `counts`.

    Left out: what is no UTF-8, too large, too small, generated, a near duplicate of a file before it, holds a secret,
    or is under a copyleft or proprietary licence by its first lines, unless `any_licence`. Raises ValueError where
    there is no source file.
    """
    known = _Known()
    seen = 0
    for path in _source_files(folder):
        seen += 1
        name = path.relative_to(folder).as_posix()
        language = LANGUAGES[path.suffix[1:].lower()]
        try:
            raw = path.read_bytes()
            text = raw.decode("utf-8").removeprefix("\ufeff")
        except OSError as error:
            counts.left_out.append((f"cannot be read: {error.strerror}", name))
            continue
        except UnicodeDecodeError:
            counts.left_out.append(("not UTF-8", name))
            continue
        reason = _reason(text, any_licence) or known.twin(text, name)
        if reason:
            counts.left_out.append((reason, name))
            continue
        counts.files += 1
        yield CodeSample(name, language, "file", 1, text)
        for line, part in parts_of(text, language):
            counts.parts += 1
            yield CodeSample(name, language, "part", line, part)
    if not seen:
        raise ValueError(f"{folder}: no source file below it; known endings: {', '.join(sorted(LANGUAGES))}")


def parts_of(text: str, language: str) -> list[tuple[int, str]]:
    """Functions, methods and types of a file: (first line, text), in order; fewer than 3 lines are too little."""
    lines = text.splitlines()
    spans = _python_spans(text) if language == "python" else _braced_spans(lines)
    return [
        (begin + 1, "\n".join(lines[begin:end]) + "\n")
        for begin, end in spans
        if _SHORTEST_PART <= end - begin < len(lines)
    ]


def _source_files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT_FOLDERS and not name.startswith("."))
        for name in sorted(names):
            path = Path(root, name)
            if path.suffix[1:].lower() in LANGUAGES and path.is_file():
                yield path


def _reason(text: str, any_licence: bool) -> str:
    """Why a file is left out; "" where it is not."""
    if len(text) > _LARGEST:
        return "too large"
    if len(text.strip()) < _SMALLEST:
        return "too small"
    head = text[:3000]
    if _GENERATED.search(head) or len(text) > 500 * (text.count("\n") + 1):
        return "generated"
    if not any_licence and (found := _COPYLEFT.search(head)):
        return f"licence: {found[0]}"
    for what, form in _SECRETS.items():
        if found := re.search(form, text):
            return f"secret: {what}, line {text[: found.start()].count(chr(10)) + 1}"
    return ""


def _python_spans(text: str) -> list[tuple[int, int]]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # of another Python, or none: as a file alone
        return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    spans = []
    for top in tree.body:
        for node in [top, *(top.body if isinstance(top, ast.ClassDef) else [])]:
            if isinstance(node, kinds):
                begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                spans.append((begin - 1, node.end_lineno or begin))
    return spans


def _braced_spans(lines: list[str]) -> list[tuple[int, int]]:
    """Definitions on the two outer levels, up to the brace that closes them at the same indentation."""
    spans = []
    for begin, line in enumerate(lines):
        head, indent = line.strip(), len(line) - len(line.lstrip())
        if not head or indent > 4 or len(head) > _LONGEST_HEAD or _NO_DEFINITION.match(head):
            continue
        if _BRACED.match(head) and (end := _closed_at(lines, begin, indent)) is not None:
            spans.append((begin, end))
    return spans


def _closed_at(lines: list[str], begin: int, indent: int) -> int | None:
    """The line after the brace that closes what begins here; None where none was opened, or it ends otherwise."""
    opened = "{" in lines[begin]
    for end in range(begin + 1, len(lines)):
        line = lines[end]
        if line[:indent].isspace() == bool(indent) and line[indent : indent + 1] == "}":
            return end + 1
        opened = opened or "{" in line
        if not line.strip() and not opened:
            return None
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            return None
    return None


class _Known:
    """Files that have been taken, to find near duplicates: shingles of words, by MinHash in bands."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self._factors = draw.integers(1, 2**63, _HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._bands: dict[tuple[int, bytes], int] = {}
        self._files: list[tuple[str, npt.NDArray[np.uint64]]] = []

    def twin(self, text: str, name: str) -> str:
        """Which file before it this one is like; "" for none, and then it is known from now on."""
        words = re.findall(r"\w+|[^\w\s]", text)
        shingles = {" ".join(words[at : at + _SHINGLE]) for at in range(max(1, len(words) - _SHINGLE + 1))}
        hashes = np.frombuffer(
            b"".join(hashlib.blake2b(one.encode(), digest_size=8).digest() for one in shingles), dtype=np.uint64
        )
        mins = np.array([(hashes * factor).min() for factor in self._factors], dtype=np.uint64)
        rows = _HASHES // _BANDS
        keys = [(band, mins[band * rows : (band + 1) * rows].tobytes()) for band in range(_BANDS)]
        for number in {self._bands[key] for key in keys if key in self._bands}:
            other, its = self._files[number]
            if float((its == mins).mean()) >= _SIMILAR:
                return f"near duplicate: of {other}"
        for key in keys:
            self._bands.setdefault(key, len(self._files))
        self._files.append((name, mins))
        return ""
