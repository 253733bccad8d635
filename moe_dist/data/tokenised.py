"""Rows that come tokenised: token ids, and what the columns beside them say about attention and loss.

Columns are those of Hugging Face: each has an entry for every token of the row, and the label of a token stands at its
own place (it is shifted when samples are made).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

IGNORE_INDEX = -100
"""Label of a token that is not learned."""
LEARNED = ("completion_mask", "assistant_masks")
"""0 where a token is not learned."""
REFUSED = {
    "loss_mask": "some mean the token, others the one after it; say it by labels or completion_mask",
    "seq_lengths": "several documents in a row; give a row to each",
}
COLUMNS = ("labels", "attention_mask", *LEARNED, "position_ids", *REFUSED)


class TokenRow(NamedTuple):
    """`ids` (n,) int64; `labels` (n,) int64, the label of each of these tokens, or None: the token itself.

    `whole`: it ends as it is, and no sample may hold a part of it. `note`: what has been lost of it, in words.
    `rejected`: of a preference, where this is the chosen answer with its prompt, the other one with the same.
    """

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None = None
    whole: bool = False
    note: str | None = None
    rejected: TokenRow | None = None


def columns_beside(text_field: str, columns: Iterable[str]) -> list[str]:
    """Those of a table's columns that are read: `text_field`, and what belongs to token ids."""
    found = set(columns)
    # The ids show that the others are theirs, where the text field is not.
    return [text_field, *(name for name in ("input_ids", *COLUMNS) if name in found and name != text_field)]


def token_row(ids: npt.NDArray[np.int64], row: Mapping[str, Any], text_field: str) -> TokenRow:
    """`ids` (n,) without what `attention_mask` takes for padding, and their labels.

    Raises ValueError naming the column that does not fit.
    """
    for name, why in REFUSED.items():
        if row.get(name) is not None:
            raise ValueError(f"{name!r} is not understood: {why}")
    columns = {name: _column(name, row[name], ids, text_field) for name in COLUMNS if row.get(name) is not None}
    masks = {name: columns[name] == 1 for name in ("attention_mask", *LEARNED) if name in columns}
    labels = columns.get("labels")
    for name in LEARNED:
        if name in masks:
            labels = np.where(masks[name], ids if labels is None else labels, IGNORE_INDEX)
    kept = masks.get("attention_mask", np.ones(len(ids), dtype=bool))
    if "position_ids" in columns and (columns["position_ids"][kept] != np.arange(kept.sum())).any():
        raise ValueError(
            "'position_ids' do not count from 0 to the end: several documents in a row; give a row to each"
        )
    return TokenRow(ids[kept], None if labels is None else labels[kept])


def check_text_row(row: Mapping[str, Any], text_field: str) -> None:
    """Raises ValueError when a text has labels of other tokens than those it is going to be made into."""
    mine = [name for name in ("labels", *LEARNED) if _is_list(row.get(name))]
    if mine and row.get("input_ids") is not None:
        raise ValueError(
            f"{text_field!r} is text, and {mine[0]!r} belongs to 'input_ids': set text_field to input_ids, or remove it"
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)


def _column(name: str, value: Any, ids: npt.NDArray[np.int64], text_field: str) -> npt.NDArray[np.int64]:
    if not _is_list(value):
        raise ValueError(f"{name!r} is {type(value).__name__}, not a list of numbers")
    entries = np.asarray(value)
    if entries.ndim != 1 or (entries.size and entries.dtype.kind not in ("iu" if name == "labels" else "iub")):
        raise ValueError(f"{name!r} is not a list of whole numbers")
    if len(entries) != len(ids):
        raise ValueError(f"{name!r} has {len(entries)} entries, {text_field!r} has {len(ids)}")
    entries = entries.astype(np.int64)
    if name in ("attention_mask", *LEARNED):
        wrong = entries[(entries != 0) & (entries != 1)]
        takes = "0 and 1"
    elif name == "labels":
        wrong = entries[(entries < 0) & (entries != IGNORE_INDEX)]
        takes = f"token ids and {IGNORE_INDEX}"
    else:
        return entries
    if len(wrong):
        raise ValueError(f"{name!r} holds {wrong[0]}; allowed: {takes}")
    return entries
