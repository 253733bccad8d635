"""Columns of tables: which are read, which are not, and instruction data that would lose its instructions."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_dist.data.tokenised import columns_beside

logger = logging.getLogger(__name__)

CONVERSATIONS = {"chat", "conversation", "conversations", "dialog", "dialogue", "messages"}
PROMPTS = {"context", "input", "instruction", "prompt", "query", "question"}
ANSWERS = {"answer", "chosen", "completion", "output", "response"}


@dataclass
class Wanted:
    """`text_field` is read; `ignored` are columns that somebody has said are not wanted."""

    text_field: str
    ignored: Sequence[str] = ()
    _told: set[tuple[str, ...]] = field(default_factory=set)

    def check(self, columns: Sequence[str], where: str) -> None:
        """Names the columns that are not read, in a warning.

        Raises ValueError when `text_field` is not among them, and for instruction data as text: its questions would
        be learned like its answers, or lost.
        """
        names = [str(column) for column in columns]
        self._check_instructions(names, where)
        if self.text_field not in names:
            near = difflib.get_close_matches(self.text_field, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where} has no field {self.text_field!r} (text_field); it has {sorted(names)}{hint}")
        read = columns_beside(self.text_field, names)
        unread = tuple(name for name in names if name not in read and name not in self.ignored)
        if unread and unread not in self._told:
            self._told.add(unread)
            logger.warning("%s: columns that are not read: %s", where.rstrip(","), ", ".join(unread))

    def _check_instructions(self, names: Sequence[str], where: str) -> None:
        if self.text_field == "input_ids":  # tokens, with labels or a mask of their own
            return
        left = [name for name in names if name not in self.ignored]
        talk = [name for name in left if name.lower() in CONVERSATIONS]
        prompts = [name for name in left if name.lower() in PROMPTS]
        answers = [name for name in left if name.lower() in ANSWERS]
        found = talk or (prompts + answers if prompts and answers else [])
        if not found:
            return
        if self.text_field in talk or self.text_field not in names:
            way = "set data.text_field=input_ids"
        else:
            others = [name for name in found if name != self.text_field]
            way = f"or say data.ignored_columns=[{', '.join(others)}] to learn every token of {self.text_field!r} alone"
        raise ValueError(
            f"{where} has columns of instruction data ({', '.join(found)}), and only {self.text_field!r} would be "
            f"read, without a mask: make rows of input_ids with completion_mask or labels of them (docs/data.md), {way}"
        )
