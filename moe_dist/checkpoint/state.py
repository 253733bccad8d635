"""A run's tensors by logical name, planned by PyTorch's own planners: what this rank writes, what it must read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan as DistributedSavePlan
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moe_dist.checkpoint.shapes import MODEL, OPTIMIZER, SAVE_WEIGHTS, weight_source, wrong_moments, wrong_weights
from moe_dist.checkpoint.shards import NAMES, TORCH_DTYPES, Piece, ShardReader
from moe_dist.checkpoint.storage.manifest import Box, CheckpointError, Manifest, TensorEntry
from moe_dist.models.shapes import stack_of
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.dtensor_layout import like_expert, like_parameter
from moe_dist.parallel.engines.base import Engine
from moe_dist.parallel.mesh import Mesh


class LogicalState:
    """Tensors by logical name for writing or reading in place, with the copies that reading must put back.

    Weights are in full precision whatever the model computes in: where it has masters, those are its weights. Reading
    fills them; `state_loaded` of the engine comes after. Without `moments` the optimizer's state is left out.
    """

    def __init__(self, model: Transformer, engine: Engine, mesh: Mesh, moments: bool = True) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.put_back: list[tuple[list[Tensor], Tensor]] = []
        self.model_shapes = model.saved_shapes
        parameters, stacked = engine.held_parameters(every_name=True), model.stacked_names()
        masters = {parameters[name]: master for name, master in model.masters.items()}

        def logical(name: str, tensor: Tensor) -> Tensor:
            stack, is_one = stack_of(name)
            if stack not in parameters or not tensor.ndim:  # a buffer is the same on every rank, as a count of steps
                return tensor
            if is_one:
                return like_expert(tensor, parameters[stack])
            return like_parameter(tensor, parameters[name], name in stacked, mesh)

        for name, tensor in model.state_dict().items():
            if name not in self.model_shapes and name in model.logical_shapes:
                continue  # frozen, and read again from where it came from
            if name in parameters:
                tensor = masters.get(parameters[name], tensor)
            self.tensors[f"model.{name}"] = logical(name, tensor)

        for name, key, tensors, split in engine.named_state() if moments else ():
            tensor = tensors[0]
            if split:
                tensor = torch.stack(tensors)
                self.put_back.append((tensors, tensor))
            self.tensors[f"optimizer.{name}.{key}"] = logical(name, tensor)

    def leave_out(self, names: set[str]) -> None:
        """Do not read these: they stay as they are."""
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name not in names}

    def wrong_shapes(self) -> list[str]:
        """What this rank holds of another shape than the model of this configuration has, in one process or in any
        layout."""
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        return [*wrong_weights(found, self.model_shapes), *wrong_moments(found, self.model_shapes)]

    def finish_reading(self) -> None:
        """Put what was read into copies where it belongs."""
        for tensors, whole in self.put_back:
            for tensor, value in zip(tensors, whole.unbind(0), strict=True):
                tensor.copy_(value)


class SavePlan:
    """Which pieces this rank writes. Replicas share out what they hold alike, by size; planned once for a run."""

    def __init__(self, state: LogicalState, mesh: Mesh) -> None:
        """A collective: every rank learns what all of them write."""
        self.names = frozenset(state.tensors)
        self._planner = self._planner_of(state)
        local = self._planner.create_local_plan()
        plans = [_plan(rows) for rows in mesh.from_all([_row(item) for item in local.items])]
        plans, metadata = self._planner.create_global_plan(plans)  # the same on every rank
        self.plan = self._planner.finish_plan(plans[mesh.rank])
        self.metadata = metadata
        self.items = {}
        for item in self.plan.items:
            data = item.tensor_data
            assert data is not None
            piece = Piece(
                item.index.fqn,
                tuple(data.chunk.offsets),
                tuple(data.chunk.sizes),
                NAMES[data.properties.dtype],
                tuple(data.size),
            )
            self.items[piece] = item

    @staticmethod
    def _planner_of(state: LogicalState) -> DefaultSavePlanner:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(state.tensors, None, is_coordinator=True)
        return planner

    def tensor(self, state: LogicalState, piece: Piece) -> Tensor:
        """This rank's values of a piece as they are now."""
        planner = self._planner
        planner.state_dict = state.tensors
        found = planner.resolve_data(self.items[piece])
        assert isinstance(found, Tensor)
        return found.detach()

    @property
    def num_bytes(self) -> int:
        """Of all ranks together."""
        total = 0
        for entry in self.metadata.state_dict_metadata.values():
            assert isinstance(entry, TensorStorageMetadata)
            total += entry.size.numel() * entry.properties.dtype.itemsize
        return total

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of every logical tensor of the whole run."""
        return {
            name: (NAMES[entry.properties.dtype], tuple(entry.size))
            for name, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }


Row = tuple[str, str, list[int] | None, int | None, list[int], list[int], str, list[int]]
"""What a rank writes, as ranks tell each other: name, kind, where the index says it begins, its number; offset and size
of the block; dtype and shape of the whole."""


def _row(item: WriteItem) -> Row:
    data, index = item.tensor_data, item.index
    assert data is not None
    return (
        *(index.fqn, item.type.name, None if index.offset is None else list(index.offset), index.index),
        *(list(data.chunk.offsets), list(data.chunk.sizes), NAMES[data.properties.dtype], list(data.size)),
    )


def _plan(rows: list[Row]) -> DistributedSavePlan:
    items = []
    for name, kind, begin, number, offsets, sizes, dtype, shape in rows:
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        data = TensorWriteData(chunk, TensorProperties(TORCH_DTYPES[dtype]), torch.Size(shape))
        index = MetadataIndex(name, None if begin is None else torch.Size(begin), number)
        items.append(WriteItem(index, WriteItemType[kind], tensor_data=data))
    return DistributedSavePlan(items)


def read_into(state: LogicalState, manifest: Manifest, reader: ShardReader) -> None:
    """Fill this rank's tensors in place, whatever layout wrote them; no communication.

    Raises CheckpointError naming the tensor that is missing or of another shape, before anything is changed, or that
    holds a NaN or an infinity.
    """
    sources = _sources(state, manifest)
    entries = {name: manifest.tensors[source] for name, source in sources.items()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state.tensors, _metadata(entries), is_coordinator=True)
    boxes: dict[tuple[str, tuple[int, ...]], Box] = {
        (name, box.offset): box for name, tensor in entries.items() for box in tensor.boxes
    }
    plan = planner.finish_plan(planner.create_local_plan())
    wanted = [(boxes[item.storage_index.fqn, tuple(item.storage_index.offset or ())], item) for item in plan.items]
    for box, item in sorted(wanted, key=lambda pair: (pair[0].file, pair[1].storage_index.fqn)):
        name = item.storage_index.fqn
        part = None
        if tuple(item.lengths) != box.shape:
            part = [
                slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True)
            ]
        target = planner.resolve_tensor(item).detach()
        found = reader.read(sources[name], entries[name], box, part)
        if found.is_floating_point() and found.numel() and not torch.isfinite(torch.stack(torch.aminmax(found))).all():
            raise CheckpointError(
                f"checkpoint of step {manifest.step}: {sources[name]} holds a value that is not finite ({box.file})"
            )
        target.copy_(found)
        planner.commit_tensor(item, target)
    reader.close()
    state.finish_reading()


def _sources(state: LogicalState, manifest: Manifest) -> dict[str, str]:
    """For every tensor of the state the one of the checkpoint that holds it, equally shaped. Raises CheckpointError."""
    where, sources = f"checkpoint of step {manifest.step}", {}
    for name, tensor in state.tensors.items():
        is_moment = name.startswith(OPTIMIZER)
        source = name if is_moment else weight_source(name.removeprefix(MODEL), manifest.tensors)
        sources[name] = source
        way_out = f"; {SAVE_WEIGHTS}" if is_moment else ""
        entry = manifest.tensors.get(source)
        if entry is None:
            raise CheckpointError(f"{where}: it has no tensor {name}, which this run needs{way_out}")
        if entry.shape != tuple(tensor.shape):
            raise CheckpointError(f"{where}: {name} is {list(entry.shape)}, this run has {list(tensor.shape)}{way_out}")
    return sources


def _metadata(entries: Mapping[str, TensorEntry]) -> Metadata:
    """Tensors of a manifest as PyTorch's planners know them."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(TORCH_DTYPES[tensor.dtype]),
                torch.Size(tensor.shape),
                [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)) for box in tensor.boxes],
            )
            for name, tensor in entries.items()
        }
    )
