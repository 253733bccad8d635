"""A headless Chromium that presses keys, driven through the pipe of its DevTools protocol."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services import need

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1200,900",
)  # fmt: skip
HARD_LIMIT = 180.0
KEYS = {"Tab": 9, "Enter": 13, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}


class Browser:
    """One page. Every answer has to come within HARD_LIMIT of the start."""

    def __init__(self, to: int, answers: int) -> None:
        self._to, self._from, self._buffer, self._number = to, answers, b"", 0
        self._deadline = time.monotonic() + HARD_LIMIT
        self._session: str | None = None

    def open(self, page: Path) -> None:
        """Load a page of the report, and wait until its figures are drawn."""
        target = self._ask("Target.createTarget", url=page.as_uri())["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        while not self.told("document.body && document.body.hasAttribute('data-drawn')"):
            time.sleep(0.1)

    def told(self, expression: str) -> Any:
        """The value of an expression of JavaScript, or of its promise."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Down and up, as from a keyboard."""
        more = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown" if more else "rawKeyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], **more)
        # What the key has set off is drawn in the next frame.
        self.told("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")

    def _ask(self, method: str, **params: Any) -> Any:
        self._number += 1
        asked = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            asked["sessionId"] = self._session
        os.write(self._to, json.dumps(asked).encode() + b"\0")
        while True:
            text, found, rest = self._buffer.partition(b"\0")
            if found:
                self._buffer = rest
                answer = json.loads(text)
                if answer.get("id") == self._number:
                    assert "error" not in answer, answer
                    return answer["result"]
            else:
                ready, _, _ = select.select([self._from], [], [], max(0.0, self._deadline - time.monotonic()))
                assert ready, f"no answer to {method}"
                part = os.read(self._from, 1 << 20)
                assert part, f"the browser has ended before it answered {method}"
                self._buffer += part


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Started with a profile in `folder`, and ended with the block."""
    program = need("chromium")
    (theirs_in, to), (answers, theirs_out) = os.pipe(), os.pipe()
    # Its protocol is on the descriptors 3 and 4.
    script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
    command = ["bash", "-c", script, "-", program, *FLAGS, "--remote-debugging-pipe"]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={folder / 'profile'}"], pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(to, answers)
    finally:
        os.close(to)  # it ends when nobody can ask it any more
        os.close(answers)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
