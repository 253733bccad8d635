"""What is installed here, and all that differs by it: nothing else asks for the version of PyTorch or of a package.

Importing this module loads no torch: `moe-dist check` answers at once.
"""

from __future__ import annotations

import platform
import re
from functools import cache
from importlib import metadata
from typing import TypeVar

T = TypeVar("T")


@cache
def installed(package: str) -> str | None:
    """The version of an installed package, such as `2.13.0+cpu`; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def arithmetic() -> dict[str, str]:
    """Versions of what results depend on, by name; what is not installed is left out."""
    found = {package: installed(package) for package in ("torch", "transformers", "deepspeed")}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


def too_old_to_split_backward() -> str | None:
    """PyTorch's version where `zero_bubble` and `dualpipe_v` cannot run, else None.

    Before 2.13 weight gradients are asked of nodes of the graph that are already freed ("Attribute '_input_metadata'
    is invalid"), and 2.11 does not even start them over gloo ("Pair is not connected").
    """
    return installed("torch") if _torch_before(2, 13) else None


def compiles_float64() -> bool:
    """Whether compiled attention runs in float64: before 2.13 "expected scalar type Double but found Float"."""
    return not _torch_before(2, 13)


def built_for_rocm() -> bool:
    """Whether PyTorch is built for AMD's GPUs, whose compute capabilities are numbers of their own."""
    return "rocm" in (installed("torch") or "")


def _torch_before(*version: int) -> bool:
    found = installed("torch")
    return found is not None and tuple(map(int, re.findall(r"\d+", found)[: len(version)])) < version


def tensors_inside(cls: type[T]) -> type[T]:
    """Decorator of a dataclass that a module sharded by FSDP returns: FSDP finds the tensors in it.

    FSDP gathers a module's parameters for backward by hooks on the tensors that its forward pass returned. 2.13 looks
    into every dataclass. 2.11 looks only into what torch's pytree knows: without this, ZeRO 3 would run the backward
    pass of a router with weights that are freed.
    """
    from torch.utils._pytree import register_dataclass

    register_dataclass(cls)
    return cls
