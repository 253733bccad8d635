"""A folder of weights as step 0 of a run: a checkpoint like any other, with nothing trained yet and no moments."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_dist.checkpoint.lock import RunLock
from moe_dist.checkpoint.manager import check_room
from moe_dist.checkpoint.reading import CheckpointRef, whole
from moe_dist.checkpoint.run_folder import CONFIG, with_header
from moe_dist.checkpoint.shapes import MODEL
from moe_dist.checkpoint.shards import TORCH_DTYPES, Piece, Shard
from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.hashing import write_hashed
from moe_dist.checkpoint.storage.manifest import Box, CheckpointError
from moe_dist.checkpoint.tools.inspecting import Tensors
from moe_dist.checkpoint.writing import Commit, Receipt, Saving
from moe_dist.config import Config, ConfigError, dump_config, load_mapping
from moe_dist.config.huggingface import MODEL_TYPE, has_tokenizer
from moe_dist.pretrained.folder_weights import FolderWeights, HuggingFaceWeights, in_rows
from moe_dist.pretrained.own_format import OwnFolderWeights, read_own_config
from moe_dist.pretrained.provenance import changed, provenance, sha256_of
from moe_dist.pretrained.staging import refuse_existing

SHARD_BYTES = 2**30
"""Values of one file of the checkpoint, in memory while it is written."""
ALONE = {"world": 1, "pp": 1, "edp": 1, "ep": 1, "zero_stage": 0}


class Imported(NamedTuple):
    """What was written."""

    checkpoint: CheckpointRef
    num_tensors: int
    num_files: int
    num_bytes: int


def import_checkpoint(folder: Path, output: Path, shard_bytes: int = SHARD_BYTES) -> Imported:
    """Make the run folder `output` with `checkpoint-0` and a config.yaml to go on with. One process, no group.

    In memory is one file of the checkpoint, at most `shard_bytes` of float32 values or one row. Afterwards its hashes
    are checked, and every value is read again and compared with the folder's. Raises ConfigError for a folder that
    cannot be read and for an `output` that is there; then nothing is left.
    """
    refuse_existing(output)
    folder = Path(os.path.abspath(folder))
    is_own = _model_type(folder) == MODEL_TYPE
    tree: dict[str, Any] = {"train": {"output_dir": str(output)}}
    if is_own:
        model, temperature = read_own_config(folder / "config.json")
        tree |= {"model": model.model_dump(mode="json"), "balance": {"router_temperature": temperature}}
        if has_tokenizer(folder):
            tree["data"] = {"tokenizer": str(folder)}
    else:
        tree["model"] = {"from_pretrained": str(folder)}
    config = load_mapping(tree, notice=lambda text: None)
    weights: FolderWeights
    try:
        weights = (OwnFolderWeights if is_own else HuggingFaceWeights)(folder, config.model)
        hashes = sha256_of(folder, weights.files)
        if wrong := changed(folder, hashes):
            raise ValueError("; ".join(wrong))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return _write(weights, config, provenance(folder, hashes), output, shard_bytes)


def _model_type(folder: Path) -> Any:
    """What its config.json says; None where that cannot be read, which whoever reads on says."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        return json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    return None


def _write(weights: FolderWeights, config: Config, origin: dict[str, Any], output: Path, shard_bytes: int) -> Imported:
    lock = RunLock.acquire(output)
    storage = LocalStorage(output)
    found = CheckpointRef(storage, 0)
    staging = storage.staging(0, lock.generation)
    saving = Saving(storage, Keys(), staging, 0, lock.run, lock.generation, ALONE)
    committed = False
    try:
        check_room(storage, sum(4 * torch.Size(shape).numel() for shape in weights.shapes.values()))
        storage.begin(staging, lock.generation)
        receipt = _write_shards(weights, saving, shard_bytes)
        shapes = {f"{MODEL}{name}": (weights.dtype_of(name), shape) for name, shape in weights.shapes.items()}
        Commit(saving, shapes, _state(config, origin), {}, lambda: None, lambda: None)([receipt])
        committed = True
        if wrong := whole(found) or _differences(weights, found, shard_bytes):
            raise CheckpointError(f"what was written is not what the folder holds: {wrong[0]}")
        (output / CONFIG).write_bytes(with_header(dump_config(config), lock.run).encode())
        lock.begin(lock.run, ())
        manifest = storage.manifest(0)
        return Imported(found, len(manifest.tensors), len(manifest.files) - 1, manifest.num_bytes)
    except BaseException:
        storage.remove(found.folder) if committed else storage.discard(staging, lock.generation)
        (output / CONFIG).unlink(missing_ok=True)
        raise
    finally:
        lock.leave()


def _state(config: Config, origin: dict[str, Any]) -> dict[str, Any]:
    """What a trainer would have saved before its first step."""
    return {
        "counters": {"step": 0},
        "stopping": {"best_loss": None, "evaluations_without_improvement": 0},
        "data": {"samples_consumed": 0},
        "pretrained": origin,
        "config": config.model_dump(mode="json"),
    }


def _write_shards(weights: FolderWeights, saving: Saving, shard_bytes: int) -> Receipt:
    receipt = Receipt()
    for number, pieces in enumerate(_files(weights, shard_bytes)):
        shard = Shard(f"shard-{saving.generation}-{number:05d}.safetensors", pieces)
        for piece, view in zip(shard.pieces, shard.views, strict=True):
            name = piece.name.removeprefix(MODEL)
            first, count = (piece.offset[0], piece.shape[0]) if piece.shape else (0, 1)
            view.copy_(weights.read(name, first, count))
            box = Box(file=shard.file, offset=piece.offset, shape=piece.shape)
            receipt.boxes[piece.name] = (*receipt.boxes.get(piece.name, ()), box)
        receipt.files[shard.file] = write_hashed(saving.storage, f"{saving.staging}/{shard.file}", shard.chunks())
    return receipt


def _files(weights: FolderWeights, shard_bytes: int) -> list[list[Piece]]:
    """Pieces of each file, in the order of the model."""
    files: list[list[Piece]] = [[]]
    filled = 0
    for name, first, count in in_rows(weights.shapes, shard_bytes):
        shape = weights.shapes[name]
        offset, size = ((first, *(0 for _ in shape[1:])), (count, *shape[1:])) if shape else ((), ())
        piece = Piece(f"{MODEL}{name}", offset, size, weights.dtype_of(name), shape)
        if files[-1] and filled + piece.num_bytes > shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(piece)
        filled += piece.num_bytes
    return files


def _differences(weights: FolderWeights, found: CheckpointRef, max_bytes: int) -> list[str]:
    """Weights that are not the folder's, bit by bit, read again from both."""
    saved = Tensors(found, found.storage.manifest(0), Keys())
    wrong = {}
    for name, first, count in in_rows(weights.shapes, min(max_bytes, 2**26)):
        shape = weights.shapes[name]
        offset, size = ((first, *(0 for _ in shape[1:])), (count, *shape[1:])) if shape else ((), ())
        expected = weights.read(name, first, count).to(TORCH_DTYPES[weights.dtype_of(name)])
        if not torch.equal(expected.view(size), saved.read_box(f"{MODEL}{name}", offset, size)):
            wrong[name] = f"{found}: {MODEL}{name} is not the folder's"
        saved.close()  # files come one after the other: none is needed again, and each that is open takes memory
    return list(wrong.values())
