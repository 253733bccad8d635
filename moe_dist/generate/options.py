"""How to go on from a prompt. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields

ALMOST_GREEDY = 1e-5
"""Logits divided by less are no numbers any more; what would be drawn is the likeliest token."""


@dataclass(frozen=True)
class SamplingOptions:
    """The defaults are greedy. Names and meanings are those of `transformers.GenerationConfig`, but for `stop`.

    `temperature` 0, or below ALMOST_GREEDY, takes the likeliest token; above, tokens are drawn after repetition
    penalty, temperature, top-k, top-p and min-p, in this order. `stop`: texts that end it, not part of the answer.
    `json_schema`: the text of a JSON schema; the answer is JSON by it, whole within `max_tokens`. `ignore_eos`: go on
    behind the end of a document. `logprobs`: natural logarithms of the model's probabilities, of
    the token and of so many of the likeliest ones. `num_beams` above 1 is beam search, which draws nothing.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    ignore_eos: bool = False
    logprobs: int | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming option and value."""
        ranges = {
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1 (all)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (all) to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0; 1 changes nothing"),
            "num_beams": (1 <= self.num_beams <= 64, "from 1 to 64"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 20, "from 0 to 20"),
            "stop": (all(self.stop) and len(self.stop) <= 16, "at most 16 texts, none empty"),
        }
        for field in fields(self):
            good, allowed = ranges.get(field.name, (True, ""))
            if not good:
                raise ValueError(f"{field.name}={getattr(self, field.name)}: {allowed}")
        if self.temperature < ALMOST_GREEDY:
            object.__setattr__(self, "temperature", 0.0)
        if self.num_beams > 1 and (self.temperature or self.logprobs is not None):
            key = "temperature" if self.temperature else "logprobs"
            raise ValueError(f"{key}={getattr(self, key)}: beam search (num_beams={self.num_beams}) has none")
        if self.json_schema is not None and (self.num_beams > 1 or self.stop or self.ignore_eos):
            key = "num_beams" if self.num_beams > 1 else "stop" if self.stop else "ignore_eos"
            raise ValueError(f"{key}={getattr(self, key)}: an answer by a JSON schema ends where the schema says")
