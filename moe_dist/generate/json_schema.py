"""Answers that are JSON by a schema: which tokens may come next, and a way to the end that always fits.

What a schema means is llguidance's. Beside its state every answer keeps `way`: tokens that would end it validly from
here. A token is taken only if there is such a way from behind it within the tokens that are left; if not, the known way
is gone instead. So an answer is whole however short it may be, whatever the model would rather say.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_dist.data.tokenizer import ByteTokenizer, Tokenizer

_LONGEST_WAY = 1024
_MOST_KNOWN = 32
_ENDS = b'}],:"0123456789ntf-'
"""What ends a value soonest, best first; in a text a quotation mark does."""
_LETTERS = b"abcdefghijklmnopqrstuvwxyz"


class JsonSchemas:
    """Schemas for the answers of one tokenizer. Raises ValueError without llguidance, and for a tokenizer it cannot
    read.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        if importlib.util.find_spec("llguidance") is None:
            raise ValueError("answers by a JSON schema need llguidance: pip install 'moe-dist[json-schema]'")
        self.eos_id, self.vocab_size = tokenizer.eos_id, vocab_size
        self.tokens = _tokens_of(tokenizer, vocab_size)
        found: dict[int, int] = {}
        for token in range(min(vocab_size, self.tokens.vocab_size)):
            if not self.tokens.is_special_token(token) and len(text := self.tokens.decode_bytes([token])) == 1:
                found.setdefault(text[0], token)
        self.ends = [found[byte] for byte in _ENDS if byte in found]
        self.quote, self.letters = found.get(ord('"')), [found[byte] for byte in _LETTERS if byte in found]
        self.late = {found[byte] for byte in b"[{" if byte in found}
        self._known: dict[str, Any] = {}
        self._lock = threading.Lock()

    def matcher(self, schema: str) -> Any:
        """A state at the start of an answer. Raises ValueError for a schema that is none or has what is not known."""
        with self._lock:
            if schema not in self._known:
                while len(self._known) >= _MOST_KNOWN:
                    del self._known[next(iter(self._known))]
                self._known[schema] = self._compiled(schema)
            return self._known[schema].deep_copy()

    def _compiled(self, schema: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        try:
            options: Any = {"whitespace_flexible": False, "lenient": False}
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=options)
        except ValueError as error:
            raise ValueError(f"JSON schema: {_line(error)}") from None
        found = LLMatcher(self.tokens, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if found.is_error():
            raise ValueError(f"JSON schema: {_line(found.get_error())}")
        return found

    def answer(self, schema: str, max_tokens: int) -> JsonAnswer:
        """Raises ValueError as `matcher`, and where no answer of so few tokens is found."""
        state = self.matcher(schema)
        way = self.way(state, _LONGEST_WAY)
        if way is None:
            raise ValueError(f"JSON schema: no answer of up to {_LONGEST_WAY} tokens is found for it")
        if len(way) > max_tokens:
            raise ValueError(f"max_tokens={max_tokens}: the shortest answer found for the JSON schema has {len(way)}")
        return JsonAnswer(self, state, way)

    def way(self, state: Any, longest: int) -> list[int] | None:
        """Tokens that end an answer validly from `state`, the end token last; None if none of so many are found."""
        state = state.deep_copy()
        found: list[int] = []
        while len(found) < longest:
            if state.is_accepting():
                return [*found, self.eos_id]
            following = state.compute_ff_tokens() or [self._soonest(state, len(found))]
            if not state.consume_tokens(following):
                return None
            found += following
        return None

    def _soonest(self, state: Any, position: int) -> int:
        allowed = self.allowed(state)
        if self.quote is not None and allowed[self.quote] and sum(map(bool, allowed[self.letters])) > 20:
            return self.quote
        for token in self.ends:
            if allowed[token]:
                return token
        others = allowed.nonzero().flatten().tolist()
        others = [token for token in others if token not in self.late] or others
        # Not always the first: of a pattern such as (a|b)*c that would be an a for ever.
        return others[position % len(others)] if others else self.eos_id

    def allowed(self, state: Any) -> Tensor:
        """Which tokens may be next, (V,) bool; none in a state that has failed."""
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        if not state.is_error():
            found = torch.frombuffer(bytearray(state.compute_logit_bias()), dtype=torch.uint8)[: self.vocab_size]
            mask[: len(found)] = found > 0
        return mask


class JsonAnswer:
    """Where one answer is."""

    def __init__(self, schemas: JsonSchemas, state: Any, way: Sequence[int]) -> None:
        self._schemas, self._state, self.way = schemas, state, list(way)

    def allowed(self) -> Tensor:
        """(V,) bool."""
        allowed = self._schemas.allowed(self._state)
        if not allowed.any():  # too complex for the library from here on
            allowed[self.way[0]] = True
        return allowed

    def take(self, token: int, num_left: int) -> int:
        """What comes of the wish for `token`: itself, or the next one of the way to the end. `num_left`: tokens that
        there may still be, this one among them.
        """
        if token == self.way[0]:
            self.way.pop(0)
        else:
            trial = self._state.deep_copy()
            way = self._schemas.way(trial, num_left - 1) if trial.consume_token(token) else None
            if way is not None:
                self._state, self.way = trial, way
                return token
            token = self.way.pop(0)
        if token != self._schemas.eos_id:
            self._state.consume_token(token)
        return token


def schema_text(schema: Any) -> str:
    """A schema as one line. Raises ValueError for what is none."""
    if not isinstance(schema, dict):
        raise ValueError("JSON schema: an object is wanted")
    try:
        return json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"JSON schema: {_line(error)}") from None


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]


def _tokens_of(tokenizer: Tokenizer, vocab_size: int) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    if isinstance(tokenizer, ByteTokenizer):
        return LLTokenizer(TokenizerWrapper(_Bytes(tokenizer)))
    inner: Any = getattr(tokenizer, "inner", None)
    if getattr(inner, "backend_tokenizer", None) is None:
        raise ValueError(f"answers by a JSON schema need a fast tokenizer: {tokenizer.name!r} is none")
    from llguidance.hf import from_tokenizer

    try:
        return from_tokenizer(inner, n_vocab=max(vocab_size, len(inner)), eos_token=tokenizer.eos_id)
    except ValueError as error:
        raise ValueError(f"tokenizer {tokenizer.name!r} cannot write by a JSON schema: {_line(error)}") from None


class _Bytes:
    """The tokenizer of bytes, as llguidance wants to know it."""

    bos_token_id = None

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self.eos_token_id = tokenizer.eos_id
        self.tokens = [bytes([value]) for value in range(256)] + [b"<end>", b"<padding>"]
        self.special_token_ids = [tokenizer.eos_id, tokenizer.pad_id]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)
