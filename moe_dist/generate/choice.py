"""The choice of a request's next token, as float64 numbers that all stages of a pipeline can hear in one sum.

Only the last stage has logits, and `choose` there; the others add zeros, and every stage reads the sum.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dist.generate.requests import Live, LogProbs
from moe_dist.generate.sampling import next_token


def num_numbers(live: Live) -> int:
    """How many say what is chosen for a request."""
    if live.beams is not None:
        return 2 * live.beams.num_proposed
    return 1 if live.options.logprobs is None else 2 + 2 * live.options.logprobs


def choose(live: Live, logits: Tensor, row: int, likeliest: list[int]) -> Tensor:
    """(num_numbers,) for a request whose sequences begin at `row` of logits (rows, V), the largest of them by row.

    Of beams the scores of what they propose, and these (parent, token) as numbers; else the token, and where they are
    asked for its log-probability, the best tokens and their log-probabilities.
    """
    options = live.options
    if live.beams is not None:
        few = logits[row : row + len(live.sequences)].expand(options.num_beams, -1)
        sequences = live.sequences * (options.num_beams // len(live.sequences))
        scores, pairs = live.beams.propose(few, sequences, options.repetition_penalty)
        return torch.cat((scores.double(), pairs.double())).cpu()
    scores_V = logits[row]
    if live.json is not None:
        scores_V = scores_V.masked_fill(~live.json.allowed().to(scores_V.device), float("-inf"))
    if options.temperature or options.repetition_penalty != 1.0 or live.json is not None:
        token = next_token(scores_V, live.sequences[0], options, live.generator)
    else:
        token = likeliest[row]
    if live.json is not None:
        num_left = options.max_tokens - (len(live.sequences[0]) - live.num_prompt)
        token = live.json.take(token, num_left)
    numbers = [float(token)]
    if options.logprobs is not None:
        logs_V = logits[row].double().log_softmax(-1)
        best = logs_V.topk(options.logprobs)
        numbers += [float(logs_V[token]), *best.indices.tolist(), *best.values.tolist()]
    return torch.tensor(numbers, dtype=torch.float64)


def chosen_token(live: Live, numbers: Tensor) -> tuple[int, tuple[LogProbs, ...]]:
    """What `choose` has chosen for a request without beams: the token, and its log-probabilities if asked for."""
    token, *rest = numbers.tolist()
    count = live.options.logprobs
    if count is None:
        return int(token), ()
    own, best = rest[0], zip(map(int, rest[1 : 1 + count]), rest[1 + count :], strict=True)
    return int(token), ((own, tuple(best)),)


def chosen_pairs(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """What `choose` proposes for a request with beams: scores float32 and pairs int64, (num_proposed,) each."""
    scores, pairs = numbers.chunk(2)
    return scores.float(), pairs.long()
