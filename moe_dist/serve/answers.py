"""An engine's events as OpenAI's objects: whole answers, and the pieces of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_dist.data.tokenizer import ByteTokenizer, Tokenizer
from moe_dist.generate.requests import Completion, Event, LogProbs


@dataclass
class Answers:
    """To the prompts of one request, as they come. `is_chat`: /v1/chat/completions, else /v1/completions."""

    model: str
    tokenizer: Tokenizer
    prompt_sizes: Sequence[int]
    is_chat: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.is_chat else "cmpl-") + secrets.token_hex(12)
        self.answers = [Completion(size) for size in self.prompt_sizes]

    def add(self, index: int, event: Event) -> dict[str, Any]:
        """The piece of a stream that this event is."""
        offset = len(self.answers[index].text)
        self.answers[index].add(event)
        logprobs = self._logprobs(event.tokens, event.logprobs, offset) if event.logprobs else None
        if self.is_chat:
            choice: dict[str, Any] = {"index": index, "delta": {"content": event.text}}
        else:
            choice = {"index": index, "text": event.text}
        return self._whole([choice | {"logprobs": logprobs, "finish_reason": event.finished}], is_piece=True)

    def first_piece(self) -> dict[str, Any]:
        """That a chat's stream begins with: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._whole([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}], is_piece=True)

    def usage_piece(self) -> dict[str, Any]:
        """That a stream ends with when it is asked for."""
        return self._whole([], is_piece=True) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        prompt, new = sum(self.prompt_sizes), sum(len(answer.tokens) for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def whole(self) -> dict[str, Any]:
        """Everything at once."""
        choices = []
        for index, answer in enumerate(self.answers):
            logprobs = self._logprobs(answer.tokens, answer.logprobs, 0) if answer.logprobs else None
            if self.is_chat:
                choice: dict[str, Any] = {"index": index, "message": {"role": "assistant", "content": answer.text}}
            else:
                choice = {"index": index, "text": answer.text}
            choices.append(choice | {"logprobs": logprobs, "finish_reason": answer.finished})
        return self._whole(choices, is_piece=False) | {"usage": self.usage()}

    def _whole(self, choices: list[dict[str, Any]], *, is_piece: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_piece else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[LogProbs], offset: int) -> dict[str, Any]:
        if self.is_chat:
            return {
                "content": [
                    self._token(token, value) | {"top_logprobs": [self._token(*pair) for pair in best]}
                    for token, (value, best) in zip(tokens, logprobs, strict=True)
                ]
            }
        texts = [self._text(token) for token in tokens]
        offsets = [offset]
        for text in texts[:-1]:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [value for value, _ in logprobs],
            "top_logprobs": [{self._text(token): value for token, value in best} for _, best in logprobs],
            "text_offset": offsets,
        }

    def _token(self, token: int, value: float) -> dict[str, Any]:
        text = self._text(token)
        known: list[int] | None = list(text.encode())
        if "\ufffd" in text:  # a piece of a character
            known = [token] if isinstance(self.tokenizer, ByteTokenizer) else None
        return {"token": text, "logprob": value, "bytes": known}

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token])
