"""Which bytes of a Hugging Face folder each rank of a layout reads, from the headers of its files. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moe_dist.config import Config
from moe_dist.config.families import families
from moe_dist.models.tensor_names import Names
from moe_dist.parallel.layout import Layout, layers_by_pp_rank
from moe_dist.pretrained.source import WHOLE, Held, Piece, in_one_line, pieces, read_folder, readable

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Reading:
    """What ranks with the same `pp` coordinate and the same experts read.

    `ranges`: of bytes by file, ends past the last.
    """

    ranks: list[int]
    num_tensors: int
    ranges: dict[str, list[tuple[int, int]]]

    @property
    def num_bytes(self) -> int:
        return sum(end - start for ranges in self.ranges.values() for start, end in ranges)


def reading_plan(config: Config, layout: Layout) -> list[Reading]:
    """For all ranks; those that read the same together. Raises ValueError naming what is wrong with the folder."""
    assert config.model.from_pretrained is not None
    contents = read_folder(Path(config.model.from_pretrained), config.model)
    names = Names(config.model, families()[contents.family])
    if contents.problems:
        raise ValueError(f"model.from_pretrained={config.model.from_pretrained}: {in_one_line(contents.problems)}")
    everything, plan = readable(contents, names), []
    for pp, stages in enumerate(layers_by_pp_rank(config)):
        layers = {layer for stage in stages for layer in stage}
        held = _held(config, layers, WHOLE)
        here = [(entry, part) for entry, part in everything if held(part.ours) is not None]
        for ep in range(layout.ep_size):
            experts = layout.experts_of(ep, config.model.num_experts)
            found = list(pieces(here, _held(config, layers, experts)))
            ranks = [layout.rank_at(pp, edp, ep) for edp in range(layout.edp_size)]
            plan.append(Reading(ranks, len(found), _merged(found)))
    return plan


def _merged(found: list[Piece]) -> dict[str, list[tuple[int, int]]]:
    """File -> byte ranges, those that touch as one. They come in the order of files."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for piece in found:
        start, end = piece.byte_range
        mine = ranges.setdefault(piece.entry.file, [])
        if mine and mine[-1][1] == start:
            start, _ = mine.pop()
        mine.append((start, end))
    return ranges


def _held(config: Config, layers: set[int], experts: range) -> Held:
    model = config.model
    is_first, is_last = 0 in layers, model.num_hidden_layers - 1 in layers

    def held(ours: str) -> range | None:
        if match := _LAYER.match(ours):
            if int(match[1]) not in layers:
                return None
            return experts if ".moe.experts." in ours else WHOLE
        if ours == "embed_tokens.weight":
            return WHOLE if is_first or (is_last and model.tie_word_embeddings) else None
        if ours == "lm_head.weight" and model.tie_word_embeddings:
            return None  # it is the embedding
        return WHOLE if is_last else None

    return held
