"""Frozen weights in 4 or 8 bits, by `bitsandbytes`: codes and scales, made whole for the moment of a product.

`nf4`: 16 values as those of normal numbers are spread, with one scale for 64 of them in a row (Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314); `int8`: whole numbers, with one scale for each row (Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339). A row is what one output is made of, in stacks of experts too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_dist.config import ConfigError
from moe_dist.models.quantized_sizes import BLOCK, num_codes, num_scales
from moe_dist.models.shapes import is_quantized

Multiply = Callable[[Tensor, Tensor], Tensor]
"""(rows, weight) -> rows."""


class QuantizedWeight:
    """A matrix (out, in), or a stack (e, in, out), in the place of a parameter. It is filled part by part, and every
    matrix is quantized as soon as all of it has come."""

    def __init__(self, shape: tuple[int, ...], kind: str, device: torch.device) -> None:
        self.shape, self.kind, self.device = shape, kind, device
        self._one = (shape[2], shape[1]) if len(shape) == 3 else shape  # (out, in)
        self._count = shape[0] if len(shape) == 3 else 1
        self._coming: dict[int, tuple[Tensor, int]] = {}
        self._missing = set(range(self._count))
        codes, scales = (size(kind, *self._one) for size in (num_codes, num_scales))
        self.codes = torch.empty(self._count, codes, dtype=torch.uint8 if kind == "nf4" else torch.int8, device=device)
        self.scales = torch.empty(self._count, scales, dtype=torch.float32, device=device)

    @torch.no_grad()
    def write(self, values: Tensor, offset: tuple[int, ...]) -> None:
        """Put `values` where `offset` says, as into a tensor of `shape`."""
        if len(self.shape) == 2:
            self._fill(0, values, offset)
            return
        for index, matrix in enumerate(values, offset[0]):
            self._fill(index, matrix, offset[1:])

    def _fill(self, index: int, values: Tensor, offset: tuple[int, ...]) -> None:
        size = self.shape[-2:]
        whole, left = self._coming.pop(index) if index in self._coming else (torch.empty(size), size[0] * size[1])
        whole[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values.to("cpu")
        if left > values.numel():
            self._coming[index] = (whole, left - values.numel())
            return
        rows = (whole.t() if len(self.shape) == 3 else whole).contiguous().to(self.device)
        functional = library()
        if self.kind == "nf4":
            codes, state = functional.quantize_4bit(rows, blocksize=BLOCK, quant_type="nf4")
            scales = state.absmax
        else:
            codes, scales, _ = functional.int8_vectorwise_quant(rows.half())
        self.codes[index].copy_(codes.flatten())
        self.scales[index].copy_(scales)
        self._missing.discard(index)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight, of `shape`, as it is after rounding."""
        rows, columns = self._one
        if self.kind == "nf4" and not rows * columns % BLOCK:
            found = self._four_bits(self.codes, self.scales, dtype)
        else:  # of nf4 a block does not go on in the next matrix; of int8 the library makes float32
            found = torch.empty(self._count, rows * columns, dtype=dtype, device=self.device)
            for out, codes, scales in zip(found, self.codes, self.scales, strict=True):
                if self.kind == "nf4":
                    out.copy_(self._four_bits(codes, scales, dtype))
                else:
                    out.copy_(library().int8_vectorwise_dequant(codes.view(rows, columns), scales).flatten())
        found = found.view(self._count, rows, columns)
        return found.transpose(1, 2) if len(self.shape) == 3 else found[0]

    def _four_bits(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """As one row: of rows that are no whole blocks bitsandbytes 0.50 takes wrong scales on a CPU."""
        functional, count = library(), self._one[0] * self._one[1] * len(codes.view(-1, self.codes.shape[1]))
        code = functional.get_4bit_type("nf4", device=self.device)
        how = {"blocksize": BLOCK, "quant_type": "nf4", "dtype": dtype}
        state = functional.QuantState(scales.flatten(), shape=torch.Size((count,)), code=code, **how)
        return functional.dequantize_4bit(codes.view(-1, 1), state).flatten()

    @property
    def numel(self) -> int:
        """Numbers of the weight."""
        return self._count * self._one[0] * self._one[1]

    @property
    def nbytes(self) -> int:
        """What it takes, codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def is_filled(self) -> bool:
        """Whether all of it has come."""
        return not self._missing


def library() -> Any:
    """`bitsandbytes.functional`. Raises ConfigError where it is not installed."""
    # It warns of a product in 4 bits for CPUs, from another package, which is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        raise ConfigError("lora.quantize: needs bitsandbytes: pip install 'moe-dist[quantize]'") from None
    return functional


class TimesQuantized(torch.autograd.Function):
    """`multiply(rows, weight)`, with the weight made whole in forward, and again in backward: nothing of it is kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: QuantizedWeight, multiply: Multiply) -> Tensor:
        ctx.weight, ctx.multiply = weight, multiply
        return multiply(rows, weight.whole(rows.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.multiply(grad.contiguous(), ctx.weight.whole(grad.dtype).transpose(-1, -2)), None, None


def quantize_frozen(model: nn.Module, kind: str, device: torch.device) -> None:
    """Put places for weights in few bits where linear maps of blocks and stacks of experts have parameters, which are
    still on the meta device."""
    library()
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_quantized(f"{prefix}.{name}"):
                delattr(module, name)
                setattr(module, name, QuantizedWeight(tuple(parameter.shape), kind, device))


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizedWeight]]:
    """Name, module and weight, of those held here."""
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, QuantizedWeight):
                yield f"{prefix}.{name}", module, value


def bytes_sentence(model: nn.Module) -> str:
    """What the weights take now, counted on themselves. Raises RuntimeError where one is not in few bits, or only in
    part."""
    found = {name: weight for name, _, weight in quantized_weights(model)}
    wrong = [name for name, weight in found.items() if not weight.is_filled]
    wrong += [name for name, _ in model.named_parameters() if is_quantized(name)]
    if wrong or not found:
        raise RuntimeError(f"lora.quantize: {(wrong or ['no weight'])[0]} is not in few bits; please report this")
    numbers, taken = sum(one.numel for one in found.values()), sum(one.nbytes for one in found.values())
    experts = sum(one.nbytes for name, one in found.items() if ".experts." in name)
    still = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    kind = next(iter(found.values())).kind
    return (
        f"{kind}: {len(found)} weights of {numbers:,} numbers take {taken / 1e6:,.1f} MB, {8 * taken / numbers:.2f} "
        f"bits each (experts {experts / 1e6:,.1f} MB); in bfloat16 {2 * numbers / 1e6:,.1f} MB; other frozen ones "
        f"{still / 1e6:,.1f} MB"
    )
