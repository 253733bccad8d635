"""Columns of tables: which are read, and as what; and instruction data that would lose its instructions."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_dist.data.chat_template import ChatEncoder, check_template
from moe_dist.data.conversations import (
    CHAT,
    COMPLETION,
    INSTRUCTION,
    PREFERENCE,
    TALKS,
    columns_of,
    conversation_of,
    formats_in,
)
from moe_dist.data.preferences import preference_of
from moe_dist.data.tokenised import TokenRow, check_text_row, columns_beside, token_row

logger = logging.getLogger(__name__)

FORMATS = ("auto", "text", CHAT, COMPLETION, INSTRUCTION, PREFERENCE)
CONVERSATIONS = {"chat", "conversation", "conversations", "dialog", "dialogue", "messages"}
PROMPTS = {"context", "input", "instruction", "prompt", "query", "question"}
ANSWERS = {"answer", "chosen", "completion", "output", "response"}


@dataclass
class Wanted:
    """What is read of a row: `text_field`, or a conversation, by `format`.

    `ignored` are columns that somebody has said are not wanted. `encode` makes tokens of conversations. With "auto"
    the columns of the first row decide whether it is text; of conversations each row is known by its own columns.
    """

    text_field: str
    ignored: Sequence[str] = ()
    format: str = "auto"
    encode: ChatEncoder | None = None
    is_talk: bool = False
    """Whether rows are conversations or completions; known once `check` has seen the columns."""
    _reported: set[tuple[str, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}; allowed: {', '.join(FORMATS)}")
        self.is_talk = self.format not in ("auto", "text")

    @property
    def is_preference(self) -> bool:
        """Whether a row is a pair of answers; never by its columns alone, since it is another training."""
        return self.format == PREFERENCE

    @property
    def kind(self) -> dict[str, Any]:
        """What a `Corpus` needs to know of its rows, once `check` has seen the columns."""
        return {"whole": self.is_talk, "pairs": self.is_preference}

    @property
    def stamp(self) -> str:
        """Equal for what reads rows alike."""
        if not self.is_talk:
            return self.text_field
        return f"{self.format}|{sorted(self.ignored)}|{self.encode.stamp if self.encode else ''}"

    def check(self, columns: Sequence[str], where: str) -> None:
        """Decides what rows are, and names the columns that are not read, in a warning.

        Raises ValueError when what is to be read is not among them, when they could be read in several ways, and for
        instruction data of an unknown kind: its questions would be learned like its answers, or lost.
        """
        names = [str(column) for column in columns]
        left = [name for name in names if name not in self.ignored]
        kinds = formats_in(left)
        if self.format == "auto" and self.text_field != "input_ids":  # those are tokens, with labels of their own
            self.is_talk = self._says_talk(left, kinds, where)
            if not self.is_talk:
                self._check_instructions(left, where)
        if self.is_talk:
            self._check_talk(left, kinds, where)
        elif self.text_field not in names:
            near = difflib.get_close_matches(self.text_field, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where} has no field {self.text_field!r} (text_field); it has {sorted(names)}{hint}")
        read = self.selected(names)
        unread = tuple(name for name in left if name not in read)
        if unread and unread not in self._reported:
            self._reported.add(unread)
            logger.warning("%s: columns that are not read: %s", where.rstrip(","), ", ".join(unread))

    def selected(self, columns: Sequence[str]) -> list[str]:
        """Those of a table's columns that are read."""
        if not self.is_talk:
            return columns_beside(self.text_field, columns)
        kinds = formats_in(set(columns) - set(self.ignored)) if self.format == "auto" else [self.format]
        mine = {name for kind in kinds for name in columns_of(kind)}
        return [name for name in columns if name in mine and name not in self.ignored]

    def value(self, row: Any) -> str | TokenRow:
        """The text or the tokens that `row` (a mapping, or the value itself) holds, with what the columns of
        `tokenised.COLUMNS` say about the tokens. Raises ValueError with what does not fit."""
        if self.is_talk:
            return self._talk(row)
        value, beside = row, {}
        if isinstance(row, Mapping):
            if self.text_field not in row:
                raise ValueError(f"no field {self.text_field!r} (fields: {sorted(map(str, row))})")
            value, beside = row[self.text_field], {name: row[name] for name in row if name != self.text_field}
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"lone surrogate at character {error.start}") from None
            check_text_row(beside, self.text_field)
            return value
        if isinstance(value, Sequence | np.ndarray) and not isinstance(value, bytes):
            try:
                ids = np.asarray(value)
            except ValueError:  # lists of several lengths
                ids = np.empty((0, 0))
            if ids.ndim == 1 and (ids.size == 0 or ids.dtype.kind in "iu"):
                return token_row(ids.astype(np.int64), beside, self.text_field)
        raise ValueError(f"{self.text_field!r} is {type(value).__name__}, not text or a list of token ids")

    def _talk(self, row: Any) -> TokenRow:
        assert self.encode is not None  # or `check` would have refused
        if not isinstance(row, Mapping):
            raise ValueError(f"{type(row).__name__}, not an object with messages, or prompt and completion")
        given = {str(name): row[name] for name in row if name not in self.ignored and row[name] is not None}
        kind = self.format
        if kind == "auto":
            kinds = [name for name in formats_in(given) if name != PREFERENCE]
            if len(kinds) != 1:
                what = f"could be {' or '.join(kinds)}" if kinds else "no conversation"
                raise ValueError(f"{what} (fields: {sorted(given)}); data.format says which")
            kind = kinds[0]
        return self.encode(preference_of(given) if kind == PREFERENCE else conversation_of(given, kind))

    def _says_talk(self, left: Sequence[str], kinds: Mapping[str, str], where: str) -> bool:
        """Whether the columns are those of conversations. Raises ValueError where that is not plain."""
        choices = [f"data.format={kind} ({columns})" for kind, columns in kinds.items() if kind != PREFERENCE]
        if self.text_field in left and self.text_field not in TALKS and choices:
            choices.append(f"data.format=text (every token of {self.text_field!r} is learned)")
        if PREFERENCE in kinds:
            more = f"; or leave them out by data.ignored_columns: {' or '.join(choices)}" if choices else ""
            raise ValueError(
                f"{where} has columns of preferences ({kinds[PREFERENCE]}): data.format=preference learns which answer "
                f"is better (DPO){more}"
            )
        if len(choices) > 1:
            raise ValueError(f"{where} can be read in several ways; choose: {', or '.join(choices)}")
        return bool(choices)

    def _check_talk(self, left: Sequence[str], kinds: Mapping[str, str], where: str) -> None:
        if self.format != "auto" and self.format not in kinds:
            near = ", ".join(f"data.format={kind}" for kind in kinds) or "data.format=text"
            needs = ", ".join(columns_of(self.format)) if self.format != CHAT else " or ".join(TALKS[:2])
            raise ValueError(
                f"{where} has nothing of data.format={self.format} ({needs}); it has {sorted(left)}: {near}?"
            )
        if self.encode is None:
            raise ValueError(f"{where} has conversations: give `chat`, a ChatEncoder, to make tokens of them")
        if not {COMPLETION, PREFERENCE} & {self.format, *kinds}:  # texts need no template
            check_template(self.encode.tokenizer)

    def _check_instructions(self, left: Sequence[str], where: str) -> None:
        talk = [name for name in left if name.lower() in CONVERSATIONS]
        prompts = [name for name in left if name.lower() in PROMPTS]
        answers = [name for name in left if name.lower() in ANSWERS]
        found = talk or (prompts + answers if prompts and answers else [])
        if not found:
            return
        way = "" if self.text_field not in left else f", or data.format=text learns every token of {self.text_field!r}"
        raise ValueError(
            f"{where} has columns of instruction data ({', '.join(found)}) under names that are not known: call them "
            f"messages, or prompt and completion, or make rows of input_ids with completion_mask (docs/data.md){way}"
        )
