"""Validation loss and samples of text. Neither leaves a trace in training state."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.data.baseline import unigram_loss
from moe_dist.data.batch import Batch
from moe_dist.data.loader import eval_batches
from moe_dist.data.packing import PackedDataset
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.generate.options import SamplingOptions
from moe_dist.models.transformer import Transformer
from moe_dist.monitor.records import EvalRecord
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.engines.eval_mode import evaluating
from moe_dist.parallel.mesh import Mesh
from moe_dist.tasks.run import check_tasks, run_tasks
from moe_dist.tasks.whole_model import WholeModel
from moe_dist.train.build import Datasets
from moe_dist.train.callbacks import Callback, RunState
from moe_dist.train.dpo import Dpo, Rewards, reward_facts, rewards_of
from moe_dist.train.loss import head_cross_entropy
from moe_dist.train.passes import model_inputs

logger = logging.getLogger("moe_dist")


@dataclass(frozen=True)
class Evaluation:
    """`loss` nats per valid token over the whole validation set, the same on every rank; of preferences per pair, and
    `num_tokens` counts pairs."""

    loss: float
    num_tokens: int
    seconds: float
    rewards: Rewards | None = None

    @property
    def perplexity(self) -> float | None:
        """None of preferences, whose loss is of no token."""
        return math.exp(min(self.loss, 700.0)) if self.rewards is None else None


SAMPLE_TEMPERATURE = 0.8
"""Of the samples before and after training."""
ASK_EVERY = 8
"""Batches of an evaluation between questions whether to stop."""


def evaluate(
    model: Transformer,
    batches: Iterable[Batch],
    mesh: Mesh,
    *,
    bf16: bool = False,
    document_mask: bool = True,
    loss_chunk_tokens: int | Literal["auto"] = "auto",
    stop: Callable[[], bool] = lambda: False,
    dpo: Dpo | None = None,
) -> Evaluation | None:
    """Every rank calls this with as many batches as the others (`data.eval_batches` sees to it). `dpo`: of preferences.

    `stop` is asked now and then on every rank and answers the same on all; None when it has said yes. Raises ValueError
    when no token has a label: there is no loss then, least of all 0.
    """
    started = time.perf_counter()
    totals = torch.zeros(2 if dpo is None else 5, dtype=torch.float64, device=mesh.device)
    with evaluating(model), torch.autocast(mesh.device.type, dtype=torch.bfloat16, enabled=bf16):
        for number, batch in enumerate(batches, 1):
            if number % ASK_EVERY == 0 and stop():
                if dpo is not None:
                    dpo.take_sums()  # of what is not finished
                return None
            on_device = batch.to(mesh.device, non_blocking=True)

            def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor = on_device.labels) -> Tensor:
                return head_cross_entropy(hidden, weight, labels, chunk_tokens=loss_chunk_tokens)

            function = loss_of if dpo is None else dpo.loss_of(dpo.with_reference(on_device), 1.0)
            loss = model(**model_inputs(on_device, document_mask=document_mask), head_function=function)
            if model.lm_head is not None:  # of a pipeline, the last stage
                totals[0] += loss
                totals[1] += batch.num_terms
    if dpo is not None:
        totals[2:] += dpo.take_sums()
    total, count, *sums = mesh.sum_over("world", totals).tolist()
    if not count:
        raise ValueError("nothing to evaluate: no token of the validation samples has a label")
    return Evaluation(
        total / count, int(count), time.perf_counter() - started, rewards_of(sums, count) if sums else None
    )


def sample_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, num_tokens: int, *, mesh: Mesh, seed: int
) -> str:
    """`prompt` continued by `num_tokens` sampled tokens, fewer where positions end; an empty one starts where a
    document ends.

    Every rank must call it: experts live on all of them.
    """
    options = SamplingOptions(num_tokens, temperature=SAMPLE_TEMPERATURE, seed=seed, ignore_eos=True)
    with evaluating(model):
        engine = MoEInferenceEngine(model, tokenizer, mesh=mesh)
        kept = engine.encode(prompt)[-max(1, model.config.max_position_embeddings - num_tokens) :]
        [answer] = engine.generate([kept], options)
    return tokenizer.decode([*kept, *answer.tokens])


class Evaluating(Callback):
    """The validation loss every `train.eval_steps`, and samples of text."""

    def __init__(
        self,
        config: Config,
        model: Transformer,
        mesh: Mesh,
        datasets: Datasets,
        clock: Clock,
        *,
        is_best: Callable[[float], bool],
        asked_to_stop: Callable[[], bool],
        paused: Callable[[], AbstractContextManager[None]],
        announce: Callable[[EvalRecord], None],
        dpo: Dpo | None = None,
    ) -> None:
        """`asked_to_stop`: whether any rank has been (collective). What goes on inside `paused` is no training time.
        `announce` tells all callbacks. `dpo`: of preferences.
        """
        self.config, self.model, self.mesh, self.datasets, self.clock = config, model, mesh, datasets, clock
        self._is_best, self._asked_to_stop, self._paused, self._announce = is_best, asked_to_stop, paused, announce
        self.dpo = dpo
        self.step, self.loss = -1, math.nan
        """Of the last evaluation."""
        self.unigram: float | None = None
        """Validation loss of a model that knows token frequencies only; None when not computed."""

    def measure_baseline(self) -> None:
        """What training is held against. Raises ValueError for tasks that cannot be asked at the first evaluation."""
        self.mesh.ask_rank_zero(partial(check_tasks, self.config.train.eval_tasks))
        train, validation = self.datasets.train, self.datasets.validation
        if self.dpo is None and validation is not None and isinstance(train, PackedDataset):
            self.unigram = unigram_loss(train, validation, self.config.model.vocab_size)

    def on_step_end(self, run: RunState) -> None:
        """Evaluate when it is time."""
        every = self.config.train.eval_steps
        if every and run.step % every == 0:
            self.evaluate(run.step)

    def metrics(self, step: int) -> dict[str, float]:
        """What is known of the weights after `step` steps, for their checkpoint."""
        return {"eval_loss": self.loss} if self.step == step else {}

    def evaluate(self, step: int) -> None:
        """Measure the loss after `step` steps, unless it is known or there is nothing to measure it on, or somebody
        asks the run to stop meanwhile: an unfinished evaluation says nothing.
        """
        validation, train = self.datasets.validation, self.config.train
        if validation is None or self.step == step:
            return
        self.clock.status.at("evaluating")
        size = train.per_device_eval_batch_size or train.per_device_train_batch_size
        batches = eval_batches(validation, size, self.mesh.layout.dp_size, self.mesh.dp_rank, train.eval_batches)
        with self._paused(), self.clock.stopped():
            found = evaluate(
                self.model,
                batches,
                self.mesh,
                bf16=train.bf16,
                document_mask=self.config.data.document_mask,
                loss_chunk_tokens=train.loss_chunk_tokens,
                stop=self._asked_to_stop,
                dpo=self.dpo,
            )
            tasks = {} if found is None else self._ask_tasks(size)
        if found is None:
            return
        self.step, self.loss = step, found.loss
        facts = (found.loss, found.perplexity, found.num_tokens, found.seconds)
        rewards: dict[str, Any] = reward_facts(found.rewards)
        record = EvalRecord(step, *facts, self.unigram, self._is_best(found.loss), tasks=tasks, **rewards)
        self._announce(record)

    def _ask_tasks(self, size: int) -> dict[str, float]:
        """Metrics of `train.eval_tasks`; none where one of them cannot be asked, which is no reason to end a run."""
        train = self.config.train
        if not train.eval_tasks:
            return {}
        whole = WholeModel(self.model, self.datasets.tokenizer, self.mesh, batch_size=size, bf16=train.bf16)
        try:
            results = run_tasks(whole, train.eval_tasks)
        except ValueError as error:
            logger.warning("train.eval_tasks: left out of this evaluation: %s", error)
            return {}
        return {
            f"{name}: {metric}": number
            for name, result in results.items()
            for metric, number in result.metrics.items()
            if "_stderr" not in metric
        }

    def sample(self) -> str | None:
        """A text that the model writes as it is now; None with `train.sample_tokens` 0."""
        train = self.config.train
        if not train.sample_tokens:
            return None
        with self.clock.stopped():
            return sample_text(
                self.model,
                self.datasets.tokenizer,
                train.sample_prompt,
                train.sample_tokens,
                mesh=self.mesh,
                seed=train.seed,
            )
