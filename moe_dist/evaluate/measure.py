"""Losses of held-out text, over all ranks of any layout.

Shape suffixes: B batch, S sequence, V vocabulary, T tokens, E experts.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.data.batch import Batch
from moe_dist.data.loader import Chosen, eval_batches
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.models.precision import full
from moe_dist.models.transformer import Transformer
from moe_dist.models.watching import watching
from moe_dist.parallel.engines.eval_mode import evaluating
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.loss import IGNORE
from moe_dist.train.passes import model_inputs

_LOSS, _TOKENS, _CORRECT, _BYTES = range(4)
NUM_BINS = 15
"""Steps of confidence, as in the paper."""


@dataclass(frozen=True)
class Losses:
    """Of one source, or of all text. `loss`: nats per predicted token; `num_bytes`: of their text in UTF-8."""

    loss: float
    num_tokens: int
    num_bytes: int
    accuracy: float
    """Share of tokens that the model finds likeliest."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """What a compressor by this model would need; None of text without bytes."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes if self.num_bytes else None

    def to_json(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "accuracy": self.accuracy,
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
        }


@dataclass(frozen=True)
class Measured:
    """`by_position`: (first position, past the last, loss in nats, tokens) of positions in a sample, in powers of two.
    `expert_load`: by layer the (token, expert) pairs of each expert. `confidence`: (tokens, mean probability of the
    likeliest token, share of tokens that were it) of NUM_BINS equal steps of that probability. `samples`: of each one
    loss (nats, summed), tokens, hits and bytes.
    """

    whole: Losses
    sources: dict[str, Losses]
    by_position: list[tuple[int, int, float, int]]
    expert_load: dict[int, list[int]]
    confidence: list[tuple[int, float, float]]
    samples: list[list[float]]
    seconds: float = field(compare=False)

    @property
    def calibration_error(self) -> float:
        """Mean over tokens of the distance between confidence and accuracy of their step (Guo et al. 2017): ECE."""
        return sum(count * abs(sure - hits) for count, sure, hits in self.confidence) / self.whole.num_tokens

    def to_json(self) -> dict[str, Any]:
        names = ("from", "to", "loss", "tokens")
        return {
            **self.whole.to_json(),
            "sources": {name: losses.to_json() for name, losses in self.sources.items()},
            "loss_by_position": [dict(zip(names, row, strict=True)) for row in self.by_position],
            "expert_load": {str(layer): load for layer, load in self.expert_load.items()},
            "load_imbalance": {
                str(layer): max(load) * len(load) / max(1, sum(load)) for layer, load in self.expert_load.items()
            },
            "calibration_error": self.calibration_error,
            "calibration": [
                {"from": i / NUM_BINS, "to": (i + 1) / NUM_BINS, "tokens": count, "confidence": sure, "accuracy": hits}
                for i, (count, sure, hits) in enumerate(self.confidence)
                if count
            ],
            "seconds": self.seconds,
            "tokens_per_second": self.whole.num_tokens / self.seconds,
        }


def measure(
    model: Transformer,
    samples: Chosen,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    batch_size: int = 1,
    document_mask: bool = True,
) -> Measured:
    """Every sample once, shared out over replicas; every rank has the answer. A collective.

    The loss is the validation loss of a training on these samples: no token sees another document. Raises ValueError
    when no token has a label.
    """
    started = time.perf_counter()
    config = model.config
    batches = eval_batches(samples, batch_size, mesh.layout.dp_size, mesh.dp_rank)
    device = mesh.device
    totals = Totals(samples, device)
    pairs = torch.zeros(config.num_hidden_layers, config.num_experts + 1, dtype=torch.int64, device=device)
    with evaluating(model), watching(model) as seen:
        for batch in batches:
            there = batch.to(device)
            inputs = model_inputs(there, document_mask=document_mask)
            logits_BSV = model(**inputs)
            valid_T = inputs["context"].valid_T
            for layer, (ids_TK, _) in seen.items():
                ids = ids_TK if valid_T is None else ids_TK.masked_fill(~valid_T[:, None], config.num_experts)
                pairs[layer] += ids.flatten().bincount(minlength=config.num_experts + 1)
            if model.lm_head is not None:  # of a pipeline, the last stage
                totals.add(logits_BSV, there, tokenizer)
    for tensor in (totals.sources, totals.positions, totals.samples, totals.bins, pairs):
        mesh.sum_over("world", tensor)
    load = {layer: row[:-1].tolist() for layer, row in enumerate(pairs) if row[:-1].any()}
    return totals.measured(load, time.perf_counter() - started)


