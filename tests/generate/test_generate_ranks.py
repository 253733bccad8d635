"""Experts, layers and replicas on two ranks say what one process says."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from patches import replaced
from ranks import RankFailure, run_ranks
from tiny import mesh_of, tiny_config

from moe_dist.data.tokenizer import ByteTokenizer
from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.generate.options import SamplingOptions
from moe_dist.models.int8 import to_int8
from moe_dist.parallel.parallelize import build_part

PROMPTS = ["def f", "x", "a somewhat longer prompt", "end"]
DRAWN = SamplingOptions(10, temperature=1.2, top_p=0.95, seed=7, ignore_eos=True)
CASES: list[tuple[list[str], SamplingOptions]] = [
    (PROMPTS, SamplingOptions(10, ignore_eos=True)),
    (PROMPTS[:1], SamplingOptions(10, ignore_eos=True)),  # one replica has nothing to do
    (PROMPTS[:3], DRAWN),
    (PROMPTS[:3], SamplingOptions(8, num_beams=3)),
    (PROMPTS[:2], SamplingOptions(4, logprobs=2)),
]
if importlib.util.find_spec("llguidance") is not None:
    CASES.append((PROMPTS[:3], SamplingOptions(24, temperature=1.5, seed=3, json_schema='{"type": "object"}')))
INT8 = "int8"
LAYOUTS = {
    "ep": ("ep_size=2",),
    "ep-dedup": ("ep_size=2", "parallel.dispatcher=dedup"),
    "ep-all-gather": ("ep_size=2", "parallel.dispatcher=all_gather"),
    "pp": ("pp_size=2", "gradient_accumulation_steps=2"),
    "pp-vshape": ("pp_size=2", "gradient_accumulation_steps=4", "parallel.schedule=zero_bubble"),
    "replicas": (),
    "ep-int8": ("ep_size=2", INT8),
}


def answers(overrides: tuple[str, ...]) -> list[Any]:
    """(tokens, text, finished, log-probabilities) of every case, on one rank."""
    keys = [key for key in overrides if key != INT8]
    config = tiny_config("model.vocab_size=272", "model.num_hidden_layers=4", "max_position_embeddings=64", *keys)
    mesh = mesh_of(config.parallel.ep_size, None, config.parallel.pp_size)
    model = build_part(config, mesh)
    model.initialize(5)
    if INT8 in overrides:
        to_int8(model)
    engine = MoEInferenceEngine(model, ByteTokenizer(), mesh=mesh, max_rows=4)
    found = []
    for prompts, options in CASES:
        for one in engine.generate(prompts, options):
            logs = [(round(p, 4), [(i, round(q, 4)) for i, q in best]) for p, best in one.logprobs]
            found.append((one.tokens, one.text, one.finished, logs))
    assert engine.pool.num_used == 0
    return found


def answers_without_sharing(overrides: tuple[str, ...]) -> list[Any]:
    """Planted: a stage does not hear what the last one has chosen."""
    own = torch.zeros(1)
    with replaced(type(mesh_of(1, None, 2)), "sum_over", lambda self, axis, tensor: tensor + own.to(tensor.dtype)):
        return answers(overrides)


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_the_answers_of_one_process(layout: str) -> None:
    alone = answers(tuple(key for key in LAYOUTS[layout] if key == INT8))
    for rank, found in enumerate(run_ranks(answers, 2, LAYOUTS[layout])):
        assert found == alone, f"rank {rank}"


@pytest.mark.dist
def test_a_stage_that_hears_nothing_is_seen() -> None:
    try:
        first, _ = run_ranks(answers_without_sharing, 2, LAYOUTS["pp"], timeout=6)
    except RankFailure:  # one stage has ended an answer, and the other waits for its next token
        return
    assert first != answers(())
