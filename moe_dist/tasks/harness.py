"""Tasks of lm-evaluation-harness (package lm_eval), with a model over all ranks as its `LM`.

Importing this module imports lm_eval, and with it `datasets`: do so on rank 0, when there is such a task.
"""

from __future__ import annotations

import logging
import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moe_dist.generate.options import SamplingOptions
from moe_dist.tasks.result import Sums, TaskResult
from moe_dist.tasks.whole_model import WholeModel

ANSWER_TOKENS = 256
"""Of an answer where a task does not say, as in the harness' own models."""
SEED = 1234
"""Of few-shot examples and of what tasks draw, as in the harness' command."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams", "length_penalty", "seed")


class HarnessModel(LM):
    """A `WholeModel` by the harness' interface. It is one model: of rank 0 alone, whatever other ranks hold of it.

    Texts are cut and windows are made as `lm_eval.models.huggingface.HFLM` does it.
    """

    def __init__(self, model: WholeModel) -> None:
        super().__init__()
        self.model, self._stderr = model, sys.stderr

    @property
    def tokenizer_name(self) -> str:
        """For the harness' own cache of requests, which is not used here."""
        return self.model.tokenizer.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. A template that knows no system message gets none, as `HFLM` does it."""
        goes_on = not add_generation_prompt
        try:
            return self.model.rendered(chat_history, goes_on=goes_on)
        except ValueError:
            others = [one for one in chat_history if one["role"] != "system"]
            return self.model.rendered(others, goes_on=goes_on)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): nats of the continuation, and whether greedy search would write it."""
        with redirect_stderr(self._stderr):  # what the model has to say is not the harness' chatter
            return self.model.score([self.model.encode_pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Nats of each whole text, every token predicted once, in windows of as many tokens as the model has
        positions."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids, length = self.model.encode(request.args[0]), self.model.max_length
            for pair in get_rolling_token_windows(ids, self.model.first_id, length, context_len=1):
                context, predicted = make_disjoint_window(pair)
                windows.append((context + predicted, len(predicted)))
                owners.append(number)
        totals = [0.0] * len(requests)
        with redirect_stderr(self._stderr):
            scores = self.model.score(windows)
        for owner, (logprob, _) in zip(owners, scores, strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes behind each context, up to one of its stop texts."""
        prompts = [self.model.encode(request.args[0]) or [self.model.first_id] for request in requests]
        with redirect_stderr(self._stderr):
            return self.model.write(prompts, [sampling(request.args[1]) for request in requests])


def sampling(asked: dict[str, Any]) -> SamplingOptions:
    """A task's `generation_kwargs`. Raises ValueError for one that the engine has not."""
    kwargs = dict(asked)
    until = kwargs.pop("until", None) or ()
    lengths = [int(kwargs.pop(name)) for name in _LENGTHS if kwargs.get(name) is not None]
    samples = kwargs.pop("do_sample", None)
    options = {name: kwargs.pop(name) for name in _SAMPLING if kwargs.get(name) is not None}
    if samples is False or "temperature" not in options:
        options["temperature"] = 1.0 if samples else 0.0
    if kwargs:
        raise ValueError(f"generation_kwargs: {', '.join(kwargs)}: not known here")
    stops = (until,) if isinstance(until, str) else tuple(one for one in until if one)
    return SamplingOptions(max_tokens=lengths[0] if lengths else ANSWER_TOKENS, stop=stops, **options)


def run_harness(names: Sequence[str], model: WholeModel, limit: int | None = None) -> dict[str, TaskResult]:
    """Results by task. `names`: of tasks and groups that the harness knows, or YAML files. On rank 0, inside
    `on_rank_zero`. Raises ValueError naming the task that is not there, or whose data is not.
    """
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    lm = HarnessModel(model)
    with _quiet():
        manager = TaskManager(include_defaults=len(files) < len(names))
        tasks: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in names:
            try:
                found = manager.load([_from_file(name) if name in files else name])
            except Exception as error:  # of the harness, of datasets, of a task's own code
                said = " ".join(str(error).split())[:300]
                raise ValueError(f"task {name}: {type(error).__name__}: {said}") from error
            for part, of in found.items():
                tasks[part] |= of
        for task in tasks["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        try:
            how = {"apply_chat_template": model.chat_template, "fewshot_as_multiturn": model.chat_template}
            results: dict[str, Any] = evaluate(lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=100, **how)
        except (ValueError, RuntimeError, OSError):
            raise
        except Exception as error:  # of a task's template or code
            raise ValueError(f"tasks {', '.join(names)}: {type(error).__name__}: {error}") from error
    return {name: _result(results, name) for name in results["results"]}


def _from_file(path: str) -> dict[str, Any]:
    """A task's YAML, with its data beside it: relative `data_files` are looked for there."""
    config: dict[str, Any] = load_yaml(path)
    kwargs = config.get("dataset_kwargs") or {}
    if "data_files" in kwargs:
        config["dataset_kwargs"] = {**kwargs, "data_files": _beside(Path(path).parent, kwargs["data_files"])}
    return config


def _beside(folder: Path, files: Any) -> Any:
    if isinstance(files, dict):
        return {key: _beside(folder, value) for key, value in files.items()}
    if isinstance(files, list):
        return [_beside(folder, value) for value in files]
    here = folder / str(files)
    return str(here.absolute()) if here.exists() else files


def _result(results: dict[str, Any], name: str) -> TaskResult:
    """Numbers of a task, those of a second filter with its name, and what each row adds to them."""
    numbers: dict[str, float] = {}
    for key, value in results["results"][name].items():
        if isinstance(value, (int, float)) and "," in key:
            numbers[_named(*key.split(",", 1))] = float(value)
    samples = (results.get("samples") or {}).get(name, [])
    rows: dict[str, list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            rows.setdefault(_named(metric, sample["filter"]), []).append(sample[metric])
    found = ((key, _sums(row, numbers[key])) for key, row in rows.items() if key in numbers)
    sums = {key: one for key, one in found if one is not None}
    return TaskResult(numbers, len({sample["doc_id"] for sample in samples}), sums)


def _named(metric: str, given: str) -> str:
    return metric if given == "none" else f"{metric}({given})"


def _sums(rows: Sequence[Any], number: float) -> Sums | None:
    """How a task's number comes from its rows, where that can be seen; None: some other way."""
    if all(isinstance(row, (bool, int, float)) for row in rows):
        one = Sums("ratio", [[float(row), 1.0] for row in rows])
        return one if _is_near(one, number) else None
    if all(isinstance(row, tuple) and len(row) == 2 and row[1] > 0 for row in rows):  # nats, and words or bytes
        pairs = [[-float(nats), float(weight)] for nats, weight in rows]
        tries = (Sums("perplexity", pairs), Sums("ratio", pairs, 1 / math.log(2)))
        return next((one for one in tries if _is_near(one, number)), None)
    return None


def _is_near(sums: Sums, number: float) -> bool:
    return math.isclose(sums.value(list(map(math.fsum, zip(*sums.rows, strict=True)))), number, rel_tol=1e-9)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and advice, and with everybody's random numbers as they were."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    states = random.getstate(), np.random.get_state()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        random.seed(SEED)
        np.random.seed(SEED)
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
