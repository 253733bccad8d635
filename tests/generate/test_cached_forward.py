"""The model with a cache gives the logits it gives without: every kind of attention, rows of several lengths."""

from __future__ import annotations

import pytest
import torch
from folders import EVERY
from patches import Replace, replaced

from moe_dist.config import ModelConfig
from moe_dist.generate.paged_cache import BLOCK, BlockPool, LayerOfStep, StepCache
from moe_dist.models.context import RoutingContext
from moe_dist.models.transformer import Transformer

PLAIN = EVERY["qwen3_moe-0"]
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = EVERY | {
    "eager": PLAIN.model_copy(update={"attn_implementation": "eager"}),
    "llama3-rope": PLAIN.model_copy(update={"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}}),
}
LENGTHS = (3, 37, 18)
"""One within a block, one over three, one that ends just past one."""


def model_of(config: ModelConfig) -> Transformer:
    model = Transformer(config.model_copy(update={"initializer_range": 0.2}))
    model.initialize(seed=3)
    return model.eval()


def cached(model: Transformer, rows: list[torch.Tensor], cuts: tuple[int, ...]) -> list[torch.Tensor]:
    """Logits of all rows, all in one batch: each is given in parts that end at these shares (of 4), then by ones."""
    pool = BlockPool(64)
    tables = [pool.take(len(row) // BLOCK + 1) for row in rows]
    done, logits = [0] * len(rows), [[] for _ in rows]
    ends = [[len(row) * cut // 4 for row in rows] for cut in cuts]
    while any(at < len(row) for at, row in zip(done, rows, strict=True)):
        goal = ends.pop(0) if ends else [min(at + 1, len(row)) for at, row in zip(done, rows, strict=True)]
        live = [i for i in range(len(rows)) if goal[i] > done[i]]
        step = StepCache(
            pool,
            [tables[i] for i in live],
            [done[i] for i in live],
            [goal[i] - done[i] for i in live],
            torch.device("cpu"),
        )
        ids = torch.zeros(step.positions.shape, dtype=torch.int64)
        for place, i in enumerate(live):
            ids[place, : goal[i] - done[i]] = rows[i][done[i] : goal[i]]
        out = model(ids, position_ids=step.positions, context=RoutingContext(valid_BS=step.valid), cache=step)
        for place, i in enumerate(live):
            logits[i].append(out[place, : goal[i] - done[i]])
            done[i] = goal[i]
    return [torch.cat(parts) for parts in logits]


@torch.no_grad()
def worst(model: Transformer, cuts: tuple[int, ...] = (1, 3)) -> float:
    """The largest difference, over the largest logit, between one batch with a cache and each row alone without."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, model.config.vocab_size, (length,), generator=generator) for length in LENGTHS]
    found = cached(model, rows, cuts)
    plain = [model(row[None])[0] for row in rows]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_those_without_a_cache(name: str) -> None:
    assert worst(model_of(MODELS[name])) < 1e-5


def test_a_prompt_at_once() -> None:
    assert worst(model_of(PLAIN), cuts=(4,)) < 1e-5


def test_a_wrong_cache_is_seen(replace: Replace) -> None:
    """Planted: no window, one of a key too many, and keys that are not kept."""
    model, right = model_of(EVERY["mixtral-2"]), StepCache.mask
    for wrong in (lambda window: None, lambda window: window and window + 1):
        with replaced(StepCache, "mask", lambda self, window, wrong=wrong: right(self, wrong(window))):
            assert worst(model) > 1e-3
    whole = LayerOfStep.extend

    def forgets(self: LayerOfStep, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return whole(self, k if self.layer else k * 0, v)

    replace(LayerOfStep, "extend", forgets)
    assert worst(model) > 1e-3


@torch.no_grad()
def test_forked_tables_share_full_blocks_and_copy_the_last_one() -> None:
    model, pool = model_of(PLAIN), BlockPool(64)
    ids = torch.arange(BLOCK + 5)[None] % 200
    table = pool.take(2)
    first = StepCache(pool, [table], [0], [ids.shape[1]], torch.device("cpu"))
    model(ids, position_ids=first.positions, cache=first)
    other = pool.fork(table, ids.shape[1])
    assert other[0] == table[0]
    assert other[1] != table[1]
    step = StepCache(pool, [table, other], [ids.shape[1]] * 2, [1, 1], torch.device("cpu"))
    out = model(torch.tensor([[7], [9]]), position_ids=step.positions, cache=step)
    for row, token in enumerate((7, 9)):
        alone = model(torch.cat((ids, torch.tensor([[token]])), dim=1))[0, -1]
        torch.testing.assert_close(out[row, 0], alone, rtol=1e-5, atol=1e-5)
    pool.give_back(table)
    pool.give_back(other)
    assert pool.num_used == 0
