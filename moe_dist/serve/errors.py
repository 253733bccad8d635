"""What a client gets instead of an answer, in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Mapping

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """An HTTP status and one line that says what is wrong and what would be right."""

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def body(self) -> bytes:
        """`{"error": {"message", "type", "param", "code"}}`. ASCII: half a surrogate pair can be quoted, too."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    @property
    def headers(self) -> Mapping[str, str]:
        found = {"content-type": "application/json"}
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        if self.retry_after is not None:
            found["retry-after"] = str(max(1, round(self.retry_after + 0.5)))
        return found
