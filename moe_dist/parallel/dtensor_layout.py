"""This rank's tensors under their logical names and shapes, whatever the layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from moe_dist.parallel.mesh import Mesh


def as_stack(tensor: Tensor, mesh: Mesh) -> Tensor:
    """A whole block of experts (e, ...) as its place in the stack (E, ...): a DTensor over `ep`, sharing memory."""
    if mesh.group("ep") is None or mesh.sparse is None:
        return tensor
    return DTensor.from_local(tensor, mesh.ep_mesh, [Shard(0)], run_check=False)


def like_parameter(tensor: Tensor, parameter: Tensor, stacked: bool, mesh: Mesh) -> Tensor:
    """A tensor shaped as this rank's part of `parameter` (its weights, a moment) as part of the logical tensor.

    `stacked`: the parameter is a block of experts, which `ep` has cut out of the stack before FSDP cut it further.
    """
    if not isinstance(parameter, DTensor):
        return as_stack(tensor, mesh) if stacked else tensor
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    device_mesh, placements, shape = parameter.device_mesh, list(parameter.placements), list(parameter.shape)
    if stacked:
        # In this order, for both may cut dimension 0: first into blocks of experts, then each block.
        device_mesh, placements = mesh.experts_first, [Shard(0), *placements]
        shape[0] *= mesh.layout.ep_size
    return _assembled(local, device_mesh, placements, shape)


def like_expert(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor shaped as this rank's part of one expert of `parameter`, a block of experts that FSDP may have cut, as
    part of that expert's logical tensor."""
    if not isinstance(parameter, DTensor) or Shard(0) in parameter.placements:  # cut between experts: whole here
        return tensor
    placements = [Shard(place.dim - 1) if isinstance(place, Shard) else place for place in parameter.placements]
    return _assembled(tensor, parameter.device_mesh, placements, list(parameter.shape[1:]))


def _assembled(local: Tensor, device_mesh: DeviceMesh, placements: list[Placement], shape: list[int]) -> Tensor:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return DTensor.from_local(
        local, device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )


def local_offset(tensor: Tensor) -> tuple[int, ...]:
    """Where this rank's part of a logical tensor begins; zeros where it holds the whole."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def stack_placement(parameter: nn.Parameter, size: int) -> Shard | None:
    """Where FSDP cuts a block of experts (e, ...) over `size` ranks: along a dimension of the single expert that comes
    out even, so that every rank has a part of each; without one along the experts, as FSDP does by itself (None).
    """
    for dim in range(1, parameter.ndim):
        if parameter.shape[dim] % size == 0:
            return Shard(dim)
    return None
