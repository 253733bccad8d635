"""The manifest: any wrong bit in it is found, and nothing it says can lead out of the folder or past a tensor."""

from __future__ import annotations

import itertools
import json
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.checkpoint.retention import to_remove
from moe_dist.checkpoint.storage.manifest import (
    Box,
    CheckpointError,
    FileEntry,
    Manifest,
    TensorEntry,
    box_key,
    check_cover,
    from_text,
    to_text,
)


def tree(**changed: Any) -> dict[str, Any]:
    entry = {"bytes": 3, "blake3": "1" * 64}
    boxes = [{"file": "a.safetensors", "offset": [row, 0], "shape": [2, 2]} for row in (0, 2)]
    return {
        "format": "moe-dist-checkpoint",
        "version": 1,
        "step": 3,
        "run": "ab",
        "generation": 1,
        "created": "2026-01-01T00:00:00Z",
        "layout": {"world": 2, "pp": 1, "edp": 2, "ep": 1},
        "config_sha256": "0" * 64,
        "metrics": {"eval_loss": 2.5},
        "encryption": None,
        "files": {"trainer_state.json": entry, "a.safetensors": entry},
        "tensors": {"w": {"dtype": "F32", "shape": [4, 2], "boxes": boxes}},
    } | changed


def manifest(**changed: Any) -> Manifest:
    return Manifest.model_validate_json(json.dumps(tree(**changed)))


def test_round_trip() -> None:
    text = to_text(manifest())
    assert from_text(text, "here") == manifest()
    assert to_text(from_text(text, "here")) == text


def test_every_single_bit_counts() -> None:
    """Seen to fail with the comparison against the canonical text left out: some flips change nothing one would
    miss, such as a capital in an escape, and pass."""
    text = to_text(manifest(tensors=tree()["tensors"] | {"caf\u00e9": tree()["tensors"]["w"]}))
    for bit in range(len(text) * 8):
        damaged = bytearray(text)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CheckpointError, match=r"^here: damaged"):
            from_text(bytes(damaged), "here")


def test_every_cut_counts() -> None:
    text = to_text(manifest())
    for length in range(len(text)):
        with pytest.raises(CheckpointError):
            from_text(text[:length], "here")
    with pytest.raises(CheckpointError):
        from_text(text + b" ", "here")


BOX = {"file": "a.safetensors", "offset": [0, 0], "shape": [4, 2]}
FILE = {"bytes": 3, "blake3": "1" * 64}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"files": {"trainer_state.json": FILE, "../a.safetensors": FILE}}, "is not a plain one"),
        ({"files": {"trainer_state.json": FILE, "/etc/passwd": FILE}}, "is not a plain one"),
        ({"files": {"trainer_state.json": FILE, ".hidden": FILE}}, "is not a plain one"),
        ({"files": {"trainer_state.json": FILE, "manifest.json": FILE}}, "is not a plain one"),
        ({"files": {"a.safetensors": FILE}}, "trainer_state.json is not among"),
        ({"tensors": {"w": {"dtype": "F32", "shape": [4, 2], "boxes": [BOX | {"file": "b.safetensors"}]}}}, "its file"),
        ({"tensors": {"w": {"dtype": "F32", "shape": [4, 2], "boxes": [BOX | {"shape": [3, 2]}]}}}, "hold 6 values of"),
        ({"tensors": {"w": {"dtype": "F32", "shape": [4, 2], "boxes": [BOX | {"offset": [1, 0]}]}}}, "leaves"),
        ({"tensors": {"w": {"dtype": "F32", "shape": [4, 2], "boxes": [BOX | {"shape": [8]}]}}}, "dimensions"),
        ({"tensors": {"w": {"dtype": "F32", "shape": [4, 2], "boxes": []}}}, "at least 1"),
        ({"tensors": {"w": {"dtype": "Q4", "shape": [4, 2], "boxes": [BOX]}}}, "dtype"),
        ({"tensors": {"w": {"dtype": "F32", "shape": [-4, 2], "boxes": [BOX]}}}, "greater than or equal"),
        ({"step": "3"}, "valid integer"),
        ({"step": -1}, "greater than or equal"),
        ({"version": 2}, "Input should be 1"),
        ({"extra": 1}, "Extra inputs"),
        ({"run": "../../x"}, "match pattern"),
    ],
)
def test_refused(changed: dict, said: str) -> None:
    body = tree(**changed)
    import hashlib

    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    body["checksum"] = hashlib.sha256(canonical).hexdigest()
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    with pytest.raises(CheckpointError, match=said):
        from_text(text, "here")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b"{", b"[" * 100000, b'{"a": 1, "a": 2}', b"\xff\xfe", b'{"step": NaN}'], ids=repr
)
def test_garbage_is_refused(text: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^here: damaged"):
        from_text(text, "here")


@given(st.data())
def test_exact_cover(data: st.DataObject) -> None:
    """Any grid of boxes covers; one moved, left out, doubled or grown does not.

    Seen to fail with the pairwise test left out, where a doubled box hides one left out.
    """
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    cuts = [sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=3))}) for size in shape]
    spans = [list(itertools.pairwise(cut)) for cut in cuts]
    boxes = [
        Box(file="a", offset=tuple(start for start, _ in place), shape=tuple(end - start for start, end in place))
        for place in itertools.product(*spans)
    ]
    boxes = data.draw(st.permutations(boxes))
    check_cover("w", TensorEntry(dtype="F32", shape=tuple(shape), boxes=tuple(boxes)))
    if len(boxes) < 2:
        return
    victim, other = boxes[0], boxes[1]
    wrong: list[list[Box]] = [boxes[1:], [*boxes, victim]]
    if math.prod(victim.shape) == math.prod(other.shape):
        wrong.append([other, *boxes[1:]])
    for listed in wrong:
        with pytest.raises(ValueError, match=r"^w: "):
            check_cover("w", TensorEntry(dtype="F32", shape=tuple(shape), boxes=tuple(listed)))


