"""`moe-dist generate --show-experts`: the text once for each layer, every token in the colour of its busiest expert."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_dist.generate.engine import MoEInferenceEngine
    from moe_dist.generate.options import SamplingOptions

_COLOURS = (24, 130, 28, 90, 100, 23, 160, 61, 94, 29, 126, 66, 166, 18, 58, 241)
"""Of the 256 of a terminal, dark enough for white letters; experts beyond them take them again."""


def show_experts(engine: MoEInferenceEngine, prompts: Sequence[str], sampling: SamplingOptions) -> int:
    """Answer, then look at what the routers do with prompt and answer. Without colours each token has a number."""
    import torch

    from moe_dist.evaluate.expert_study import shown
    from moe_dist.models.context import RoutingContext
    from moe_dist.models.watching import watching

    assert engine.tokenizer is not None
    for prompt, answer in zip(prompts, engine.generate(prompts, sampling), strict=True):
        tokens = [*engine.encode(prompt), *answer.tokens]
        with torch.no_grad(), watching(engine.model) as seen:
            engine.model(torch.tensor([tokens], device=engine.mesh.device), context=RoutingContext())
        mine = {
            layer: ids.gather(1, weights.argmax(1, keepdim=True)).flatten().tolist()
            for layer, (ids, weights) in seen.items()
        }
        everywhere = {layer: ids for stage in engine.mesh.from_all(mine, "pp") for layer, ids in stage.items()}
        if engine.mesh.rank == 0:
            words = [shown(engine.tokenizer.decode([token]) or f"<{token}>") for token in tokens]
            for layer, experts in sorted(everywhere.items()):
                print(_line(layer, words, experts), flush=True)
    return 0


def _line(layer: int, words: Sequence[str], experts: Sequence[int]) -> str:
    if (not sys.stdout.isatty() and not os.environ.get("FORCE_COLOR")) or os.environ.get("NO_COLOR"):
        return f"L{layer:02d}  " + " ".join(f"{word}/{expert}" for word, expert in zip(words, experts, strict=True))
    text = "".join(f"{_paint(expert)}{word}" for word, expert in zip(words, experts, strict=True))
    counts = {expert: experts.count(expert) for expert in set(experts)}
    order = sorted(counts, key=lambda one: -counts[one])
    legend = " ".join(
        f"{_paint(expert)} E{expert:02d} {counts[expert] / len(experts):.0%} \x1b[0m" for expert in order[:8]
    )
    return f"L{layer:02d}  {text}\x1b[0m\n     {legend}"


def _paint(expert: int) -> str:
    return f"\x1b[97;48;5;{_COLOURS[expert % len(_COLOURS)]}m"
