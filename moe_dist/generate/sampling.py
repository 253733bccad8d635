"""From logits to the next token, and to the next beams.

Shape suffixes: V vocabulary, N beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_dist.generate.options import SamplingOptions


def penalised(scores_V: Tensor, tokens: Sequence[int], penalty: float) -> Tensor:
    """Scores with those of tokens that have been there made less likely (Keskar et al. 2019, CTRL)."""
    if penalty == 1.0:
        return scores_V
    seen = torch.tensor(sorted(set(tokens)), device=scores_V.device)
    seen = seen[seen < scores_V.shape[-1]]
    there = scores_V[seen]
    return scores_V.index_copy(0, seen, torch.where(there < 0, there * penalty, there / penalty))


def probabilities(logits_V: Tensor, tokens: Sequence[int], options: SamplingOptions) -> Tensor:
    """What the next token is drawn from, (V,) float32, after everything that the options ask for."""
    scores = penalised(logits_V.float(), tokens, options.repetition_penalty) / options.temperature
    nothing = float("-inf")
    if 0 < options.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(options.top_k).values[-1], nothing)
    if options.top_p < 1.0:
        ascending, order = scores.sort()
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - options.top_p
        unlikely[-1] = False
        scores = scores.masked_fill(torch.zeros_like(unlikely).scatter(0, order, unlikely), nothing)
    if options.min_p:
        chances = scores.softmax(-1)
        scores = scores.masked_fill(chances < options.min_p * chances.max(), nothing)
    return scores.softmax(-1)


def next_token(
    logits_V: Tensor, tokens: Sequence[int], options: SamplingOptions, generator: torch.Generator | None
) -> int:
    """The likeliest one, or with a temperature one drawn by `generator`, which is of the CPU."""
    if not options.temperature:
        return int(penalised(logits_V.float(), tokens, options.repetition_penalty).argmax())
    chances = probabilities(logits_V, tokens, options).cpu()
    return int(torch.multinomial(chances, 1, generator=generator))


_NEVER = -1.0e9


@dataclass
class BeamSearch:
    """N continuations of one prompt side by side, by the rules of `transformers.generate` (early_stopping=False).

    A step proposes the best 2N pairs of beam and token (`propose`, where logits are) and then takes them (`take`, the
    same on every rank of a pipeline).
    """

    num_beams: int
    length_penalty: float
    max_tokens: int
    eos_ids: frozenset[int]
    running: list[list[int]] = field(default_factory=list)
    """New tokens of every beam."""
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))
    """(N,) float32 sums of log-probabilities of running beams, best first."""

    def __post_init__(self) -> None:
        self.running = [[] for _ in range(self.num_beams)]
        # Only the first beam counts in the first step: all are the same there.
        self.scores = torch.full((self.num_beams,), _NEVER).index_fill(0, torch.tensor([0]), 0.0)
        self.done: list[tuple[float, list[int]]] = []
        """Finished beams, best first."""
        self.can_improve = True

    @property
    def num_proposed(self) -> int:
        """Enough for N that go on when as many as there are end tokens do not."""
        return max(2, 1 + len(self.eos_ids)) * self.num_beams

    def propose(self, logits_NV: Tensor, tokens: Sequence[Sequence[int]], penalty: float) -> tuple[Tensor, Tensor]:
        """Scores and numbers (beam * V + token) of the best pairs. `tokens`: all of every beam."""
        logs = logits_NV.float().log_softmax(-1)
        logs = torch.stack([penalised(row, so_far, penalty) for row, so_far in zip(logs, tokens, strict=True)])
        return (logs + self.scores.to(logs.device)[:, None]).flatten().topk(self.num_proposed)

    def take(self, scores: Tensor, numbers: Tensor, vocabulary: int) -> tuple[list[int], bool]:
        """Which beam each of the next N goes on from, and whether the search is over."""
        parents, tokens = (numbers // vocabulary).tolist(), (numbers % vocabulary).tolist()
        longer = [[*self.running[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        length = len(longer[0])
        ends = torch.tensor([token in self.eos_ids or length >= self.max_tokens for token in tokens])
        self._finish(scores, longer, ends, length)
        going_on = scores + ends * _NEVER
        chosen = going_on.topk(self.num_beams).indices.tolist()
        self.scores, self.running = going_on[chosen], [longer[index] for index in chosen]
        if len(self.done) == self.num_beams:
            worst = self.done[-1][0]
            self.can_improve = self.can_improve and float(self.scores[0] / length**self.length_penalty) > worst
        return [parents[index] for index in chosen], not self.can_improve or bool(ends.all())

    def _finish(self, scores: Tensor, longer: list[list[int]], ends: Tensor, length: int) -> None:
        if not self.can_improve:
            return
        shown = (scores / length**self.length_penalty).tolist()
        found = [(shown[i], longer[i]) for i in range(self.num_beams) if ends[i]]
        self.done = sorted([*self.done, *found], key=lambda pair: -pair[0])[: self.num_beams]

    @property
    def best(self) -> list[int]:
        """New tokens of the best beam."""
        return self.done[0][1] if self.done else self.running[0]
