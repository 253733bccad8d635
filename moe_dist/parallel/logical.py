"""This rank's tensors under their logical names and shapes, whatever the layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh


def is_stacked_expert(name: str, model: Transformer) -> bool:
    """Whether dimension 0 of a parameter counts experts, of which each `ep` rank holds a block."""
    return name in model.expert_parameter_names() and ".experts.experts." not in name


def as_stack(tensor: Tensor, mesh: Mesh) -> Tensor:
    """A whole block of experts (e, ...) as its place in the stack (E, ...): a DTensor over `ep`, sharing memory."""
    if mesh.group("ep") is None or mesh.sparse is None:
        return tensor
    return DTensor.from_local(tensor, mesh.sparse["ep"], [Shard(0)], run_check=False)


def like_parameter(tensor: Tensor, parameter: Tensor, stacked: bool, mesh: Mesh) -> Tensor:
    """A tensor shaped as this rank's part of `parameter` (its weights, a moment) as part of the logical tensor.

    `stacked`: the parameter is a block of experts; FSDP then cuts it along another dimension than `ep` does.
    """
    if not isinstance(parameter, DTensor):
        return as_stack(tensor, mesh) if stacked else tensor
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    device_mesh, placements, shape = parameter.device_mesh, list(parameter.placements), list(parameter.shape)
    if stacked and mesh.sparse is not None:
        device_mesh = _with_ep(mesh)
        placements = [*placements, Shard(0)]
        shape[0] *= mesh.layout.ep_size
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return DTensor.from_local(
        local, device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )


def _with_ep(mesh: Mesh) -> DeviceMesh:
    if mesh.hybrid_sparse is not None:
        return mesh.hybrid_sparse["edp_replicate", "edp_shard", "ep"]
    assert mesh.sparse is not None
    return mesh.sparse["edp", "ep"]


def expert_placement(parameter: nn.Parameter, size: int) -> Shard | None:
    """Where FSDP cuts an expert parameter over `size` ranks: a stack along a matrix dimension, so that dimension 0
    stays with `ep`; anything else as FSDP does by itself (None). Raises ValueError when no dimension comes out even.
    """
    if parameter.ndim < 3:
        return None
    for dim in (1, 2):
        if parameter.shape[dim] % size == 0:
            return Shard(dim)
    raise ValueError(
        f"parallel.zero_stage: expert weights of {tuple(parameter.shape[1:])} cannot be cut over {size} replicas; "
        "set parallel.shard_size to a divisor of model.hidden_size or model.moe_intermediate_size"
    )
