"""What is asked of an engine, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from moe_dist.generate.json_schema import JsonAnswer
from moe_dist.generate.options import SamplingOptions
from moe_dist.generate.sampling import BeamSearch
from moe_dist.generate.text_stream import TextStream

LogProbs = tuple[float, tuple[tuple[int, float], ...]]
"""Of a token, and (id, log-probability) of the likeliest ones at its position, best first."""


@dataclass(frozen=True)
class Event:
    """Something new in the answer to a request: of beam search all of it at once.

    `finished`: "stop" (end of document or a stop text), "length", or "cancelled"; None while it goes on. `text` may
    come later than its tokens: only whole characters, and nothing that may become a stop text.
    """

    request: int
    tokens: tuple[int, ...]
    text: str
    finished: str | None = None
    logprobs: tuple[LogProbs, ...] = ()


@dataclass(frozen=True)
class Occupied:
    """Requests in the batch and in the queue, blocks of the cache that are held, and those that there may be."""

    live: int
    waiting: int
    blocks: int
    max_blocks: int


@dataclass
class Completion:
    """A whole answer. `tokens`: new ones, an end token and what completed a stop text among them."""

    num_prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: str | None = None
    logprobs: list[LogProbs] = field(default_factory=list)

    def add(self, event: Event) -> None:
        self.tokens += event.tokens
        self.text += event.text
        self.logprobs += event.logprobs
        self.finished = event.finished


@dataclass
class Live:
    """A request that an engine works on. `sequences`: all tokens, of every beam; `tables`: their blocks."""

    number: int
    options: SamplingOptions
    sequences: list[list[int]]
    num_prompt: int
    stream: TextStream
    reserved: int
    """Blocks that it may come to need."""
    generator: torch.Generator | None
    beams: BeamSearch | None
    json: JsonAnswer | None = None
    tables: list[list[int]] = field(default_factory=list)
    num_cached: int = 0
    """Tokens of each sequence that have been through the model."""
    facts: list[Any] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Rows of a batch: a prompt is read once for all beams."""
        return 1 if len(self.sequences) == 1 else len(self.sequences)

    @property
    def num_waiting(self) -> int:
        """Tokens that have not been through the model."""
        return len(self.sequences[0]) - self.num_cached
