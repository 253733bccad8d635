"""A model whose weights are int8: linear maps and experts, one scale for each output, computed in the type they had.

For serving, and another way than `quantized.py` has for adapters that are trained: that one fills weights part by part
as they are read, needs a backward pass, and has `bitsandbytes` make codes and scales. This one takes a whole model,
needs no library, scales rows after the product, makes no more than one expert whole, and keeps codes in buffers, which
the expert cache moves.

Shape suffixes: R rows, D hidden, e experts held here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from moe_dist.models.experts import Experts
from moe_dist.models.layers import Linear, LowRank
from moe_dist.models.quantized import quantized_weights
from moe_dist.models.transformer import Transformer

_LARGEST = 127
_SCALE = "_scale"
"""Behind a stack's name: that of its scales."""


def quantized(weight: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, int8, and the scales by which they are to be multiplied, float32: one for each
    output, whose largest weight is 127 of them. `inputs`: the dimension that a matmul sums over; scales have size 1
    there.
    """
    scale = weight.float().abs().amax(inputs, keepdim=True) / _LARGEST
    scale = scale.where(scale > 0, 1.0)
    return (weight.float() / scale).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """Stands where a `Linear` stood: `weight` (out, in) int8, `scale` (out,) float32. An adapter stays as it is."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    lora: LowRank | None

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        weight, scale = quantized(linear.weight.detach(), 1)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.lora = linear.lora

    def forward(self, x: Tensor) -> Tensor:
        out = (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
        out = out if self.bias is None else out + self.bias.to(x.dtype)
        return out if self.lora is None else self.lora.add_to(out, x)


class Int8Experts(nn.Module):
    """Stands where `Experts` stood: their matrices as stacks of int8, each with `NAME_scale` (e, 1, out) float32.

    One expert after the other is made whole for its rows, so that no more than one is there in full. Raises ValueError
    for experts that have adapters beside them, whose ranks are not quantized.
    """

    draws_noise = is_adapted = is_quantized = False

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        if experts.is_adapted:
            raise ValueError("int8: these experts have adapters beside them; moe-dist export --merge makes one model")
        self.first_expert, self.num_local, self.casts_rows = experts.first_expert, experts.num_local, experts.casts_rows
        self.dtype = experts.w_down.dtype
        for name, parameter in experts.named_parameters(recurse=False):
            stack = parameter.detach()
            if stack.ndim == 3:  # rows come from the left: (e, in, out)
                stack, scale = quantized(stack, 1)
                self.register_buffer(name + _SCALE, scale)
            self.register_buffer(name, stack)
        self._of = (experts.to("meta"),)  # in a tuple: no part of this module's state

    def forward(self, rows_RD: Tensor, rows_per_expert: Tensor) -> Tensor:
        """(R, D) -> (R, D), as `Experts.forward`. Waits for the device."""
        [experts] = self._of
        names, out = [name for name, _ in experts.named_parameters(recurse=False)], []
        for index, rows in enumerate(rows_RD.split(rows_per_expert.tolist())):
            if len(rows):
                weights = {name: self._whole(name, index) for name in names}
                out.append(functional_call(experts, weights, (rows, rows_per_expert.new_tensor([len(rows)]))))
        return torch.cat(out) if out else rows_RD.new_empty(rows_RD.shape)

    def _whole(self, name: str, index: int) -> Tensor:
        """A parameter of one expert, a stack of one, in the type it had."""
        stack, scale = getattr(self, name)[index : index + 1], getattr(self, name + _SCALE, None)
        return stack if scale is None else (stack * scale[index : index + 1]).to(self.dtype)


def to_int8(model: Transformer) -> tuple[int, int]:
    """Make linear maps and experts int8; embedding, head, norms and routers stay. Bytes of this rank's weights before
    and after. Raises ValueError for experts that are not one stack of tensors, or have adapters, and for weights that
    are in few bits already.
    """
    if (there := next(quantized_weights(model), None)) is not None:
        raise ValueError(f"int8: {there[0]} is in {there[2].kind} already (lora.quantize)")
    before = weight_bytes(model)
    for moe in model.moe_layers():
        if not isinstance(moe.experts, Experts):
            raise ValueError(f"int8: experts of class {type(moe.experts).__name__} are not one stack")
        moe.experts = Int8Experts(moe.experts)  # type: ignore[assignment]
    for name, module in list(model.named_modules()):
        if type(module) is Linear:
            model.set_submodule(name, Int8Linear(module))
    return before, weight_bytes(model)


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, tied ones once."""
    return sum({one.data_ptr(): one.nbytes for one in [*model.parameters(), *model.buffers()]}.values())
