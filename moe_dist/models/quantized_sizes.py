"""What frozen weights in few bits take, from the configuration alone. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.config import ModelConfig
from moe_dist.models.shapes import is_quantized, logical_shapes

BLOCK = 64
"""Numbers with one scale, in `nf4`."""


def num_codes(kind: str, rows: int, columns: int) -> int:
    """Bytes of the codes of a matrix."""
    return -(-rows * columns // 2) if kind == "nf4" else rows * columns


def num_scales(kind: str, rows: int, columns: int) -> int:
    """Float32 numbers beside them."""
    return -(-rows * columns // BLOCK) if kind == "nf4" else rows


@dataclass(frozen=True)
class QuantizedSizes:
    """Of the weights in few bits on a rank: how many numbers, their bytes, and the numbers of the largest one, which is
    whole for the moment of a product."""

    numbers: int
    nbytes: int
    largest: int


def quantized_sizes(model: ModelConfig, kind: str, layers: Sequence[int], ep_size: int) -> QuantizedSizes:
    """Of a rank with these layers."""
    numbers, nbytes = [0], 0
    for name, shape in logical_shapes(model).items():
        if not is_quantized(name) or int(name.split(".")[1]) not in layers:
            continue
        rows, columns = shape[-1:-3:-1] if len(shape) == 3 else shape
        matrices = shape[0] // ep_size if len(shape) == 3 else 1
        numbers.append(matrices * rows * columns)
        nbytes += matrices * (num_codes(kind, rows, columns) + 4 * num_scales(kind, rows, columns))
    return QuantizedSizes(sum(numbers), nbytes, max(numbers))
