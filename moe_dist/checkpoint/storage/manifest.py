"""What a committed checkpoint says of itself: one JSON file that names every file and every tensor. Imports no torch.

A checkpoint is a folder of safetensors files, `trainer_state.json` and `manifest.json`. A tensor may be cut into
boxes, one file each; together they cover it exactly once. The text is canonical and carries its own SHA-256, so
that one wrong bit in it is found as surely as one in a file it names.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FILE = "manifest.json"
STATE_FILE = "trainer_state.json"
MAX_BYTES = 256 * 2**20
"""A longer manifest is not read."""
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""safetensors' names and bytes per value."""
_MAX_CUT = 6
"""Dimensions in which one tensor is cut; a box has 2 to the power of it corners."""
_BASENAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Size = Annotated[int, Field(ge=0, le=2**53)]
Sizes = Annotated[tuple[Size, ...], Field(max_length=16)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the text names it and what is wrong with it."""


class Strict(BaseModel):
    """Nothing unknown, nothing converted, nothing changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(Strict):
    """One file: its length in bytes and BLAKE3."""

    bytes: Size
    blake3: Hash


class Box(Strict):
    """A block of a tensor and the file that holds it, under `box_key(...)`."""

    file: str
    offset: Sizes
    shape: Sizes


class TensorEntry(Strict):
    """One logical tensor. `dtype` is safetensors' name."""

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: Sizes
    boxes: Annotated[tuple[Box, ...], Field(min_length=1)]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype]


class Sealed(Strict):
    """How the other files are encrypted. `key_id`: which key opens them, without telling it."""

    algorithm: Literal["AES-256-GCM"]
    key_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class Signature(Strict):
    """Who has written the manifest. `key_id`: of the public key."""

    key_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    ed25519: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class Manifest(Strict):
    """One committed step. Validated: exact cover of every tensor, plain file names, nothing named twice."""

    format: Literal["moe-dist-checkpoint"] = "moe-dist-checkpoint"
    version: Literal[1] = 1
    step: Size
    run: Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
    """The run that wrote it."""
    generation: Size
    """The start of that run, counted from 1: an older start must not write after a newer one."""
    created: str
    """UTC, ISO 8601."""
    layout: dict[str, int]
    """World, pp, edp and ep size (and zero_stage) it was written under; any other can read it."""
    config_sha256: Hash
    """Of the configuration in trainer_state.json."""
    metrics: dict[str, float]
    """Such as eval_loss, when known at this step."""
    pretrained: dict[str, Hash] | None = None
    """Files of the Hugging Face model that the run has started from, and their SHA-256."""
    encryption: Sealed | None = None
    signature: Signature | None = None
    files: Annotated[dict[str, FileEntry], Field(min_length=1)]
    tensors: dict[str, TensorEntry]

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        if any(self.layout.get(axis, 0) < 1 for axis in ("world", "pp", "edp", "ep")):
            raise ValueError(f"layout {self.layout} does not say how many ranks wrote it")
        for name in self.files:
            if not _BASENAME.fullmatch(name) or name == FILE:
                raise ValueError(f"file name {name!r} is not a plain one")
        if STATE_FILE not in self.files:
            raise ValueError(f"{STATE_FILE} is not among the files")
        for name, tensor in self.tensors.items():
            if not 0 < len(name) <= 512:
                raise ValueError(f"tensor name {name[:60]!r}... is empty or too long")
            check_cover(name, tensor)
            for box in tensor.boxes:
                if box.file not in self.files or not box.file.endswith(".safetensors"):
                    raise ValueError(f"{name}: its file {box.file!r} is not among the files")
        return self

    @property
    def num_bytes(self) -> int:
        """Length of all files together, without the manifest."""
        return sum(entry.bytes for entry in self.files.values())


def box_key(name: str, box: Box, shape: tuple[int, ...]) -> str:
    """Name of a box inside its safetensors file: the tensor's, with the slice unless it is the whole tensor.

    `model.layers.0.moe.experts.w_down[4:8,0:64,0:32]`
    """
    if box.shape == tuple(shape):
        return name
    ranges = (f"{start}:{start + size}" for start, size in zip(box.offset, box.shape, strict=True))
    return f"{name}[{','.join(ranges)}]"


