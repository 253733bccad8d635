"""Under which addresses this machine is known to others. Imports no torch."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SIOCGIFADDR = 0x8915
_NOBODY = "192.0.2.1"
"""An address that nobody has: only which interface leads there is asked."""


def addresses() -> list[str]:
    """Where others may reach this machine, the best guess first."""
    found = []
    for variable in _INTERFACES:
        if address := _of_interface(os.environ.get(variable, "").partition(",")[0].lstrip("=")):
            found.append(address)
    master = os.environ.get("MASTER_ADDR", "")
    with suppress(OSError):
        found += filter(None, (_towards(to) for *_, to in socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)))
    found += [socket.gethostname(), master]
    return [address for address in dict.fromkeys(found) if address]


def outward(target: str = "") -> str:
    """The address of this machine on the way to `target`, or to other networks; "" when no way leads there."""
    return _towards((target or _NOBODY, 9)) or ""


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address (Linux)."""
    if not hasattr(socket, "if_nameindex"):
        return None
    for _, name in socket.if_nameindex():
        if _of_interface(name) == address:
            return name
    return "lo" if address.startswith("127.") else None


def _of_interface(name: str) -> str | None:
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return None


def _towards(address: tuple) -> str | None:
    family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])
    return None
