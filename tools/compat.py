"""Try the whole promised range: the proof and the single-process tests with each PyTorch, in environments of their own.

    python tools/compat.py                                   # every row; installs up to 6 GB each
    python tools/compat.py --only 2.11 --layouts all         # one of them

Each environment has another Python and the oldest or newest `transformers`, so that those are tried too. Results go
into the table of docs/compatibility.md. Environments and logs are kept in `--folder` and used again; remove the folder
to have the space back. Needs nothing but Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class Row:
    """What is installed: a minor version of PyTorch, on a minor version of Python, and what else is pinned."""

    torch: str
    python: str
    pins: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"torch{self.torch}-python{self.python}"


# The lowest of everything, the newest of everything, and between them each PyTorch.
ROWS = (
    Row("2.11", "3.11", ("transformers==5.0.*",)),
    Row("2.12", "3.12"),
    Row("2.13", "3.11"),
    Row("2.14", "3.13"),
)
HEAD = ("PyTorch", "Python", "transformers", "cases of `verify` that pass", "single-process tests", "on")


class Failed(Exception):
    """Something that is told in the table instead of a verdict."""


def find_python(version: str) -> str:
    """An interpreter of this minor version: on the path, or one that pyenv has. Raises Failed without one."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    several = sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    for python in [sys.executable, shutil.which(f"python{version}"), *map(str, several)]:
        if python and _output([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]) == version:
            return python
    raise Failed(f"no Python {version} on the machine")


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else ""


def install(row: Row, folder: Path) -> Path:
    """The interpreter of the row's environment, which is made when it is not there."""
    environment = folder / row.name
    python, complete = environment / "bin" / "python", environment / "complete"
    if not complete.exists():
        shutil.rmtree(environment, ignore_errors=True)
        subprocess.run([find_python(row.python), "-m", "venv", environment], check=True)
        constraints = environment / "constraints.txt"
        constraints.write_text("\n".join((f"torch=={row.torch}.*", *row.pins)) + "\n")
        command: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "-c", constraints, "-e", f"{ROOT}[dev]"]
        _run(command, folder / f"{row.name}.install.log", "installing")
        complete.touch()
    return python


def _run(command: Sequence[str | Path], log: Path, what: str, accepted: tuple[int, ...] = (0,)) -> str:
    """Standard output of a command; both outputs are kept in `log`."""
    print(f"{what}: {log}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as errors:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    with log.open("a") as file:
        file.write(done.stdout)
    if done.returncode not in accepted:
        raise Failed(f"{what} ended with {done.returncode}")
    return done.stdout


def proof(python: Path, layouts: str, log: Path) -> str:
    """What `moe-dist verify` says: `24 of 24 (quick)`. Raises Failed naming the cases that do not pass."""
    options = ["verify", "configs/demo.yaml", "--world-size", "4", "--layouts", layouts, "--json"]
    told = json.loads(_run([python, "-m", "launcher", *options], log, "verify", (0, 1)) or "{}")
    rows = told.get("layouts", [])
    failed = [row["layout"] for row in rows if not row["passed"]]
    if failed or not rows:
        raise Failed(f"FAILED: {', '.join(failed) or 'no case ran'} ({layouts})")
    return f"{len(rows)} of {len(rows)} ({layouts})"


def tests(python: Path, log: Path) -> str:
    """What pytest says of the tests that start no ranks: `812 passed, 3 skipped`. Raises Failed when one fails."""
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not dist"]
    last = _run([python, "-m", "pytest", *options], log, "tests", (0, 1)).strip().splitlines()[-1]
    counts = {word: count for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    words = ", ".join(f"{counts[word]} {word}" for word in ("failed", "error", "passed", "skipped") if word in counts)
    if "passed" not in counts or {"failed", "error"} & counts.keys():
        raise Failed(f"FAILED: {words or last}")
    return words


def try_row(row: Row, folder: Path, layouts: str) -> tuple[list[str], bool]:
    """The cells of a row, and whether everything passed."""
    try:
        python = install(row, folder)
    except (Failed, subprocess.CalledProcessError) as error:
        return [row.torch, row.python, "", f"not tried: {error}", "", time.strftime("%Y-%m-%d")], False
    code = f"import platform, importlib.metadata as m; print(platform.python_version(), *map(m.version, {PACKAGES}))"
    version, torch, transformers = _output([str(python), "-c", code]).split()
    cells, passed = [torch, version, transformers], True
    for kind, ask in (("verify", lambda log: proof(python, layouts, log)), ("tests", lambda log: tests(python, log))):
        try:
            cells.append(ask(folder / f"{row.name}.{kind}.log"))
        except Failed as error:
            cells.append(str(error))
            passed = False
    return [*cells, time.strftime("%Y-%m-%d")], passed


def with_row(page: str, cells: Sequence[str]) -> str:
    """The page with a row in its table, instead of one about the same minor version of PyTorch."""
    head = [f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    lines = page.splitlines()
    start = lines.index(head[0])
    end = next((at for at in range(start, len(lines)) if not lines[at].startswith("|")), len(lines))
    rows = {_minor(line): line for line in lines[start + 2 : end]}
    line = f"| {' | '.join(cells)} |"
    rows[_minor(line)] = line
    return "\n".join([*lines[:start], *head, *(rows[key] for key in sorted(rows)), *lines[end:]]) + "\n"


def _minor(line: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", line)[:2]))


def main() -> int:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-dist" / "compat"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="2.11", help="these versions of PyTorch", default=[])
    parser.add_argument("--layouts", default="quick", help="as of `moe-dist verify`")
    parser.add_argument("--folder", type=Path, default=cache, help=f"of the environments; {cache}")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in ROWS if not arguments.only or row.torch in arguments.only]
    if not rows:
        parser.error(f"--only {' '.join(arguments.only)}: one of {', '.join(row.torch for row in ROWS)}")
    every = True
    for row in rows:
        cells, passed = try_row(row, arguments.folder, arguments.layouts)
        PAGE.write_text(with_row(PAGE.read_text(), cells))
        print(" | ".join(cells), flush=True)
        every &= passed
    return 0 if every else 1


if __name__ == "__main__":
    sys.exit(main())
