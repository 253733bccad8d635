"""How long somebody who asks alone waits: for the first token of an answer, and for each one after it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.generate.options import SamplingOptions
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh

PROMPT_TOKENS, NEW_TOKENS = 128, 32
"""Fewer where the model has not so many positions."""


@dataclass(frozen=True)
class Latency:
    """Of one greedy answer, nobody else in the batch. `seconds_per_token`: the median after the first one."""

    prompt_tokens: int
    first_token_seconds: float
    seconds_per_token: float

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def measure_latency(model: Transformer, mesh: Mesh) -> Latency:
    """By the engine of `generate`, behind a prompt of random tokens, once it has answered one before. A collective."""
    limit = model.config.max_position_embeddings
    num_prompt = max(1, min(PROMPT_TOKENS, limit // 2))
    options = SamplingOptions(min(NEW_TOKENS, limit - num_prompt), ignore_eos=True)
    drawn = torch.randint(model.config.vocab_size, (num_prompt,), generator=torch.Generator().manual_seed(0))
    engine = MoEInferenceEngine(model, mesh=mesh)
    first, *others = [_seconds(engine, drawn.tolist(), options) for _ in range(2)][1]
    return Latency(num_prompt, first, median(others or [first]))


def _seconds(engine: MoEInferenceEngine, prompt: list[int], options: SamplingOptions) -> list[float]:
    """Of each step of an answer: the first reads the prompt."""
    engine.add(prompt, options)
    found, busy = [], True
    while busy:
        started = time.perf_counter()
        _, busy = engine.step()
        found.append(time.perf_counter() - started)
    return found
