"""Who sees whom: plain causal attention, documents that share a row, windows.

Shape suffixes: B batch, S sequence, T = B * S tokens, H heads, C head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Causal attention inside each of many documents, which costs the sum of the squares of their lengths, not the
    square of the whole."""

    lengths: tuple[int, ...]
    """Of all rows, one after the other; none goes over the end of a row."""
    window: int | None

    def attend(self, attend: Attend, query_BHSC: Tensor, key_BHSC: Tensor, value_BHSC: Tensor) -> Tensor:
        """(B, H, S, C). `attend(query, key, value, mask)` is asked for one document at a time, (1, H, L, C) each."""
        rows = query_BHSC.shape[0]

        def by_document(x_BHSC: Tensor) -> Iterable[Tensor]:
            parts: tuple[Tensor, ...] = x_BHSC.transpose(1, 2).flatten(0, 1).split(self.lengths)
            return (part_LHC.transpose(0, 1)[None] for part_LHC in parts)

        parts = zip(*map(by_document, (query_BHSC, key_BHSC, value_BHSC)), strict=True)
        out = [attend(q, k, v, self._mask(q))[0].transpose(0, 1) for q, k, v in parts]
        return torch.cat(out).unflatten(0, (rows, -1)).transpose(1, 2)

    def _mask(self, query: Tensor) -> Tensor | None:
        length = query.shape[2]
        if self.window is None or self.window >= length:
            return None
        return window_mask(length, self.window, query.device)


Mask = Tensor | Documents | None
"""None for plain causal attention; a bool (B or 1, 1, S, S), true where a query may look, which already includes
causality and the window; or `Documents`."""
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def masks_of(
    windows: Iterable[int | None], length: int, document_ids: Tensor | None, device: torch.device, splits: bool
) -> dict[int | None, Mask]:
    """Window of a layer -> its mask. `document_ids` (B, S) int, None for one document per row. `splits`: documents
    may be attended to one by one."""
    windows = set(windows)
    if document_ids is not None and splits:
        lengths = document_lengths(document_ids)
        return {window: Documents(lengths, window) for window in windows}
    whole = None if document_ids is None else document_mask(document_ids)
    masks: dict[int | None, Mask] = dict.fromkeys(windows, whole)
    for window in windows:
        if window is not None and window < length:
            near = window_mask(length, window, device)
            masks[window] = near if whole is None else near & whole
    return masks


def document_lengths(document_ids: Tensor) -> tuple[int, ...]:
    """(B, S) ids -> lengths of runs of equal ids, of all rows one after the other."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    at = begins.flatten().nonzero().flatten().tolist()
    return tuple(stop - start for start, stop in zip(at, [*at[1:], begins.numel()], strict=True))


def document_mask(document_ids: Tensor) -> Tensor:
    """(B, S) ids -> (B, 1, S, S) bool: a query sees keys of its own document that are not after it."""
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()[:, None]


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """(1, 1, S, S) bool: a query sees itself and the `window` - 1 keys before it."""
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril().triu(1 - window)
