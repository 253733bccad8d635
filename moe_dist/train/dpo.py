"""Direct preference optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290).

A pair's loss is -log sigmoid(beta * ((log p(chosen) - log r(chosen)) - (log p(rejected) - log r(rejected)))), p the
model and r the reference; log p of an answer is the sum over its tokens, without those of its prompt. One rule for
scale, as for tokens: a sum over pairs, divided by the pairs of the global batch.

Shape suffixes: B rows, S tokens a row, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config import Config
from moe_dist.data.batch import Batch, Pairs
from moe_dist.models.lora import adapters_off
from moe_dist.models.precision import full
from moe_dist.models.transformer import HeadFunction, Transformer
from moe_dist.parallel.engines.eval_mode import evaluating
from moe_dist.train.loss import head_log_probs
from moe_dist.train.passes import model_inputs


@dataclass(frozen=True)
class Rewards:
    """Means over the pairs of a global batch. A reward is beta * (log p - log r) of an answer.

    `accuracy`: share of the pairs whose chosen answer has the larger one.
    """

    chosen: float
    rejected: float
    accuracy: float

    @property
    def margin(self) -> float:
        """By how much that of the chosen answer is larger."""
        return self.chosen - self.rejected


def dpo_losses(log_probs_P2: Tensor, reference_P2: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each pair (P,) from the log-probabilities of its chosen and rejected answer.

    `label_smoothing`: share of the pairs that are the wrong way round.
    """
    rewards_P2 = beta * (log_probs_P2 - reference_P2)
    margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    losses_P = -(1.0 - label_smoothing) * F.logsigmoid(margins_P)
    return losses_P - label_smoothing * F.logsigmoid(-margins_P) if label_smoothing else losses_P


def answer_log_probs(
    hidden_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, pairs: Pairs, chunk_tokens: int | Literal["auto"] = "auto"
) -> Tensor:
    """Log-probabilities (P, 2) of both answers of each pair; labels are -100 at the prompt.

    In float64: a margin is a small difference of large sums.
    """
    log_probs_BS = head_log_probs(hidden_BSD, weight_VD, labels_BS, chunk_tokens=chunk_tokens)
    sums = log_probs_BS.new_zeros(2 * len(pairs) + 1, dtype=torch.float64)  # the last of padding
    sums = sums.index_add(0, pairs.sequence_ids.flatten(), log_probs_BS.flatten().double())
    return sums[:-1].view(-1, 2)


class Dpo:
    """The loss on preferences in the place of that on tokens: what the reference says first, then the loss."""

    def __init__(self, model: Transformer, config: Config, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def with_reference(self, batch: Batch) -> Batch:
        """`batch`, which is on its device, with log-probabilities under the reference: those it has, of the start.

        Else a forward pass without gradients (collective); of a pipeline the last stage alone gets them.
        """
        assert batch.pairs is not None
        if batch.pairs.reference is not None:
            return batch
        assert self.config.dpo_reference == "base", "nobody has measured the start"
        with adapters_off(self.model):
            return self.measured(batch)

    def measured(self, batch: Batch) -> Batch:
        """`batch` with log-probabilities under the model as it is, without dropout or other noise."""
        train, pairs = self.config.train, batch.pairs
        assert pairs is not None

        def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
            return answer_log_probs(hidden, weight, batch.labels, pairs, train.loss_chunk_tokens)

        with evaluating(self.model), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=train.bf16):
            found = self.model(**model_inputs(batch), head_function=log_probs)
        if self.model.lm_head is None:
            found = torch.zeros(len(pairs), 2, dtype=torch.float64, device=self.device)
        return batch.with_reference(found)

    def loss_of(self, batch: Batch, scale: Tensor | float) -> HeadFunction:
        """A function of the head: `scale` times the sum of the losses of `batch`, 0-dim in full precision. Called, it
        adds to what `take_sums` gives."""
        dpo, chunk_tokens, pairs = self.config.dpo, self.config.train.loss_chunk_tokens, batch.pairs
        assert pairs is not None
        reference_P2 = pairs.reference
        assert reference_P2 is not None

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            log_probs_P2 = answer_log_probs(hidden, weight, batch.labels, pairs, chunk_tokens)
            rewards_P2 = dpo.beta * (log_probs_P2.detach() - reference_P2)
            right_P = rewards_P2[:, 0] > rewards_P2[:, 1]
            self._sums += torch.stack([*rewards_P2.sum(0), right_P.sum()])
            return full(dpo_losses(log_probs_P2, reference_P2, dpo.beta, dpo.label_smoothing).sum() * scale)

        return loss

    def take_sums(self) -> Tensor:
        """Sums over the pairs since the last call, (3,) float64: rewards of chosen answers, of rejected ones, and pairs
        that are the right way round. Of a pipeline zeros but for the last stage.
        """
        taken, self._sums = self._sums, torch.zeros_like(self._sums)
        return taken


REWARD_FACTS = ("rewards_chosen", "rewards_rejected", "reward_margin", "reward_accuracy")
"""Fields of a record."""


def reward_facts(rewards: Rewards | None) -> dict[str, float]:
    """As those; nothing where there are none."""
    if rewards is None:
        return {}
    values = (rewards.chosen, rewards.rejected, rewards.margin, rewards.accuracy)
    return dict(zip(REWARD_FACTS, values, strict=True))


def rewards_of(sums: list[float], num_pairs: float) -> Rewards | None:
    """Means out of sums over all ranks; None without a pair."""
    return Rewards(*(value / num_pairs for value in sums)) if num_pairs else None