class Totals:
    """Sums in float64. Of sources and of samples: losses, tokens, hits and bytes; of positions in a sample: losses and
    tokens; of steps of confidence: tokens, confidence and hits."""

    def __init__(self, samples: Chosen, device: torch.device) -> None:
        make = partial(torch.zeros, dtype=torch.float64, device=device)
        self.names = samples.domains or ("all",)
        self.sources, self.samples = make(len(self.names), 4), make(len(samples), 4)
        self.positions, self.bins = make(samples.max_seq_length, 2), make(NUM_BINS, 3)

    def add(self, logits_BSV: Tensor, batch: Batch, tokenizer: Tokenizer) -> None:
        """A batch's numbers."""
        labels_BS = batch.labels
        flat = labels_BS.flatten()
        logs_TV = full(logits_BSV.flatten(0, 1)).log_softmax(-1)
        is_label_T = flat != IGNORE
        loss_T = F.nll_loss(logs_TV, flat, ignore_index=IGNORE, reduction="none").double()
        sure_T, best_T = logs_TV.max(-1)
        hits_T = ((best_T == flat) & is_label_T).double()
        sources = torch.zeros_like(labels_BS) if batch.domain_ids is None else batch.domain_ids.long()
        source_T = sources.flatten().where(is_label_T, 0)
        sample_T = torch.zeros_like(labels_BS)
        ids = torch.tensor(batch.sample_ids, dtype=torch.int64, device=flat.device)
        sample_T[: len(ids)] = ids[:, None]  # behind them is padding without a label
        for column, values in ((_LOSS, loss_T), (_TOKENS, is_label_T.double()), (_CORRECT, hits_T)):
            self.sources[:, column].index_add_(0, source_T, values)
            self.samples[:, column].index_add_(0, sample_T.flatten(), values)
        self.positions[:, 0] += loss_T.view(labels_BS.shape).sum(0)
        self.positions[:, 1] += is_label_T.view(labels_BS.shape).sum(0)
        sure_T = sure_T.double().exp()[is_label_T]
        bin_T = (sure_T * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        for column, values in enumerate((torch.ones_like(sure_T), sure_T, hits_T[is_label_T])):
            self.bins[:, column].index_add_(0, bin_T, values)
        for labels_S, source_S, sample in zip(labels_BS.cpu(), sources.cpu(), sample_T[:, 0].tolist(), strict=True):
            for source in source_S[labels_S != IGNORE].unique().tolist():
                text = tokenizer.decode(labels_S[(labels_S != IGNORE) & (source_S == source)].tolist())
                size = len(text.encode("utf-8", "surrogatepass"))
                self.sources[source, _BYTES] += size
                self.samples[sample, _BYTES] += size

    def measured(self, load: dict[int, list[int]], seconds: float) -> Measured:
        """What they come to. Raises ValueError when no token had a label."""
        if not self.sources[:, _TOKENS].sum():
            raise ValueError("nothing to measure: no token has another one of its document behind it")
        rows = zip(self.names, self.sources.tolist(), strict=True)
        each = {name: _losses(row) for name, row in rows if row[_TOKENS]}
        whole = _losses(self.sources.sum(0).tolist())
        bins = [
            (int(count), *(part / max(1, count) for part in (sure, hits))) for count, sure, hits in self.bins.tolist()
        ]
        return Measured(whole, each, _by_position(self.positions), load, bins, self.samples.tolist(), seconds)


def _losses(row: list[float]) -> Losses:
    count = row[_TOKENS]
    return Losses(row[_LOSS] / count, int(count), int(row[_BYTES]), row[_CORRECT] / count)


def _by_position(positions: Tensor) -> list[tuple[int, int, float, int]]:
    found, first = [], 0
    while first < len(positions):
        end = min(max(2 * first, 1), len(positions))
        loss, count = positions[first:end].sum(0).tolist()
        if count:
            found.append((first, end, loss / count, int(count)))
        first = end
    return found
