"""All that `moe-dist evaluate` finds out about one model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from moe_dist.config import Config
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.evaluate.held_out_text import held_out_text
from moe_dist.evaluate.latency import Latency, measure_latency
from moe_dist.evaluate.measure import Measured, measure
from moe_dist.evaluate.unigram import measure_unigram
from moe_dist.models.counts import dense_flops_per_token, flops_per_token
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.tasks.result import Sums, TaskResult
from moe_dist.tasks.run import run_tasks
from moe_dist.tasks.whole_model import WholeModel

SUMMED_UP = ("f1", "bleu", "chrf", "exact_match")
"""Metrics of tasks whose mean over those that have them stands beside the losses."""


@dataclass(frozen=True)
class Cost:
    """`flops`: of a forward pass for one token of a sequence of `data.max_seq_length`. `dense_flops`: those of the
    dense model of equal width."""

    flops: int
    dense_flops: int
    latency: Latency

    def to_json(self) -> dict[str, Any]:
        saved = 1 - self.flops / self.dense_flops
        counts = {"flops": self.flops, "dense_flops": self.dense_flops, "flops_saved": saved}
        return {**counts, "latency": self.latency.to_json()}


@dataclass(frozen=True)
class Evaluation:
    """`measured`: None where only tasks were asked for. `cost`: None of what is no model."""

    measured: Measured | None
    tasks: dict[str, TaskResult]
    cost: Cost | None

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes of a model; docs/evaluation.md has the keys."""
        row = {} if self.measured is None else self.measured.to_json()
        row |= {} if self.cost is None else self.cost.to_json()
        if self.tasks:
            row["tasks"] = {name: result.to_json() for name, result in self.tasks.items()}
        for metric in SUMMED_UP:
            values = [result.metrics[metric] for result in self.tasks.values() if metric in result.metrics]
            if values:
                row[metric] = fmean(values)
        return row

    def sums(self) -> dict[str, Sums]:
        """What each sample and each row of a task adds, by metric as in `--json`; of tasks `task: metric`."""
        found: dict[str, Sums] = {}
        if self.measured is not None:
            rows = self.measured.samples
            losses = [[loss, count] for loss, count, _, _ in rows]
            found = {"loss": Sums("ratio", losses), "perplexity": Sums("perplexity", losses)}
            found["accuracy"] = Sums("ratio", [[hits, count] for _, count, hits, _ in rows])
            if self.measured.whole.num_bytes:
                bits = [[loss, size] for loss, _, _, size in rows]
                found["bits_per_byte"] = Sums("ratio", bits, 1 / math.log(2))
        for name, result in self.tasks.items():
            found |= {f"{name}: {metric}": sums for metric, sums in result.sums.items()}
        return found

    def write(self, name: str, row_file: Path, sums_file: Path | None) -> None:
        """Files for whoever started the ranks. `name`: of the model."""
        row_file.write_text(json.dumps({"model": name, **self.to_json()}), "utf-8")
        if sums_file is not None:
            sizes = [] if self.measured is None else [size for *_, size in self.measured.samples]
            sums = {metric: one.to_json() for metric, one in self.sums().items()}
            sums_file.write_text(json.dumps({"sums": sums, "sample_bytes": sizes}), "utf-8")


def evaluate_model(
    config: Config,
    model: Transformer,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    data: Sequence[str] = (),
    tasks: Sequence[str] = (),
    max_samples: int | None = None,
    chat_template: bool = False,
) -> Evaluation:
    """Losses of `data`, or of what the run holds out, and `tasks`; with tasks and without data, these alone.
    `chat_template`: tasks ask as a user of the tokenizer's chat template does. A collective. Raises ValueError for data
    and tasks that cannot be used.
    """
    size = config.train.per_device_eval_batch_size or 4
    measured = None
    if data or not tasks:
        samples = held_out_text(config, tokenizer, data, max_samples)
        mask = config.data.document_mask
        measured = measure(model, samples, tokenizer, mesh, batch_size=size, document_mask=mask)
    whole = WholeModel(model, tokenizer, mesh, batch_size=size, chat_template=chat_template)
    results = run_tasks(whole, tasks, max_samples) if tasks else {}
    length = min(config.data.max_seq_length, config.model.max_position_embeddings)
    flops, dense = (
        of(config.model, length) // 3 for of in (flops_per_token, dense_flops_per_token)
    )  # forward: a third
    return Evaluation(measured, results, Cost(flops, dense, measure_latency(model, mesh)))


def evaluate_unigram(
    config: Config, tokenizer: Tokenizer, *, data: Sequence[str] = (), max_samples: int | None = None
) -> Evaluation:
    """What the frequencies of tokens of the same text say of it. In one process. Raises ValueError as
    `evaluate_model`."""
    samples = held_out_text(config, tokenizer, data, max_samples)
    size = config.train.per_device_eval_batch_size or 4
    return Evaluation(measure_unigram(samples, tokenizer, config.model.vocab_size, batch_size=size), {}, None)
