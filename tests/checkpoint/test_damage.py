"""Everything a disk, a copy gone wrong or a joker can do to a checkpoint: found before a weight is touched, by name.

Bits are flipped by `tools/flip.py`; 10,000 of them are recorded in docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from saved import canonical, copy_of, found_at, rewrite_manifest, shard_of, train, trained

from moe_dist.checkpoint.reading import CheckpointRef, whole
from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.checkpoint.storage import manifest as manifests
from moe_dist.checkpoint.storage.manifest import FILE, STATE_FILE, CheckpointError, from_text, to_text
from moe_dist.checkpoint.tools.flipping import Weights, flip, load
from moe_dist.checkpoint.tools.inspecting import digests
from moe_dist.checkpoint.tools.listing import listed
from moe_dist.checkpoint.tools.resharding import Keys, reshard


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 2, 4 and 6, the newest in three shards."""
    copy_of(trained(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    reshard(found_at(trained(), 6), Keys(), LocalStorage(tmp_path / "run"), 3, Keys())
    return tmp_path / "run"


def refused(run: Path, what: str, step: int = 6) -> str:
    """Asked for by name it is one clear error and nothing is loaded; `whole` finds it too. Returns the words."""
    storage = LocalStorage(run)
    state = Weights(storage, 2)
    reason = load(storage, step, state)
    assert reason is not None
    assert not state.touched
    assert what in reason
    assert "\n" not in reason
    assert any(what in line for line in whole(found_at(run, step)))
    return reason


def falls_back(run: Path) -> None:
    """Left to itself a run takes the step before, says so, and gets where it would have got."""
    result = train(run, max_steps=5, save_at_end=False, save_steps=0)
    assert (result.steps, len(result.losses)) == (5, 1)
    assert "checkpoint-6 is not used: " in (run / "train.log").read_text()


@pytest.mark.parametrize("seed", [1, 2])
def test_500_flips(tmp_path: Path, seed: int) -> None:
    """Seen to fail with the comparison of hashes left out of `problems`, and without the manifest's checksum."""
    checkpoint = copy_of(trained(), tmp_path / "run") / "checkpoint-6"
    done, detected, applied = flip(checkpoint, 250, seed)
    assert set(done) == {FILE, STATE_FILE, "shards"}
    assert detected == done
    assert applied == 0


@pytest.mark.parametrize("name", ["shard-1-00001.safetensors", STATE_FILE])
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "long", "doubled", "folder", "link", "socket"])
def test_one_file(run: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = run / "checkpoint-6" / name
    content = file.read_bytes()
    if damage in ("missing", "folder", "link", "socket"):
        file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage == "link":  # to the very same bytes: what it leads to may change after it was looked at
        (run / "aside").write_bytes(content)
        file.symlink_to(run / "aside")
    elif damage == "socket":
        monkeypatch.chdir(file.parent)
        socket.socket(socket.AF_UNIX).bind(name)
    elif damage != "missing":
        file.write_bytes({"empty": b"", "short": content[:-1], "long": content + b"\0", "doubled": content * 2}[damage])
    expected = (
        f"{len(file.read_bytes())} bytes instead of" if damage in ("empty", "short", "long", "doubled") else ": missing"
    )
    reason = refused(run, f"{file}: {expected}" if "bytes" in expected else f"{file}{expected}")
    if name != STATE_FILE:
        assert "(holds model." in reason or "(holds optimizer." in reason
    falls_back(run)


def test_shards_of_two_ranks_swapped(run: Path) -> None:
    one, two = (run / "checkpoint-6" / f"shard-1-0000{index}.safetensors" for index in (0, 1))
    one.rename(run / "aside")
    two.rename(one)
    (run / "aside").rename(two)
    refused(run, f"{one}: ")
    falls_back(run)


@pytest.mark.parametrize("name", ["shard-1-00000.safetensors", STATE_FILE, FILE])
def test_a_file_of_another_step(run: Path, name: str) -> None:
    """Same name, same length, all of it well-formed."""
    shutil.rmtree(run / "checkpoint-6")
    shutil.copytree(trained() / "checkpoint-6", run / "checkpoint-6")
    shutil.copy(run / "checkpoint-4" / name, run / "checkpoint-6" / name)
    refused(run, f"{run}/checkpoint-6/{name}: ")


@pytest.mark.parametrize("name", ["shard-1-00000.safetensors", STATE_FILE, FILE])
def test_a_file_of_another_run(run: Path, name: str) -> None:
    shutil.rmtree(run / "checkpoint-6")
    shutil.copytree(trained() / "checkpoint-6", run / "checkpoint-6")
    shutil.copy(trained(2) / "checkpoint-6" / name, run / "checkpoint-6" / name)
    # The other run's manifest names files that are not these; its own shard does not fit this manifest.
    refused(run, f"{run}/checkpoint-6/")


def test_a_file_too_many_is_told(run: Path) -> None:
    """It is not read, so the checkpoint can be used; `verify` says that somebody has been there."""
    (run / "checkpoint-6" / "weights.pkl").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    assert whole(found_at(run, 6)) == [f"{run}/checkpoint-6/weights.pkl: not part of the checkpoint"]
    assert load(LocalStorage(run), 6, Weights(LocalStorage(run), 2)) is None


def _put(body: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        body = body[int(parent) if isinstance(body, list) else parent]
    body[last] = value


STACK = "tensors/model.layers.0.moe.experts.w_down"


def rename_file(body: dict[str, Any], name: str) -> None:
    """A file under another name, everywhere."""
    old = "shard-1-00000.safetensors"
    body["files"][name] = body["files"].pop(old)
    for tensor in body["tensors"].values():
        for box in tensor["boxes"]:
            box["file"] = name if box["file"] == old else box["file"]


FORGED: dict[str, Callable[[dict[str, Any]], None]] = {
    **{
        f"file {name!r}"[:40]: lambda body, name=name: rename_file(body, name)
        for name in (
            "../shard.safetensors",
            "/etc/passwd",
            "..",
            ".",
            "",
            "a/b.safetensors",
            "a\\b.safetensors",
            "sh\0ard.safetensors",
            ".hidden.safetensors",
            "x" * 200 + ".safetensors",
            "manifest.json",
            "sh\u00e4rd.safetensors",
            "shard.safetensors\n",
            "shard.pkl",
        )
    },
    "unknown key": lambda body: _put(body, "extra", 1),
    "unknown version": lambda body: _put(body, "version", 2),
    "another format": lambda body: _put(body, "format", "pickle"),
    "step as text": lambda body: _put(body, "step", "6"),
    "step negative": lambda body: _put(body, "step", -6),
    "step of another": lambda body: _put(body, "step", 4),
    "step huge": lambda body: _put(body, "step", 10**30),
    "no state": lambda body: body["files"].pop(STATE_FILE),
    "no files": lambda body: _put(body, "files", {}),
    "no tensors key": lambda body: body.pop("tensors"),
    "files is a list": lambda body: _put(body, "files", []),
    "hash too short": lambda body: _put(body, f"files/{STATE_FILE}/blake3", "ab"),
    "negative bytes": lambda body: _put(body, f"files/{STATE_FILE}/bytes", -1),
    "unknown dtype": lambda body: _put(body, f"{STACK}/dtype", "OBJECT"),
    "negative shape": lambda body: _put(body, f"{STACK}/shape", [-4, 16, 16]),
    "shape too large": lambda body: _put(body, f"{STACK}/shape", [40, 16, 16]),
    "shape too small": lambda body: _put(body, f"{STACK}/shape", [3, 16, 16]),
    "too many dimensions": lambda body: _put(body, f"{STACK}/shape", [1] * 20),
    "no boxes": lambda body: _put(body, f"{STACK}/boxes", []),
    "a box twice": lambda body: body["tensors"][STACK[8:]]["boxes"].append(body["tensors"][STACK[8:]]["boxes"][0]),
    "a box less": lambda body: body["tensors"][STACK[8:]]["boxes"].pop(),
    "a box moved": lambda body: _put(body, f"{STACK}/boxes/0/offset", [1, 0, 0]),
    "a box elsewhere": lambda body: _put(body, f"{STACK}/boxes/0/file", "shard-1-00099.safetensors"),
    "a box in the state": lambda body: _put(body, f"{STACK}/boxes/0/file", STATE_FILE),
    "unknown cipher": lambda body: _put(body, "encryption", {"algorithm": "ROT13", "key_id": "0" * 16}),
    "no layout": lambda body: _put(body, "layout", {}),
    "a run that is a path": lambda body: _put(body, "run", "../.."),
    "nameless tensor": lambda body: _put(body, "tensors", {"": body["tensors"][STACK[8:]]}),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_manifest_that_says_what_it_must_not(run: Path, what: str) -> None:
    """With its checksum made right, so that the schema has to see it."""
    rewrite_manifest(run / "checkpoint-6", FORGED[what])
    with pytest.raises(CheckpointError, match="damaged: ") as caught:
        LocalStorage(run).manifest(6)
    assert "checksum" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    refused(run, "damaged: ")


def test_a_renamed_tensor_is_not_loaded_under_its_new_name(run: Path) -> None:
    """Two tensors of one shape change places in the manifest: the files know them by name."""

    def swap(body: dict[str, Any]) -> None:
        tensors = body["tensors"]
        one, two = "model.layers.0.moe.experts.w_down", "model.layers.1.moe.experts.w_down"
        for index, box in enumerate(tensors[one]["boxes"]):
            box["file"] = "shard-1-00002.safetensors" if index == 0 else box["file"]
        del tensors[two]

    rewrite_manifest(run / "checkpoint-6", swap)
    state = Weights(LocalStorage(run), 2)
    reason = load(LocalStorage(run), 6, state)
    assert reason is not None
    assert "optimizer.layers.1.moe.experts.w_down" in reason  # moments of a weight that is not there
    assert "no weight of the model" in reason
    assert not state.touched


def _deep(_: bytes) -> bytes:
    return b"[" * 500_000


def _edited(good: bytes) -> bytes:
    return good.replace(b'"step":6', b'"step": 6')


def _twice(good: bytes) -> bytes:
    body = json.loads(good)
    return canonical(body).replace(b'"step":6', b'"step":6,"step":6')


GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "zeros": lambda good: bytes(len(good)),
    "text": lambda good: b"not JSON at all\n",
    "binary": lambda good: bytes(range(256)) * 40,
    "cut": lambda good: good[:-10],
    "twice in a row": lambda good: good + good,
    "blank at the end": lambda good: good + b" ",
    "nested": _deep,
    "objects nested": lambda good: b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "a key twice": _twice,
    "edited": _edited,
    "null": lambda good: b"null\n",
    "a list": lambda good: b"[]\n",
    "a number": lambda good: b"1" * 10_000,
    "infinity": lambda good: good.replace(b'"step":6', b'"step":Infinity'),
    "not UTF-8": lambda good: good.replace(b"moe-dist", b"moe\xff\xfest"),
    "half a character": lambda good: good.replace(b"moe-dist", b"\\ud800"),
    "no checksum": lambda good: canonical({k: v for k, v in json.loads(good).items() if k != "checksum"}),
    "checksum null": lambda good: canonical(json.loads(good) | {"checksum": None}),
    "pickle": lambda good: b"\x80\x04cos\nsystem\n\x94.",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_manifest_that_is_none(run: Path, what: str) -> None:
    file = run / "checkpoint-6" / FILE
    file.write_bytes(GARBAGE[what](file.read_bytes()))
    refused(run, f"{file}: damaged: ")
    if what in ("empty", "nested", "cut"):
        falls_back(run)


def test_a_manifest_too_long_is_not_read(run: Path) -> None:
    """Terabytes of zeros, which a sparse file has at once."""
    file = run / "checkpoint-6" / FILE
    os.truncate(file, 2**40)
    refused(run, f"{file}: longer than the {manifests.MAX_BYTES} bytes it may have")


@pytest.mark.parametrize("damage", ["deleted", "a link", "the folder a link"])
def test_a_step_without_its_manifest(run: Path, damage: str) -> None:
    """On disk a step gets its name together with its manifest, so this is damage and said like any other; a link may
    lead to something else tomorrow. When no step has one, it is not the beginning of a run.

    Seen to fail with only folders that have a manifest looked at: a silent fresh start.
    """
    for step in (6, 4, 2):
        folder = run / f"checkpoint-{step}"
        if damage == "the folder a link":
            folder.rename(run / f"moved-{step}")
            folder.symlink_to(run / f"moved-{step}")
        else:
            (folder / FILE).rename(run / f"moved-{step}")
            if damage == "a link":
                (folder / FILE).symlink_to(run / f"moved-{step}")
        if step == 6:
            refused(run, "checkpoint-6: is a link, and" if "folder" in damage else "no complete checkpoint there")
            assert [row.manifest is None for row in map(listed, storage_of(run))] == [False, False, True]
            falls_back(run)
            assert LocalStorage(run).candidates() == [2, 4]
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* can be used"):
        train(run)
    assert LocalStorage(run).leftovers() == []


def storage_of(run: Path) -> list[CheckpointRef]:
    storage = LocalStorage(run)
    return [CheckpointRef(storage, step) for step in storage.candidates()]


def test_a_good_manifest_comes_through_as_it_was() -> None:
    text = (trained() / "checkpoint-6" / FILE).read_bytes()
    assert to_text(from_text(text, "here")) == text


def test_when_all_are_bad_it_does_not_start_afresh(run: Path) -> None:
    """Seen to fail with `choose` returning None at its end."""
    for step in (2, 4, 6):
        os.truncate(shard_of(run / f"checkpoint-{step}"), 100)
    with pytest.raises(
        ValueError, match=r"none of the 3 checkpoints in .* can be used, the newest because of"
    ) as caught:
        train(run)
    assert "100 bytes instead of" in str(caught.value)
    assert "checkpoint.resume=never" in str(caught.value)
    assert len(list(run.glob("checkpoint-*"))) == 3


def test_a_step_asked_for_by_name_is_that_or_none(run: Path) -> None:
    os.truncate(shard_of(run / "checkpoint-6"), 100)
    for wanted in ("6", str(run / "checkpoint-6")):
        with pytest.raises(ValueError, match=f"checkpoint.resume={wanted}: .*100 bytes instead of"):
            train(run, resume=wanted)


def test_damage_between_looking_and_loading_is_not_silent(run: Path) -> None:
    """A header that no longer fits its manifest is an error of the file, not a crash."""
    storage = LocalStorage(run)
    shard = shard_of(run / "checkpoint-6")
    content = shard.read_bytes()
    for bad in (b"", content[:100], b"\xff" * 8 + content[8:], bytes(8) + content[8:]):
        shard.write_bytes(bad)
        with pytest.raises(CheckpointError, match=shard.name):
            digests(found_at(run, 6))
    assert storage.steps() == [2, 4, 6]
