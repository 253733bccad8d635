"""Pipelines that cannot work, or are not proven to compute rightly: refused in one line before any process starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from patches import Replace
from run_files import complaint, load

from moe_dist import versions
from moe_dist.parallel.layout import layers_by_pp_rank, pp_rank_of_stage

# The parallel section | the rest  =>  pieces of the message.
REFUSED = """
pp_size: 2 | model: {tie_word_embeddings: true}  =>  model.tie_word_embeddings=true: with parallel.pp_size=2
pp_size: 2 | train: {gradient_accumulation_steps: 1}  =>  train.gradient_accumulation_steps=1  &  at least 2 micro-
pp_size: 2, schedule: interleaved_1f1b | train: {gradient_accumulation_steps: 5}  =>  needs a multiple of 2 micro
pp_size: 2, schedule: zero_bubble | train: {gradient_accumulation_steps: 2}  =>  needs at least 3 micro-batches
pp_size: 4, schedule: dualpipe_v | train: {gradient_accumulation_steps: 7}  =>  needs at least 8 micro-batches
pp_size: 2, schedule: zero_bubble | train: {gradient_accumulation_steps: 4, pure_bf16: true}  =>  train.pure_bf16=true
pp_size: 2 | train: {gradient_accumulation_steps: 4, torch_compile: true}  =>  train.torch_compile=true: not with
pp_size: 2, zero_stage: 2 | train: {gradient_accumulation_steps: 4}  =>  parallel.zero_stage=2: with  &  0, 1, 3
pp_size: 2, zero_stage: 3, schedule: dualpipe_v | train: {gradient_accumulation_steps: 4}  =>  parallel.zero_stage=3
pp_size: 2, zero_stage: 1, shard_size: 2 | train: {gradient_accumulation_steps: 4}  =>  parallel.shard_size=2: not with
"""
ROWS = [line.split("  =>  ") for line in REFUSED.strip().splitlines()]


@pytest.mark.parametrize(("text", "pieces"), ROWS, ids=[text for text, _ in ROWS])
def test_what_a_pipeline_cannot_do_is_refused(tmp_path: Path, text: str, pieces: str) -> None:
    parallel, rest = text.split(" | ")
    message = complaint(tmp_path, f"parallel: {{{parallel}}}\n{rest}")
    for piece in pieces.split("  &  "):
        assert piece in message


@pytest.mark.parametrize(
    ("version", "refused"), [("2.11.0", True), ("2.12.1+cu130", True), ("2.13.0+cpu", False), ("3.0", False)]
)
def test_an_old_torch_is_refused_schedules_in_v_shape(
    tmp_path: Path, replace: Replace, version: str, refused: bool
) -> None:
    """Before 2.13 they end in backward: "Attribute '_input_metadata' is invalid"."""
    replace(versions, "installed", lambda name: version)
    for schedule in ("zero_bubble", "dualpipe_v"):
        text = f"parallel: {{pp_size: 2, schedule: {schedule}}}\ntrain: {{gradient_accumulation_steps: 8}}"
        if refused:
            assert f"parallel.schedule={schedule}: PyTorch {version} cannot run it" in complaint(tmp_path, text)
            assert "cannot run it" in complaint(tmp_path, f"{text}\nlaunch: {{backend: nccl}}")
        else:
            load(tmp_path, text)


def test_stages_and_where_they_run(tmp_path: Path) -> None:
    def places(parallel: str) -> tuple[list[list[range]], list[int]]:
        text = f"parallel: {{{parallel}}}\ntrain: {{gradient_accumulation_steps: 8}}"
        config = load(tmp_path, text)[0]
        return layers_by_pp_rank(config), pp_rank_of_stage(config)

    assert places("pp_size: 1") == ([[range(8)]], [0])
    assert places("pp_size: 2, stages: [3, 5]") == ([[range(3)], [range(3, 8)]], [0, 1])
    looped = [[range(1), range(3, 6)], [range(1, 3), range(6, 8)]]
    assert places("pp_size: 2, schedule: interleaved_1f1b, stages: [1, 2, 3, 2]") == (looped, [0, 1, 0, 1])
    in_v = [[range(1), range(6, 8)], [range(1, 3), range(3, 6)]]
    for schedule in ("zero_bubble", "dualpipe_v"):
        assert places(f"pp_size: 2, schedule: {schedule}, stages: [1, 2, 3, 2]") == (in_v, [0, 1, 1, 0])
    three = places("pp_size: 2, schedule: interleaved_1f1b, stages: [1, 1, 1, 1, 2, 2]")
    assert three == ([[range(1), range(2, 3), range(4, 6)], [range(1, 2), range(3, 4), range(6, 8)]], [0, 1] * 3)
