"""Which tokens and sources go to which expert.

Shape suffixes: E experts, N sources, U different tokens of the text, T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_dist.data.loader import Chosen, eval_batches
from moe_dist.data.packing import PADDING_DOCUMENT
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.models.transformer import Transformer
from moe_dist.models.watching import watching
from moe_dist.parallel.engines.eval_mode import evaluating
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.passes import model_inputs

MOST_CELLS = 500_000_000
"""Counts by layer, expert and token that are kept at most."""


@dataclass(frozen=True)
class LayerStudy:
    """One layer, as int64 counts: `tokens_EU`, how often each token went to each expert; `sources_NE` likewise;
    `together_EE`: tokens that went to both experts, on the diagonal all of an expert.
    """

    layer: int
    num_tokens: int
    tokens_EU: Tensor
    sources_NE: Tensor
    together_EE: Tensor

    @property
    def load_E(self) -> Tensor:
        """Tokens of each expert."""
        return self.together_EE.diagonal()

    @property
    def specialisation_E(self) -> Tensor:
        """Bits by which an expert's tokens differ from all tokens (Kullback-Leibler); 0: as the text is."""
        everything_U = self.tokens_EU.sum(0).double()
        ratio = _shares(self.tokens_EU) / (everything_U / everything_U.sum().clamp(min=1))
        return (_shares(self.tokens_EU) * ratio.log2().nan_to_num(0.0, 0.0, 0.0)).sum(1)

    @property
    def bits(self) -> float:
        """What knowing the expert tells of the token: mutual information, in bits."""
        load = self.tokens_EU.sum(1).double()
        return float((self.specialisation_E * load).sum() / load.sum().clamp(min=1))

    @property
    def overlap_EE(self) -> Tensor:
        """Share of tokens that two experts have in common: sum over tokens of the smaller of both shares; 1: alike."""
        shares = _shares(self.tokens_EU)
        return torch.stack([torch.minimum(shares, row).sum(1) for row in shares])

    @property
    def co_activation_EE(self) -> Tensor:
        """How much more often two experts get a token together than independent ones would; NaN: one gets none."""
        load = self.load_E.double()
        found = self.together_EE.double() * self.num_tokens / (load[:, None] * load)
        return found.fill_diagonal_(float("nan"))

    def top_tokens(self, expert: int, count: int) -> list[tuple[int, int, float]]:
        """(token as numbered in the study, times, share of that token's pairs), those that make the expert what it is:
        by their part in its specialisation."""
        everything = self.tokens_EU.sum(0).double()
        share = _shares(self.tokens_EU)[expert]
        ratio = share / (everything / everything.sum().clamp(min=1))
        part = (share * ratio.log2()).nan_to_num(0.0, 0.0, 0.0)
        best = part.argsort(descending=True, stable=True)[:count].tolist()
        times = self.tokens_EU[expert]
        return [(u, int(times[u]), float(times[u] / everything[u])) for u in best if times[u] and part[u] > 0]


@dataclass(frozen=True)
class ExpertStudy:
    """All layers. `words`: the text of each of the U tokens; `sources`: names."""

    words: list[str]
    sources: tuple[str, ...]
    layers: list[LayerStudy]
    num_tokens: int

    def to_json(self, count: int = 10) -> dict[str, Any]:
        """Without counts of single tokens but for the `count` most telling ones of each expert."""
        return {
            "tokens": self.num_tokens,
            "sources": list(self.sources),
            "layers": [
                {
                    "layer": layer.layer,
                    "bits": layer.bits,
                    "experts": [
                        {
                            "expert": expert,
                            "tokens": int(layer.load_E[expert]),
                            "bits": float(layer.specialisation_E[expert]),
                            "sources": layer.sources_NE[:, expert].tolist(),
                            "top_tokens": [
                                {"text": self.words[u], "times": times, "share": share}
                                for u, times, share in layer.top_tokens(expert, count)
                            ],
                        }
                        for expert in range(len(layer.load_E))
                    ],
                }
                for layer in self.layers
            ],
        }


