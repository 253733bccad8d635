"""A hash of a model's weights that does not depend on how they lie on ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_dist.parallel.dtensor_layout import like_parameter, local_offset
from moe_dist.parallel.engines.base import Engine
from moe_dist.parallel.engines.optimizer import local
from moe_dist.parallel.mesh import Mesh

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTORS = (-7046029254386353131, -4417276706812531889)
"""Odd numbers of 64 bits without a pattern, as signed ones: 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F."""
_ROWS = 1 << 22
"""Elements that are looked at together."""


def weights_hash(
    model: torch.nn.Module, engine: Engine, stacked: set[str], masters: Mapping[str, Tensor], mesh: Mesh
) -> str:
    """SHA-256 over every weight and buffer of the whole model, by name; the same on every rank (collective).

    `stacked`: names of parameters that hold this rank's block of experts. `masters` stand for the parameters of these
    names. It tells other weights from these, and is no seal: who wants to can make two models with one hash.
    """
    held = engine.held_parameters()
    mine: dict[str, tuple[tuple[int, ...], dict[tuple[int, ...], int]]] = {}
    for name, parameter in held.items():
        tensor = like_parameter(masters.get(name, parameter).detach(), parameter, name in stacked, mesh)
        mine[name] = _of_part(tensor)
    for name, buffer in model.named_buffers():
        mine[name] = _of_part(buffer)
    found: dict[str, tuple[tuple[int, ...], dict[tuple[int, ...], int]]] = {}
    for ranks in mesh.from_all(mine):
        for name, (shape, parts) in ranks.items():
            found.setdefault(name, (shape, {}))[1].update(parts)  # of replicas one
    digest = hashlib.sha256()
    for name, (shape, parts) in sorted(found.items()):
        digest.update(f"{name} {shape} {sum(parts.values()) % 2**64}\n".encode())
    return digest.hexdigest()


def _of_part(tensor: Tensor) -> tuple[tuple[int, ...], dict[tuple[int, ...], int]]:
    """(whole shape, where this rank's part begins -> its sum): of each number's bits times a number of its position in
    the whole tensor, so that the sums of all parts are that of the whole."""
    part, offset, shape = local(tensor).detach(), local_offset(tensor), tuple(tensor.shape)
    if not part.numel():
        return shape, {}
    bits = part.contiguous().flatten().view(_BITS[part.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    for start in range(0, len(bits), _ROWS):
        here = torch.arange(start, min(start + _ROWS, len(bits)), device=part.device)
        position, stride = torch.zeros_like(here), 1
        for dim in reversed(range(part.ndim)):  # its index there, by the index here
            position += (here % part.shape[dim] + offset[dim]) * stride
            here, stride = here.div(part.shape[dim], rounding_mode="floor"), stride * shape[dim]
        weight = (position + 1) * _FACTORS[0]
        weight = (weight ^ (weight >> 29)) * _FACTORS[1]
        total += ((bits[start : start + _ROWS].to(torch.int64) + 1) * (weight | 1)).sum()
    return shape, {offset: int(total)}