def check_cover(name: str, tensor: TensorEntry) -> None:
    """Every element is in exactly one box, in time that grows with their number. Raises ValueError naming the tensor.

    How often an element is covered is the sum, over all corners at or before it in every dimension, of +1 for a corner
    that opens a box and -1 for one that closes it (by turns in each dimension). So boxes cover each element once
    exactly when their corners, added up, are those of the tensor; and the first corner that is left over is an element
    covered too often, or never.
    """
    boxes, dims = tensor.boxes, len(tensor.shape)
    for box in boxes:
        if len(box.offset) != dims or len(box.shape) != dims:
            raise ValueError(f"{name}: a box of {len(box.shape)} dimensions in a tensor of {dims}")
        ends = (start + size <= whole for start, size, whole in zip(box.offset, box.shape, tensor.shape, strict=True))
        if not all(ends):
            raise ValueError(f"{name}: box at {list(box.offset)} of {list(box.shape)} leaves {list(tensor.shape)}")
    covered = sum(math.prod(box.shape) for box in boxes)
    if covered != math.prod(tensor.shape):
        raise ValueError(f"{name}: its boxes hold {covered} values of {math.prod(tensor.shape)}")
    # A dimension that no box cuts is the same for all of them.
    cut = [dim for dim, whole in enumerate(tensor.shape) if any(box.shape[dim] != whole for box in boxes)]
    if len(cut) > _MAX_CUT:
        raise ValueError(f"{name}: cut in {len(cut)} dimensions; at most {_MAX_CUT} are read")
    corners: Counter[tuple[int, ...]] = Counter()
    for box in boxes:
        if math.prod(box.shape):
            _add_corners(corners, [(box.offset[dim], box.offset[dim] + box.shape[dim]) for dim in cut], 1)
    if math.prod(tensor.shape):
        _add_corners(corners, [(0, tensor.shape[dim]) for dim in cut], -1)
    wrong = min((corner for corner, count in corners.items() if count), default=None)
    if wrong is not None:
        there = [box for box in boxes if _holds(box, cut, wrong)]
        if len(there) < 2:
            raise ValueError(f"{name}: no box holds the value at {list(wrong)} (dimensions {cut})")
        raise ValueError(f"{name}: boxes at {list(there[0].offset)} and {list(there[1].offset)} overlap")


def _add_corners(corners: Counter[tuple[int, ...]], ranges: list[tuple[int, int]], sign: int) -> None:
    found: list[tuple[tuple[int, ...], int]] = [((), sign)]
    for start, end in ranges:
        found = [pair for corner, one in found for pair in (((*corner, start), one), ((*corner, end), -one))]
    for corner, one in found:
        corners[corner] += one


def _holds(box: Box, cut: list[int], element: tuple[int, ...]) -> bool:
    return math.prod(box.shape) > 0 and all(
        box.offset[dim] <= index < box.offset[dim] + box.shape[dim] for dim, index in zip(cut, element, strict=True)
    )


def to_text(manifest: Manifest) -> bytes:
    """The canonical text, with its checksum."""
    body = manifest.model_dump(mode="json")
    if manifest.pretrained is None:  # as manifests were before there was the key
        del body["pretrained"]
    return _canonical(body | {"checksum": hashlib.sha256(_canonical(body)).hexdigest()})


def signed_text(manifest: Manifest) -> bytes:
    """What a signature is of: everything but the signature. Keys without a value are left out: another version may not
    have them."""
    return _canonical(manifest.model_dump(mode="json", exclude={"signature"}, exclude_none=True))


def from_text(text: bytes, where: str) -> Manifest:
    """Read what `to_text` wrote. Raises CheckpointError naming `where` for anything else."""
    if len(text) > MAX_BYTES:
        raise CheckpointError(f"{where}: {len(text)} bytes are too many for a manifest")
    try:
        body = json.loads(text, object_pairs_hook=_no_repeats)
        if not isinstance(body, dict):
            raise ValueError("not an object")
        checksum = body.pop("checksum", None)
        if checksum != hashlib.sha256(_canonical(body)).hexdigest():
            raise ValueError("its checksum does not fit its content")
        if text != _canonical(body | {"checksum": checksum}):
            raise ValueError("it has been edited")
        return Manifest.model_validate_json(_canonical(body))
    except RecursionError:
        raise CheckpointError(f"{where}: damaged: nested too deeply") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{where}: damaged: {field}: {first['msg']}") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: damaged: {error}") from None


def _canonical(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.encode() + b"\n"


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found
