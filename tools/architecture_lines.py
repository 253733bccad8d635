"""Keep `docs/architecture.md` true: every `path:line` `text` must point at the first line that holds the text.

python tools/architecture_lines.py           set the line numbers
python tools/architecture_lines.py --check   only say what is stale
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
POINTER = re.compile(r"`(?P<path>[\w/.]+\.py):(?P<line>\d+)` `(?P<text>[^`]+)`")


def updated(page: str) -> str:
    """The page with right line numbers. Raises ValueError naming a pointer whose file or text is gone."""

    def point(match: re.Match[str]) -> str:
        file = ROOT / match["path"]
        if not file.is_file():
            raise ValueError(f"{match[0]}: no such file")
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if match["text"] in line:
                return f"`{match['path']}:{number}` `{match['text']}`"
        raise ValueError(f"{match[0]}: the file does not hold this text")

    return POINTER.sub(point, page)


def main() -> int:
    page = PAGE.read_text()
    fresh = updated(page)
    if "--check" in sys.argv:
        return int(fresh != page)
    PAGE.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
