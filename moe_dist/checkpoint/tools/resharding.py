"""The same checkpoint in another number of files, or under another key; nothing in memory but one file to be."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from moe_dist.checkpoint.reading import CheckpointRef, read_trainer_state, whole
from moe_dist.checkpoint.shards import Piece, Shard
from moe_dist.checkpoint.storage import Storage
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.hashing import write_hashed
from moe_dist.checkpoint.storage.manifest import Box, CheckpointError, TensorEntry
from moe_dist.checkpoint.tools.inspecting import Tensors
from moe_dist.checkpoint.writing import Commit, Receipt, Saving


def cut(tensors: Mapping[str, TensorEntry], num_shards: int) -> list[list[Piece]]:
    """Pieces of each of `num_shards` files: dimension 0 (experts, rows) in even parts, what is too short to the
    emptiest file. Every element is in exactly one piece; no list is empty unless there are too few tensors."""
    files: list[list[Piece]] = [[] for _ in range(num_shards)]
    filled = [0] * num_shards
    small = []
    for name, entry in sorted(tensors.items()):
        shape = entry.shape
        if not shape or shape[0] < num_shards:
            small.append(Piece(name, (0,) * len(shape), shape, entry.dtype, shape))
            continue
        edges = [shape[0] * part // num_shards for part in range(num_shards + 1)]
        for index, (start, end) in enumerate(pairwise(edges)):
            offset, part = (start, *(0 for _ in shape[1:])), (end - start, *shape[1:])
            files[index].append(Piece(name, offset, part, entry.dtype, shape))
            filled[index] += files[index][-1].num_bytes
    for piece in sorted(small, key=lambda piece: (-piece.num_bytes, piece.name)):
        index = min(range(num_shards), key=lambda index: (filled[index], len(files[index])))
        files[index].append(piece)
        filled[index] += piece.num_bytes
    return [pieces for pieces in files if pieces]


def reshard(source: CheckpointRef, opening: Keys, storage: Storage, num_shards: int, sealing: Keys) -> CheckpointRef:
    """Write `source` into `num_shards` files as the same step of `storage`. Returns the new checkpoint, verified.

    `opening`: keys of the source; `sealing`: of the copy, empty for a plain one. The layout of the source stays in
    the manifest: it is what the global batch is computed from. Raises CheckpointError, also when that step is there.
    """
    wrong = whole(source)
    if wrong:
        raise CheckpointError(wrong[0])
    manifest = source.storage.manifest(source.step)
    state = read_trainer_state(source, manifest, opening)
    tensors = Tensors(source, manifest, opening)
    staging = storage.staging(source.step, manifest.generation)
    saving = Saving(storage, sealing, staging, source.step, manifest.run, manifest.generation, manifest.layout)
    made = CheckpointRef(storage, source.step)
    storage.refuse_existing(source.step)
    storage.begin(staging, manifest.generation)
    try:
        receipt = Receipt()
        for number, pieces in enumerate(cut(manifest.tensors, num_shards)):
            _write_shard(
                saving, tensors, Shard(f"shard-{manifest.generation}-{number:05d}.safetensors", pieces), receipt
            )
        shapes = {name: (entry.dtype, entry.shape) for name, entry in manifest.tensors.items()}
        Commit(saving, shapes, state, manifest.metrics, lambda: None, lambda: None)([receipt])
    except BaseException:
        storage.discard(staging, manifest.generation)
        raise
    finally:
        tensors.close()
    wrong = whole(made)
    if wrong:
        raise CheckpointError(f"what was written does not verify: {wrong[0]}")
    return made


def _write_shard(saving: Saving, tensors: Tensors, shard: Shard, receipt: Receipt) -> None:
    for piece, view in zip(shard.pieces, shard.views, strict=True):
        view.copy_(tensors.read_box(piece.name, piece.offset, piece.shape))
        box = Box(file=shard.file, offset=piece.offset, shape=piece.shape)
        receipt.boxes[piece.name] = (*receipt.boxes.get(piece.name, ()), box)
    content = shard.chunks() if saving.seal is None else saving.seal.seal(shard.file, shard.chunks())
    receipt.files[shard.file] = write_hashed(saving.storage, f"{saving.staging}/{shard.file}", content)
