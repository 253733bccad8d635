"""Who may do what: keys whose argon2 hashes are in a file, with a role and limits each.

A line is `NAME ROLE HASH [requests_per_minute=N] [tokens_per_minute=N]`; a key is `NAME.SECRET`, and only its hash is
kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moe_dist.serve.errors import Refused

logger = logging.getLogger(__name__)

ROLES = {"user": {"infer"}, "metrics": {"metrics"}, "admin": {"infer", "metrics", "train"}}
"""What each role may do."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LIMITS = ("requests_per_minute", "tokens_per_minute")
_MAX_KEY = 256
_MAX_CHECKS = 8
"""Keys that nobody has checked yet, at the same time: each costs memory and time by design."""


@dataclass
class Bucket:
    """So many a minute, and at most those of a minute at once. What is spent afterwards may leave a debt."""

    per_minute: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.level, self._at = self.per_minute, self.clock()

    def wait(self) -> float:
        """Seconds until there is one; 0 now."""
        now = self.clock()
        self.level = min(self.per_minute, self.level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return max(0.0, (1 - self.level) * 60 / self.per_minute)

    def spend(self, count: float) -> None:
        self.level -= count


@dataclass(eq=False)
class Client:
    """Who asks."""

    name: str
    role: str
    hash: str = ""
    limits: dict[str, Bucket] = field(default_factory=dict)
    line: tuple[str, ...] = ()
    """Of the file, word by word."""

    def may(self, what: str) -> bool:
        return what in ROLES.get(self.role, ())

    def begin(self) -> None:
        """Count a request. Raises Refused (429) where a limit has been reached."""
        for name, bucket in self.limits.items():
            if (seconds := bucket.wait()) > 0:
                limit = f"{name}={bucket.per_minute:g}"
                raise Refused(
                    429,
                    f"key {self.name}: {limit} is reached; again in {seconds:.0f} s",
                    "rate_limit_exceeded",
                    retry_after=seconds,
                )
        self.spend("requests_per_minute", 1)

    def spend(self, limit: str, count: int) -> None:
        if limit in self.limits:
            self.limits[limit].spend(count)


ANYBODY = Client("-", "admin")
"""Where there are no keys."""
STRANGER = Client("-", "-")
"""Where there are, until one has been shown."""


def new_key(name: str, role: str) -> tuple[str, str]:
    """A key that nobody can guess, and its line for the file. Raises ValueError."""
    from argon2 import PasswordHasher

    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r}: a key's name has letters, digits, - and _, at most 64")
    if role not in ROLES:
        raise ValueError(f"{role!r}: no role; there are {', '.join(ROLES)}")
    key = f"{name}.{secrets.token_urlsafe(32)}"
    return key, f"{name} {role} {PasswordHasher().hash(key)}"


def read_keys(path: Path) -> dict[str, Client]:
    """By name. Raises ValueError naming file and line."""
    from argon2 import extract_parameters
    from argon2.exceptions import InvalidHashError

    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    found: dict[str, Client] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"{path}: line {number}"
        if len(words) < 3 or not _NAME.fullmatch(words[0]):
            raise ValueError(f"{where}: NAME ROLE HASH is wanted; moe-dist serve --hash-key NAME:ROLE writes one")
        name, role, hashed = words[:3]
        if role not in ROLES:
            raise ValueError(f"{where}: {role!r} is no role; there are {', '.join(ROLES)}")
        if name in found:
            raise ValueError(f"{where}: {name} is there twice")
        try:
            extract_parameters(hashed)
        except InvalidHashError:
            raise ValueError(f"{where}: {name} has no argon2 hash") from None
        found[name] = Client(name, role, hashed, dict(_limit(word, where) for word in words[3:]), tuple(words))
    if not found:
        raise ValueError(f"{path}: there is no key; moe-dist serve --hash-key NAME:ROLE writes one")
    return found


def _limit(word: str, where: str) -> tuple[str, Bucket]:
    name, _, value = word.partition("=")
    if name not in _LIMITS or not value.isascii() or not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{where}: {word}: {' or '.join(f'{limit}=N' for limit in _LIMITS)}, N of 1 or more")
    return name, Bucket(float(value))


class KeyRing:
    """Checks keys. What argon2 has found good once is known by its SHA-256 from then on, while its line is there.

    The file is read again when it has changed; one that is wrong is one warning, and the keys stay what they were.
    """

    def __init__(self, path: Path) -> None:
        """Raises ValueError naming file and line."""
        self._path, self._seen = path, _look(path)
        self.clients = read_keys(path)
        self._good: dict[bytes, Client] = {}
        self._one = asyncio.Lock()
        self._checks: dict[bytes, asyncio.Task[bool]] = {}

    async def client(self, authorization: str | None) -> Client:
        """Whose key this header has. Raises Refused: 401, and 429 when too many unknown keys wait to be checked."""
        self._look_again()
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise Refused(401, "a key is needed: Authorization: Bearer NAME.SECRET", "missing_api_key")
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        if digest in self._good:
            return self._good[digest]
        wrong = Refused(401, "this key is not known here", "invalid_api_key")
        if len(key) > _MAX_KEY:
            raise wrong
        client = self.clients.get(key.partition(".")[0])
        if digest not in self._checks:  # a burst of requests with one key is one check
            if len(self._checks) >= _MAX_CHECKS:
                raise Refused(429, "too many keys are being checked", "rate_limit_exceeded", retry_after=1)
            self._checks[digest] = asyncio.create_task(self._check(client, key, digest))
        is_right = await asyncio.shield(self._checks[digest])  # whoever else waits for it
        if client is None or not is_right or self.clients.get(client.name) is not client:
            raise wrong
        return client

    async def _check(self, client: Client | None, key: str, digest: bytes) -> bool:
        # A name that is not there costs what one costs that is: time and a place in the queue must not tell them apart.
        hashed = client.hash if client is not None else next(iter(self.clients.values())).hash
        try:
            async with self._one:
                is_right = await asyncio.to_thread(_verify, hashed, key)
            if is_right and client is not None and self.clients.get(client.name) is client:
                self._good[digest] = client
            return is_right
        finally:
            del self._checks[digest]

    def _look_again(self) -> None:
        if (seen := _look(self._path)) == self._seen:
            return
        self._seen = seen
        try:
            found = read_keys(self._path)
        except ValueError as error:
            logger.warning("the keys stay as they were: %s", error)
            return
        # Who is still there with the same line keeps what is left of his limits.
        for name, new in found.items():
            if (old := self.clients.get(name)) is not None and old.line == new.line:
                found[name] = old
        self.clients = found
        self._good = {digest: one for digest, one in self._good.items() if self.clients.get(one.name) is one}
        logger.warning("%s has changed: %d keys", self._path, len(found))


def _look(path: Path) -> tuple[int, int, int] | None:
    """Other when the file has changed; None for one that cannot be seen."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _verify(hashed: str, key: str) -> bool:
    from argon2 import PasswordHasher
    from argon2.exceptions import Argon2Error

    try:
        return PasswordHasher().verify(hashed, key)
    except (Argon2Error, UnicodeError):
        return False
