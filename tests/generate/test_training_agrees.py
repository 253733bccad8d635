"""What a model finds likeliest while it is trained is what it says when it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from patches import Replace

from moe_dist.data.corpus import documents_from
from moe_dist.data.loader import Chosen, eval_batches
from moe_dist.data.packing import pack
from moe_dist.data.tokenizer import ByteTokenizer
from moe_dist.generate import paged_cache
from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.generate.options import SamplingOptions
from moe_dist.pretrained.inference import find_model, open_model
from moe_dist.train import MoETrainer
from moe_dist.train.callbacks import Callback, RunState
from moe_dist.train.passes import model_inputs

LENGTH = 64
TEXTS = [f"def f{i}(x):\n    return x * {i} + {'abc'[i % 3]}\n" * (1 + i % 4) for i in range(40)]
MODEL = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16,
    "initializer_range": 0.2,
}
OPTIONS = {
    "max_seq_length": LENGTH,
    "max_steps": 6,
    "save_steps": 6,
    "learning_rate": 5e-3,
    "progress": "none",
    "tensorboard": False,
    "validation_split": 0.0,
}


class Watch(Callback):
    """The likeliest token at every place of `batches`, by the model as it is trained, after its last step."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.likeliest = batches, torch.empty(0, dtype=torch.int64)

    def on_step_end(self, run: RunState) -> None:
        if run.step == run.max_steps:
            assert run.model.training
            with torch.no_grad():
                each = [run.model(**model_inputs(batch)).argmax(-1) for batch in self.batches]
            self.likeliest = torch.cat(each)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], list[int]]:
    """A run, every beginning of every document in some of its samples, and the token that it found likeliest there."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    samples = pack(documents_from(TEXTS), ByteTokenizer(), max_seq_length=LENGTH)
    batches = list(eval_batches(Chosen(samples, range(24)), 4, 1, 0))
    watch = Watch(batches)
    MoETrainer({}, model_config=MODEL, training_config=OPTIONS, output_dir=folder, callbacks=[watch]).train(TEXTS)
    prompts = []
    for ids in torch.cat([batch.input_ids for batch in batches]).tolist():
        begin = 0
        for place, token in enumerate(ids):
            prompts.append(ids[begin : place + 1])
            begin = place + 1 if token == ByteTokenizer.eos_id else begin
    return folder, prompts, watch.likeliest.flatten().tolist()


def agreement(folder: Path, prompts: list[list[int]], expected: list[int]) -> float:
    """Share of prompts behind which the engine writes that token."""
    engine = MoEInferenceEngine(open_model(find_model(str(folder)))[0])
    answers = engine.generate(prompts, SamplingOptions(1, ignore_eos=True))
    return sum(answer.tokens[0] == token for answer, token in zip(answers, expected, strict=True)) / len(expected)


def test_more_than_999_of_1000_tokens_are_the_same(trained: tuple[Path, list[list[int]], list[int]]) -> None:
    share = agreement(*trained)
    print(f"argmax in training and in inference agree at {share:.3%} of {len(trained[2]):,} places")
    assert len(trained[2]) >= 1500
    assert len(set(trained[2])) > 10
    assert share > 0.999


def test_a_wrong_mask_is_seen(trained: tuple[Path, list[list[int]], list[int]], replace: Replace) -> None:
    """Planted: no query but a document's first sees its own token."""
    right = paged_cache.StepCache.mask

    def blind(self: paged_cache.StepCache, window: int | None) -> torch.Tensor:
        seen, places = right(self, window), self.positions[:, None, :, None]
        return seen & ~((torch.arange(seen.shape[-1]) == places) & (places > 0))

    replace(paged_cache.StepCache, "mask", blind)
    assert agreement(*trained) < 0.99