def test_box_key() -> None:
    part = Box(file="a", offset=(4, 0), shape=(4, 2))
    assert box_key("w", part, (8, 2)) == "w[4:8,0:2]"
    assert box_key("w", part, (4, 2)) == "w"
    assert box_key("step", Box(file="a", offset=(), shape=()), ()) == "step"


def test_files_hold_no_more_than_they_are() -> None:
    with pytest.raises(ValueError, match="bytes"):
        FileEntry(bytes=-1, blake3="1" * 64)


@given(
    steps=st.lists(st.integers(1, 50), unique=True, min_size=1),
    limit=st.integers(1, 5),
    every=st.integers(0, 10),
    known=st.dictionaries(st.integers(1, 50), st.floats(0, 9), max_size=20),
    best=st.booleans(),
)
def test_what_stays(steps: list[int], limit: int, every: int, known: dict[int, float], best: bool) -> None:
    """The newest always stays, the best ones do, and never more go than must."""
    gone = to_remove(steps, limit=limit, keep_every=every, metrics=known if best else None)
    stay = set(steps) - set(gone)
    assert max(steps) in stay
    assert {step for step in steps if every and step % every == 0} <= stay
    assert len(stay) >= min(limit, len(steps))
    if not best:
        assert set(sorted(steps)[-limit:]) <= stay
    elif any(step in known for step in steps):
        assert min((known[step], -step) for step in steps if step in known)[1] * -1 in stay
    assert to_remove(sorted(stay), limit=limit, keep_every=every, metrics=known if best else None) == []
    assert to_remove(steps, limit=None) == []


def test_many_boxes_take_no_more_than_their_number() -> None:
    """4,000 experts stacked in a row, each a box, as a wide model has them; and with one doubled it is named.

    A ratio of processor times: 4 for a sweep, 16 when each box is held against the others (as it was: 20 s for 4,000).
    """

    def strip(count: int) -> list[Box]:
        return [Box(file="a.safetensors", offset=(0, row, 0), shape=(3, 1, 4)) for row in range(count)]

    def seconds(count: int) -> float:
        tensor = TensorEntry(dtype="F32", shape=(3, count, 4), boxes=tuple(strip(count)))
        before = time.process_time()
        check_cover("w", tensor)
        return time.process_time() - before

    small, large = (min(seconds(count) for _ in range(3)) for count in (1000, 4000))
    assert large < 9 * small
    boxes = strip(4000)
    boxes[2000] = boxes[1999]
    with pytest.raises(ValueError, match=r"w: boxes at \[0, 1999, 0\] and \[0, 1999, 0\] overlap"):
        check_cover("w", TensorEntry(dtype="F32", shape=(3, 4000, 4), boxes=tuple(boxes)))
