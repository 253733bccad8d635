"""AES-256-GCM over the files of a checkpoint, Ed25519 over its manifest. Imports no torch, and `cryptography` only
where there is a key.

Each file has a key of its own, wrapped by the run's key; it is sealed in chunks, and each seal also covers the run,
the step, the file's name, the chunk's number and whether it is the last: nothing can be swapped, reordered or cut.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.checkpoint.storage.manifest import CheckpointError, Manifest, Sealed, Signature, signed_text

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

CHUNK = 2**20
"""Plain bytes under one seal."""
_MAGIC = b"moedist1"
_KEY, _NONCE, _TAG = 32, 12, 16
_HEAD = len(_MAGIC) + _NONCE + _KEY + _TAG


@dataclass(frozen=True)
class Key:
    """32 secret bytes. `id` tells which key without telling the key."""

    secret: bytes
    source: str

    @property
    def id(self) -> str:
        return hashlib.sha256(b"moe-dist key id\0" + self.secret).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Key({self.id} from {self.source})"


def read_key(source: str, option: str = "encryption_key") -> Key:
    """`env:NAME` or a file: 32 bytes as they are, in hexadecimal or in base64. Raises CheckpointError."""
    where = f"checkpoint.{option}={source}"
    try:
        raw = os.environ[source[4:]].encode() if source.startswith("env:") else Path(source).read_bytes()
    except KeyError:
        raise CheckpointError(f"{where}: the environment has no variable {source[4:]}") from None
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from None
    text = raw.strip()
    if len(raw) == _KEY:
        return Key(raw, source)
    for decode in (bytes.fromhex, lambda value: base64.b64decode(value, validate=True)):
        try:
            secret = decode(text.decode("ascii"))
        except (ValueError, UnicodeDecodeError, binascii.Error):
            continue
        if len(secret) == _KEY:
            return Key(secret, source)
    raise CheckpointError(
        f"{where}: not a key of {_KEY} bytes (as they are, in hexadecimal or base64); make one with: "
        "python -c 'import secrets; print(secrets.token_hex(32))'"
    )


class Keys:
    """The keys of a run: the first one seals, any of them opens (so a key can be rotated), and one signs."""

    def __init__(self, sources: Sequence[str] = (), signing: str | None = None) -> None:
        if (sources or signing) and find_spec("cryptography") is None:
            option = "encryption_key" if sources else "signing_key"
            raise CheckpointError(f"checkpoint.{option}: needs a package: pip install 'moe-dist[encryption]'")
        self.keys = [read_key(source) for source in sources]
        self._signing = None if signing is None else read_key(signing, "signing_key")

    def signed(self, manifest: Manifest) -> Manifest:
        """The manifest with a signature, or as it is without a key. The files are covered by the hashes in it."""
        if self._signing is None:
            return manifest
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        private = Ed25519PrivateKey.from_private_bytes(self._signing.secret)
        text = private.sign(signed_text(manifest)).hex()
        return manifest.model_copy(update={"signature": Signature(key_id=_public_id(private), ed25519=text)})

    def check_signature(self, manifest: Manifest, where: str) -> None:
        """Raises CheckpointError, with a key, for a manifest that it has not signed."""
        if self._signing is None:
            return
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        private = Ed25519PrivateKey.from_private_bytes(self._signing.secret)
        ours, way_out = _public_id(private), "checkpoint.signing_key accepts only what it has signed itself"
        if manifest.signature is None:
            raise CheckpointError(f"{where}: its manifest is not signed; {way_out}")
        if manifest.signature.key_id != ours:
            theirs = manifest.signature.key_id
            raise CheckpointError(f"{where}: signed with another key, {theirs}, and not with {ours}; {way_out}")
        try:
            private.public_key().verify(bytes.fromhex(manifest.signature.ed25519), signed_text(manifest))
        except InvalidSignature:
            raise CheckpointError(f"{where}: its manifest was changed after it was signed with {ours}") from None

    @property
    def sealed(self) -> Sealed | None:
        """What the manifest says of files sealed now; None: nothing is sealed."""
        return Sealed(algorithm="AES-256-GCM", key_id=self.keys[0].id) if self.keys else None

    def sealing(self, run: str, step: int) -> Seal | None:
        """Seals the files of one step; None without a key."""
        return Seal(self.keys[0], run, step) if self.keys else None

    def opening(self, manifest: Manifest, where: str) -> Seal | None:
        """Opens the files of one step; None when they are not sealed. Raises CheckpointError for want of the key."""
        if manifest.encryption is None:
            return None
        for key in self.keys:
            if key.id == manifest.encryption.key_id:
                return Seal(key, manifest.run, manifest.step)
        have = ", ".join(f"{key.id} ({key.source})" for key in self.keys) or "none"
        raise CheckpointError(
            f"{where}: encrypted with key {manifest.encryption.key_id}; the keys at hand: {have}. "
            "Name it in checkpoint.encryption_key (a file, or env:NAME)"
        )


def _public_id(private: Ed25519PrivateKey) -> str:
    public = private.public_key().public_bytes_raw()
    return hashlib.sha256(b"moe-dist signing key id\0" + public).hexdigest()[:16]


@dataclass(frozen=True)
class Seal:
    """Seals and opens the files of one step with one key."""

    key: Key
    run: str
    step: int

    def seal(self, file: str, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes]:
        """The stored form of a file given piece by piece."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        secret, nonce = secrets.token_bytes(_KEY), secrets.token_bytes(_NONCE)
        wrapped = AESGCM(self.key.secret).encrypt(nonce, secret, self._about(file, "key"))
        yield _MAGIC + nonce + wrapped
        cipher = AESGCM(secret)
        number, waiting = 0, b""
        for plain in _evenly(chunks):
            if waiting:
                yield cipher.encrypt(_nonce(number), waiting, self._about(file, number))
                number += 1
            waiting = plain
        yield cipher.encrypt(_nonce(number), waiting, self._about(file, f"{number} last"))

    def open(self, file: str, content: bytes) -> bytes:
        """The file behind its stored form. Raises CheckpointError naming the file; nothing is returned then."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        view = memoryview(content)
        try:
            if len(content) < _HEAD + _TAG or view[: len(_MAGIC)] != _MAGIC:
                raise InvalidTag
            nonce = view[len(_MAGIC) : len(_MAGIC) + _NONCE]
            wrapped = view[len(_MAGIC) + _NONCE : _HEAD]
            cipher = AESGCM(AESGCM(self.key.secret).decrypt(nonce, wrapped, self._about(file, "key")))
            plain = io.BytesIO()  # its value is not copied once more, as that of a list of chunks would be
            starts = range(_HEAD, len(content), CHUNK + _TAG)
            for number, start in enumerate(starts):
                last = " last" if number == len(starts) - 1 else ""
                part = view[start : start + CHUNK + _TAG]
                plain.write(cipher.decrypt(_nonce(number), part, self._about(file, f"{number}{last}")))
        except InvalidTag:
            raise CheckpointError(
                f"{file}: its seal does not fit: another key, another file or step, or changed since"
            ) from None
        return plain.getvalue()

    def _about(self, file: str, part: object) -> bytes:
        return f"{self.run}/{self.step}/{file}/{part}".encode()


def _nonce(number: int) -> bytes:
    """Never repeats under one file's key."""
    return struct.pack(">IQ", 0, number)


def _evenly(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The same bytes, CHUNK at a time."""
    held = bytearray()
    for chunk in chunks:
        held += chunk
        position = 0
        while len(held) - position >= CHUNK:
            yield bytes(held[position : position + CHUNK])
            position += CHUNK
        del held[:position]
    if held:
        yield bytes(held)
