"""Wait for the host where the ranks meet: its name may come later than the ranks do, as in Kubernetes."""

from __future__ import annotations

import socket
import sys
import time

EVERY = 10.0
"""Seconds between two lines about the wait."""
_POLL = 0.5


def wait_for_name(address: str, timeout: float, speaks: bool = True) -> None:
    """Return once `address`, which MASTER_ADDR says, is the name of a host; with a line every 10 s if it `speaks`.

    Raises ConnectionError after `timeout` seconds, naming the variable.
    """
    began = said = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
        waited = time.monotonic() - began
        if waited >= timeout:
            raise ConnectionError(f"MASTER_ADDR={address}: no host of that name after {waited:.0f} s ({why})")
        if speaks and time.monotonic() - said >= EVERY:
            said = time.monotonic()
            print(f"moe-dist: waiting for a host named MASTER_ADDR={address} ({why}), {waited:.0f} s", file=sys.stderr)
        time.sleep(min(_POLL, timeout - waited))
