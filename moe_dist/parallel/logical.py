"""This rank's tensors under their logical names and shapes, whatever the layout."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh


def is_stacked_expert(name: str, model: Transformer) -> bool:
    """Whether dimension 0 of a parameter counts experts, of which each `ep` rank holds a block."""
    return name in model.expert_parameter_names() and ".experts.experts." not in name


def as_stack(tensor: Tensor, mesh: Mesh) -> Tensor:
    """A block of experts (e, ...) as its place in the whole stack (E, ...): a DTensor over `ep`, sharing memory."""
    if mesh.group("ep") is None or mesh.sparse is None:
        return tensor
    return DTensor.from_local(tensor, mesh.sparse["ep"], [Shard(0)], run_check=False)
