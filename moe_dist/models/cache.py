"""What a model asks of a cache of keys and values; `generate/paged_cache.py` is one.

Shape suffixes: B batch, S new tokens, L tokens so far, H heads, C head width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LayerCache(Protocol):
    """Keys and values of one layer."""

    def extend(self, k_BHSC: Tensor, v_BHSC: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of new tokens; the answer is all that rows have so far, (B, H, L, C), in order of position."""
        ...


class Cache(Protocol):
    """Of one forward pass."""

    def of_layer(self, layer: int) -> LayerCache:
        """By global number."""
        ...

    def mask(self, window: int | None) -> Tensor:
        """(B, 1, S, L) bool: a query sees keys up to itself, and no more than `window` of them."""
        ...
