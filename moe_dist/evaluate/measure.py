"""Losses of held-out text, over all ranks of any layout.

Shape suffixes: B batch, S sequence, V vocabulary, T tokens, E experts.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.data.loader import eval_batches
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.evaluate.held_out_text import Chosen
from moe_dist.evaluate.routing import watching
from moe_dist.models.precision import full
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.loss import IGNORE
from moe_dist.train.passes import evaluating, model_inputs

_LOSS, _TOKENS, _CORRECT, _BYTES = range(4)


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
    """`by_position`: (first position, past the last, loss in nats, tokens) of places in a sample, in powers of two.
    `expert_load`: by layer the (token, expert) pairs of each expert.
    """

    whole: Losses
    sources: dict[str, Losses]
    by_position: list[tuple[int, int, float, int]]
    expert_load: dict[int, list[int]]
    seconds: float = field(compare=False)

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
    names, length = samples.domains or ("all",), samples.max_seq_length
    batches = eval_batches(samples, batch_size, mesh.layout.dp_size, mesh.dp_rank)
    device, config = mesh.device, model.config
    sums = torch.zeros(len(names), 4, dtype=torch.float64, device=device)
    places = torch.zeros(length, 2, dtype=torch.float64, device=device)
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
            if model.lm_head is None:  # of a pipeline, the last stage
                continue
            source_BS = there.domain_ids if there.domain_ids is not None else torch.zeros_like(there.labels)
            _add(sums, places, logits_BSV, there.labels, source_BS.long(), tokenizer)
    for tensor in (sums, places, pairs):
        mesh.sum_over("world", tensor)
    if not sums[:, _TOKENS].sum():
        raise ValueError("nothing to measure: no token has another one of its document behind it")
    each = {name: _losses(row) for name, row in zip(names, sums.tolist(), strict=True) if row[_TOKENS]}
    load = {layer: row[:-1].tolist() for layer, row in enumerate(pairs) if row[:-1].any()}
    seconds = time.perf_counter() - started
    return Measured(_losses(sums.sum(0).tolist()), each, _by_position(places), load, seconds)


def _add(
    sums: Tensor, places: Tensor, logits_BSV: Tensor, labels_BS: Tensor, source_BS: Tensor, tokenizer: Tokenizer
) -> None:
    """A batch's losses, tokens, hits and bytes, to the sums of sources and of places in a sample."""
    flat = labels_BS.flatten()
    loss_T = F.cross_entropy(full(logits_BSV.flatten(0, 1)), flat, ignore_index=IGNORE, reduction="none").double()
    is_label_T = flat != IGNORE
    hits_T = (logits_BSV.flatten(0, 1).argmax(-1) == flat) & is_label_T
    source_T = source_BS.flatten().where(is_label_T, 0)
    for column, values in ((_LOSS, loss_T), (_TOKENS, is_label_T.double()), (_CORRECT, hits_T.double())):
        sums[:, column].index_add_(0, source_T, values)
    places[:, 0] += loss_T.view(labels_BS.shape).sum(0)
    places[:, 1] += is_label_T.view(labels_BS.shape).sum(0)
    for labels_S, source_S in zip(labels_BS.cpu(), source_BS.cpu(), strict=True):
        for source in source_S[labels_S != IGNORE].unique().tolist():
            text = tokenizer.decode(labels_S[(labels_S != IGNORE) & (source_S == source)].tolist())
            sums[source, _BYTES] += len(text.encode("utf-8", "surrogatepass"))


def _losses(row: list[float]) -> Losses:
    count = row[_TOKENS]
    return Losses(row[_LOSS] / count, int(count), int(row[_BYTES]), row[_CORRECT] / count)


def _by_position(places: Tensor) -> list[tuple[int, int, float, int]]:
    found, first = [], 0
    while first < len(places):
        end = min(max(2 * first, 1), len(places))
        loss, count = places[first:end].sum(0).tolist()
        if count:
            found.append((first, end, loss / count, int(count)))
        first = end
    return found