@torch.no_grad()
def study(
    model: Transformer,
    samples: Chosen,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    batch_size: int = 1,
) -> ExpertStudy:
    """Run the samples through the model and count, on every rank of any layout; each has the answer. A collective.

    Raises ValueError for more experts times tokens than can be counted, and for a model without experts.
    """
    config = model.config
    layers = config.moe_layers
    if not layers:
        raise ValueError("this model has no experts")
    every = (samples.sample(index) for index in range(len(samples)))
    there_are = [np.unique(one["input_ids"][one["document_ids"] != PADDING_DOCUMENT]) for one in every]
    known = torch.from_numpy(np.unique(np.concatenate(there_are))).to(mesh.device)
    size, num_experts, names = len(known), config.num_experts, samples.domains or ("all",)
    if len(layers) * num_experts * size > MOST_CELLS:
        raise ValueError(
            f"{len(layers)} layers x {num_experts} experts x {size} different tokens are too many counts: "
            "give less text (--max-samples)"
        )
    tokens = torch.zeros(len(layers), num_experts + 1, size, dtype=torch.int64, device=mesh.device)
    sources = torch.zeros(len(layers), len(names), num_experts + 1, dtype=torch.int64, device=mesh.device)
    together = torch.zeros(len(layers), num_experts, num_experts, dtype=torch.int64, device=mesh.device)
    total = torch.zeros(1, dtype=torch.int64, device=mesh.device)
    with evaluating(model), watching(model) as seen:
        for batch in eval_batches(samples, batch_size, mesh.layout.dp_size, mesh.dp_rank):
            there = batch.to(mesh.device)
            inputs = model_inputs(there)
            model(**inputs)
            valid_T = inputs["context"].valid_T
            word_T = torch.searchsorted(known, there.input_ids.flatten()).clamp(max=size - 1)
            source_T = torch.zeros_like(word_T) if there.domain_ids is None else there.domain_ids.flatten().long()
            total += len(word_T) if valid_T is None else valid_T.sum()
            for layer, (ids_TK, _) in seen.items():
                index = layers.index(layer)
                ids = ids_TK if valid_T is None else ids_TK.masked_fill(~valid_T[:, None], num_experts)
                _count(tokens[index], ids * size + word_T[:, None])
                _count(sources[index], source_T.where(source_T < len(names), 0)[:, None] * (num_experts + 1) + ids)
                chosen = torch.zeros(len(ids), num_experts + 1, device=ids.device).scatter_(1, ids, 1.0)[:, :-1]
                together[index] += (chosen.T @ chosen).long()
    for counts in (tokens, sources, together):
        mesh.sum_over("world", counts)
    num_tokens = int(mesh.sum_over("dp", total))
    words = [tokenizer.decode([int(token)]) or f"<{int(token)}>" for token in known]
    found = [
        LayerStudy(layer, num_tokens, tokens[i, :-1].cpu(), sources[i, :, :-1].cpu(), together[i].cpu())
        for i, layer in enumerate(layers)
    ]
    return ExpertStudy(words, tuple(names), found, num_tokens)


def _count(into: Tensor, indices: Tensor) -> None:
    into.view(-1).add_(indices.flatten().bincount(minlength=into.numel()))


def _shares(counts: Tensor) -> Tensor:
    return counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)


def shown(word: str) -> str:
    """A token's text on one line, with its spaces and line ends to be seen."""
    marks: dict[str, str] = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    return "".join(marks.get(char, char if char.isprintable() else "·") for char in word)


def lines(study: ExpertStudy, count: int = 8, layers: Sequence[int] | None = None) -> list[str]:
    """The study as text: a line for each expert."""
    said = [f"{study.num_tokens:,} tokens, {len(study.words):,} different ones; sources: {', '.join(study.sources)}"]
    for layer in study.layers:
        if layers is not None and layer.layer not in layers:
            continue
        load, special, overlap = layer.load_E, layer.specialisation_E, layer.overlap_EE.clone().fill_diagonal_(-1)
        together = layer.co_activation_EE.nan_to_num(-1.0)
        said += ["", f"layer {layer.layer}: an expert tells {layer.bits:.2f} bits of its token"]
        for expert in range(len(load)):
            share = float(load[expert]) / max(1, study.num_tokens)
            tokens = " ".join(shown(study.words[u]) for u, _, _ in layer.top_tokens(expert, count)) or "-"
            most, partner = int(overlap[expert].argmax()), int(together[expert].argmax())
            said.append(
                f"  E{expert:02d} {share:6.1%} of tokens {special[expert]:5.2f} bits  most like E{most:02d} "
                f"({overlap[expert, most].clamp(min=0):.0%})  often with E{partner:02d} "
                f"({together[expert, partner].clamp(min=0):.1f}x)  {tokens}"
            )
    return said
