"""Who asked what and when: a line of JSON for every request. Of what was said nothing, unless that is switched on."""

from __future__ import annotations

import json
import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class _File(RotatingFileHandler):
    """A line that cannot be written is one warning, not a traceback for each."""

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.has_failed:
            self.has_failed = True
            logger.warning("audit log %s cannot be written; requests are answered all the same", self.baseFilename)

    def _open(self) -> Any:
        Path(self.baseFilename).touch(mode=0o600)
        return super()._open()


class AuditLog:
    """Lines go to `path`; at `max_bytes` it becomes `path.1`, and so on up to `keep`. Raises OSError."""

    def __init__(self, path: Path, *, max_bytes: int = 64 * 2**20, keep: int = 5, with_text: bool = False) -> None:
        self.with_text = with_text
        self._file = _File(path, maxBytes=max_bytes, backupCount=keep, encoding="utf-8")
        self._file.setFormatter(logging.Formatter("%(message)s"))

    def write(self, line: dict[str, Any], said: dict[str, Any]) -> None:
        """`said`: prompts and answers, written only `with_text`."""
        text = json.dumps(line | said if self.with_text else line)
        self._file.handle(logging.LogRecord("audit", logging.INFO, "", 0, text, None, None))

    def close(self) -> None:
        self._file.close()
