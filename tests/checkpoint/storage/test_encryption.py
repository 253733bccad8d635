"""Sealed checkpoints: whatever is done to them is one clear error, and never a byte of plaintext."""

from __future__ import annotations

import base64
import json
import os
import random
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved import SECRET, found_at, rewrite_manifest, shard_of, train, trained

from moe_dist.checkpoint.reading import read_trainer_state, whole
from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.checkpoint.storage.encryption import CHUNK, Key, Keys, Seal, read_key
from moe_dist.checkpoint.storage.hashing import hash_file
from moe_dist.checkpoint.storage.manifest import FILE, STATE_FILE, CheckpointError
from moe_dist.checkpoint.tools.inspecting import digests, tensors

pytest.importorskip("cryptography", reason="encryption needs the package cryptography")

HEAD, TAG = 68, 16
SEAL = Seal(Key(bytes(range(32)), "test"), "ab12", 7)
FITS = "its seal does not fit"


def seal(content: bytes, name: str = "shard.safetensors", by: Seal = SEAL, piece: int = CHUNK) -> bytes:
    pieces = [content[start : start + piece] for start in range(0, len(content), piece)]
    return b"".join(by.seal(name, pieces))


def refused(content: bytes, name: str = "shard.safetensors", by: Seal = SEAL) -> None:
    with pytest.raises(CheckpointError, match=FITS) as caught:
        by.open(name, content)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@given(
    st.integers(0, 3).flatmap(lambda chunks: st.integers(max(0, chunks * CHUNK - 2), chunks * CHUNK + 2)),
    st.sampled_from([1000, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]),
)
def test_round_trip_around_the_borders_of_chunks(size: int, piece: int) -> None:
    content = random.Random(size).randbytes(size)
    stored = seal(content, piece=piece)
    assert SEAL.open("shard.safetensors", stored) == content
    assert len(stored) == HEAD + size + TAG * max(1, -(-size // CHUNK))


def test_nothing_is_sealed_twice_alike() -> None:
    """Each file has a key and a nonce of its own. Seen to fail with a constant in place of `token_bytes`."""
    assert len({seal(b"the same") for _ in range(100)}) == 100
    heads = {seal(b"")[:20] for _ in range(100)}
    assert len(heads) == 100


def test_a_wrong_bit_anywhere_is_found() -> None:
    """Head, wrapped key, every chunk and every tag."""
    content = secrets.token_bytes(2 * CHUNK + 100)
    stored = seal(content)
    draw = random.Random(1)
    places = [
        *range(HEAD + 2),
        *(draw.randrange(len(stored)) for _ in range(60)),
        *range(len(stored) - 20, len(stored)),
    ]
    for place in places:
        changed = bytearray(stored)
        changed[place] ^= 1 << draw.randrange(8)
        refused(bytes(changed))


def test_chunks_cannot_be_moved() -> None:
    """Seen to fail without the chunk's number in nonce and seal (both: either alone is enough)."""
    stored = seal(secrets.token_bytes(3 * CHUNK))
    size = CHUNK + TAG
    head, chunks = stored[:HEAD], [stored[start : start + size] for start in range(HEAD, len(stored), size)]
    assert len(chunks) == 3
    for order in ([1, 0, 2], [0, 2, 1], [0, 0, 2], [0, 1, 1], [2, 1, 0]):
        refused(head + b"".join(chunks[index] for index in order))


def test_files_cannot_be_cut_or_joined() -> None:
    """Seen to fail without the word for the last chunk in its seal."""
    stored, other = seal(secrets.token_bytes(3 * CHUNK)), seal(secrets.token_bytes(3 * CHUNK))
    for length in (0, 1, HEAD - 1, HEAD, HEAD + TAG, HEAD + CHUNK + TAG, HEAD + 2 * (CHUNK + TAG), len(stored) - 1):
        refused(stored[:length])
    refused(stored + b"\0")
    refused(stored + stored[HEAD:])
    refused(stored[:HEAD] + other[HEAD:])


def test_a_file_opens_only_where_it_belongs() -> None:
    """Seen to fail without name, step or run in `Seal._about`."""
    stored = seal(b"weights" * 1000)
    assert SEAL.open("shard.safetensors", stored)
    refused(stored, name="shard-2.safetensors")
    refused(stored, by=Seal(SEAL.key, "ab12", 8))
    refused(stored, by=Seal(SEAL.key, "ab13", 7))
    refused(stored, by=Seal(Key(bytes(32), "other"), "ab12", 7))


def test_sealing_holds_no_more_than_two_chunks() -> None:
    """A shard of gigabytes is sealed as it is written."""
    pulled = 0

    def pieces() -> Iterator[bytes]:
        nonlocal pulled
        for _ in range(64):
            pulled += 1
            yield bytes(CHUNK)

    out = SEAL.seal("x", pieces())
    next(out)
    for index in range(1, 40):
        next(out)
        assert pulled <= index + 2


@pytest.mark.parametrize("form", ["raw", "hex", "hex and newline", "base64", "environment"])
def test_forms_of_a_key(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = bytes(range(7, 39))
    file = tmp_path / "key"
    source = str(file)
    if form == "raw":
        file.write_bytes(secret)
    elif form == "base64":
        file.write_bytes(base64.b64encode(secret) + b"\n")
    elif form == "environment":
        monkeypatch.setenv("MY_KEY", secret.hex())
        source = "env:MY_KEY"
    else:
        file.write_text(secret.hex() + ("\n" if "newline" in form else ""))
    key = read_key(source)
    assert key.secret == secret
    assert secret.hex() not in repr(key)
    assert str(secret) not in repr(key)


@pytest.mark.parametrize("content", [b"", b"short", b"ab" * 31, b"\xff" * 33, b"x" * 64])
def test_what_is_no_key_is_said_without_showing_it(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a key of 32 bytes") as caught:
        read_key(str(tmp_path / "key"))
    assert not content or content.decode("latin1") not in str(caught.value)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_key(str(tmp_path / "nowhere"))


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ONE", "TWO"):
        monkeypatch.setenv(name, bytes([len(name) + ord(name[0])] * 32).hex())


@pytest.fixture
def sealed(tmp_path: Path, keys: None) -> Path:
    """Steps 2 and 4 of a run that goes to 6, under key ONE."""
    train(tmp_path / "run", encryption_key="env:ONE", max_steps=4, eval_steps=2)
    return tmp_path / "run"


@pytest.mark.parametrize("option", ["encryption_key", "signing_key"])
def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """Before a run begins. Seen to fail with an ImportError at the first save."""
    (tmp_path / "key").write_bytes(secrets.token_bytes(32))
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(
        ValueError, match=rf"checkpoint\.{option}: needs a package: pip install 'moe-dist\[encryption\]'"
    ):
        train(tmp_path / "run", **{option: str(tmp_path / "key")})
    assert not (tmp_path / "run").exists()


def test_a_sealed_run_shows_nothing_and_goes_on_bitwise(sealed: Path) -> None:
    """Seen to fail with the trainer's state written as it is, and with the shards written as they are."""
    plain = trained()
    assert SECRET.encode() in (plain / "checkpoint-4" / STATE_FILE).read_bytes()
    found = found_at(plain, 4)
    everything = [file.read_bytes() for file in sealed.glob("checkpoint-*/*") if file.name != FILE]
    assert len(everything) == 4
    values = dict(tensors(found, found.storage.manifest(4), Keys()))
    rows = [value.reshape(-1)[:8].numpy().tobytes() for value in values.values() if value.numel() >= 8]
    rows = [row for row in rows if len(set(row)) > 8]
    assert len(rows) > 50
    assert all(row in shard_of(plain / "checkpoint-4").read_bytes() for row in rows)
    assert digests(found_at(sealed, 4), Keys(["env:ONE"])) == digests(found)
    for content in everything:
        for word in (SECRET.encode(), b"learning_rate", b"w_gate_up", b"safetensors", *rows):
            assert word not in content
    assert SECRET.encode() not in (sealed / "checkpoint-4" / FILE).read_bytes()
    assert train(sealed, encryption_key="env:ONE", eval_steps=2).steps == 6
    assert digests(found_at(sealed, 6), Keys(["env:ONE"])) == digests(found_at(plain, 6))


def test_without_the_right_key_nothing_happens(sealed: Path) -> None:
    key = found_at(sealed, 4).storage.manifest(4).encryption
    assert key is not None
    for options, have in (({}, "none"), ({"encryption_key": "env:TWO"}, Keys(["env:TWO"]).keys[0].id)):
        with pytest.raises(ValueError, match=f"encrypted with key {key.key_id}; the keys at hand: {have}") as caught:
            train(sealed, eval_steps=2, **options)
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in sealed.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert whole(found_at(sealed, 4)) == []  # that every byte is right can be seen without a key


def test_a_key_is_replaced(sealed: Path) -> None:
    """The first of the list seals, all of them open; when no old step is left, the old key may go."""
    train(sealed, encryption_key=["env:TWO", "env:ONE"], eval_steps=2)
    assert digests(found_at(sealed, 6), Keys(["env:TWO"])) == digests(found_at(trained(), 6))
    with pytest.raises(CheckpointError, match="encrypted with key"):
        digests(found_at(sealed, 6), Keys(["env:ONE"]))
    assert train(sealed, encryption_key="env:TWO", max_steps=7).steps == 7


def test_encryption_can_begin_and_end_with_any_start(tmp_path: Path, keys: None) -> None:
    shutil.copytree(trained() / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    train(tmp_path / "run", encryption_key="env:ONE", max_steps=4, eval_steps=2)
    assert found_at(tmp_path / "run", 4).storage.manifest(4).encryption is not None
    train(tmp_path / "run", encryption_key="env:ONE", eval_steps=2)
    assert digests(found_at(tmp_path / "run", 6), Keys(["env:ONE"])) == digests(found_at(trained(), 6))


def hashed_again(checkpoint: Path, name: str) -> None:
    """The manifest made to fit a changed file, as somebody without the key could do it."""
    blake3 = hash_file(LocalStorage(checkpoint), name)
    entry = {"bytes": (checkpoint / name).stat().st_size, "blake3": blake3}
    rewrite_manifest(checkpoint, lambda body: body["files"].__setitem__(name, entry))


def opened(run: Path, step: int) -> str:
    """The complaint of opening everything in a checkpoint."""
    found = found_at(run, step)
    manifest = found.storage.manifest(step)
    assert whole(found) == []  # the manifest agrees: only the seal can know

    def read() -> None:
        read_trainer_state(found, manifest, Keys(["env:ONE"]))
        dict(tensors(found, manifest, Keys(["env:ONE"])))

    with pytest.raises(CheckpointError) as caught:
        read()
    return str(caught.value)


@pytest.mark.parametrize("what", ["bit", "other step", "other run", "other name"])
def test_a_forged_manifest_does_not_help(sealed: Path, tmp_path: Path, what: str) -> None:
    checkpoint, shard = sealed / "checkpoint-4", shard_of(sealed / "checkpoint-4")
    name = shard.name
    if what == "bit":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    elif what == "other step":
        shutil.copy(shard_of(sealed / "checkpoint-2"), shard)
    elif what == "other run":
        train(tmp_path / "second", encryption_key="env:ONE", max_steps=4, seed=2)
        shutil.copy(shard_of(tmp_path / "second" / "checkpoint-4"), shard)
    else:
        shutil.copy(shard, checkpoint / STATE_FILE)
        name = STATE_FILE
    hashed_again(checkpoint, name)
    assert f"{name}: its seal does not fit" in opened(sealed, 4)
    with pytest.raises(ValueError, match=FITS):
        train(sealed, encryption_key="env:ONE", eval_steps=2)


def test_reshard_replaces_the_key_and_verify_opens_the_seals(
    sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from launcher.cli import commands

    def say(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moe-dist", "checkpoint", *map(str, words)])
        return (commands.run(), *capsys.readouterr())

    source = sealed / "checkpoint-4"
    before = digests(found_at(sealed, 4), Keys(["env:ONE"]))
    old = ("--shards", 2, "--encryption-key", "env:ONE")
    assert say("reshard", source, tmp_path / "same", *old)[0] == 0
    assert digests(found_at(tmp_path / "same", 4), Keys(["env:ONE"])) == before
    assert say("reshard", source, tmp_path / "new", *old, "--seal-with", "env:TWO")[0] == 0
    assert digests(found_at(tmp_path / "new", 4), Keys(["env:TWO"])) == before
    code, out, _ = say("reshard", source, tmp_path / "open", *old, "--decrypt")
    assert (code, "plain; verified" in out) == (0, True)
    assert digests(found_at(tmp_path / "open", 4)) == before
    code, _, err = say("inspect", source)
    assert (code, "encrypted with key" in err) == (2, True)
    assert say("verify", source)[0] == 0
    assert say("verify", source, "--encryption-key", "env:TWO")[0] == 2
    assert say("verify", source, "--encryption-key", "env:ONE")[0] == 0
    content = bytearray((source / STATE_FILE).read_bytes())
    content[-1] ^= 1
    (source / STATE_FILE).write_bytes(content)
    hashed_again(source, STATE_FILE)
    assert say("verify", source)[0] == 0
    code, out, _ = say("verify", source, "--encryption-key", "env:ONE")
    assert code == 1
    assert f"{source}/{STATE_FILE}: {FITS}" in out


def test_the_key_is_in_no_file_and_in_no_log(sealed: Path) -> None:
    secret = os.environ["ONE"]
    for file in sealed.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert secret.encode() not in content
            assert bytes.fromhex(secret) not in content
    assert json.loads((sealed / "checkpoint-4" / FILE).read_text())["encryption"]["algorithm"] == "AES-256-GCM"


def test_reshard_keeps_the_signature_or_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy that a run with the signing key refuses is written on demand only, and nothing is signed on trust.

    Seen to fail with `sealing` made without the signing key, and with `_check_signature` left out.
    """
    from launcher.cli import commands

    def say(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moe-dist", "checkpoint", *map(str, words)])
        return (commands.run(), *capsys.readouterr())

    for name, text in (("ours", "11"), ("other", "22")):
        (tmp_path / name).write_text(text * 32)
    ours, other = ("--signing-key", tmp_path / "ours"), ("--signing-key", tmp_path / "other")
    train(tmp_path / "run", signing_key=str(tmp_path / "ours"), max_steps=2)
    source = tmp_path / "run/checkpoint-2"
    code, out, err = say("reshard", source, tmp_path / "bare", "--shards", 2)
    assert (code, out) == (2, "")
    assert "checkpoint-2: signed with key " in err
    assert "--signing-key" in err
    assert "--unsigned" in err
    code, _, err = say("reshard", source, tmp_path / "bare", "--shards", 2, *other)
    assert (code, "signed with another key" in err) == (2, True)
    code, _, err = say("reshard", source, tmp_path / "bare", "--shards", 2, "--sign-with", tmp_path / "other")
    assert (code, "signed with key " in err) == (2, True)
    assert not (tmp_path / "bare").exists()

    code, out, _ = say("reshard", source, tmp_path / "copy", "--shards", 2, *ours)
    assert (code, "plain, signed with key " in out) == (0, True)
    assert train(tmp_path / "copy", signing_key=str(tmp_path / "ours"), max_steps=3).steps == 3
    replaced = (*ours, "--sign-with", tmp_path / "other")
    assert say("reshard", source, tmp_path / "new", "--shards", 2, *replaced)[0] == 0
    assert say("verify", tmp_path / "new", *other)[0] == 0
    code, out, _ = say("verify", tmp_path / "new", *ours)
    assert (code, "signed with another key" in out) == (1, True)
    assert say("reshard", source, tmp_path / "open", "--shards", 2, "--unsigned")[0] == 0
    assert found_at(tmp_path / "open", 2).storage.manifest(2).signature is None
    signed_now = ("--shards", 2, "--sign-with", tmp_path / "ours")
    assert say("reshard", tmp_path / "open/checkpoint-2", tmp_path / "first", *signed_now)[0] == 0
    assert say("verify", tmp_path / "first", *ours)[0] == 0
