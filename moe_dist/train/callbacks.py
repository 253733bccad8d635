"""What is done beside the optimizer steps of a run, the trainer's own and a person's, on one interface.

Every callback is there on every rank and gets the same events at the same steps, so what one decides from them all
decide alike. Reporting, evaluation, saving, automatic balancing and the end of a run are callbacks too (`reporting.py`,
`evaluation.py`, `saving.py`, `auto_balance.py`, `stopping.py`); a person's come after them, in their order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moe_dist.models.registry import Registry
from moe_dist.models.transformer import Transformer
from moe_dist.monitor.records import CheckpointRecord, EvalRecord, TrainRecord
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.dpo import Rewards
from moe_dist.train.result import TrainingResult

logger = logging.getLogger("moe_dist")


class CallbackError(ValueError):
    """A callback has raised: which one, where, and what."""


@dataclass(frozen=True)
class RunState:
    """A run after `step` optimizer steps; the same on every rank but for `rank`."""

    step: int
    """Optimizer steps done, over all starts of the run."""
    max_steps: int | None
    """Number of the last one; None when time or the end of a stream decides."""
    epoch: float
    """Passes over the training data."""
    tokens: int
    """Tokens trained on."""
    elapsed: float
    """Seconds of training."""
    loss: float
    """Of the last step, nats per token; NaN before the first, and of a step without a label."""
    grad_norm: float
    """Of the last step, before clipping; NaN before the first."""
    learning_rate: float
    """Of the last step; NaN before the first."""
    num_tokens: int
    """Tokens of the last step."""
    num_labels: int
    """Tokens of the last step that had a label."""
    skipped: bool
    """Whether the last step was left out for a number that was not finite."""
    skipped_steps: int
    """Steps left out so far."""
    stopping: str | None
    """Why the run ends after this step; None while it goes on."""
    output_dir: Path
    """The run folder."""
    rank: int
    world_size: int
    model: Transformer
    """This rank's part; to be looked at, not to be changed."""
    rewards: Rewards | None = None
    """Of the last step of a run on preferences: `loss` is per pair then, and `num_labels` counts pairs."""


@dataclass(frozen=True)
class Request:
    """What a callback asks of the trainer, once the event is over. One rank that asks is enough."""

    stop: str | None = None
    """End the run after this step, for this reason."""
    evaluate: bool = False
    """Measure the validation loss now."""
    save: bool = False
    """Write a checkpoint of this step now."""


class Callback:
    """Subclass it and override what you need; what returns a `Request` asks for something.

    Called on every rank. A collective inside must be called by all of them; what is written to one file, or said to
    people, is for `run.rank == 0`.
    """

    def on_run_begin(self, run: RunState) -> Request | None:
        """Once, when everything is built, restored and checked, before the first step of this start."""

    def on_step_end(self, run: RunState) -> Request | None:
        """After every optimizer step, also one that was skipped."""

    def on_log(self, run: RunState, record: TrainRecord) -> Request | None:
        """Every `monitor.logging_steps`: what the interval was like, experts included."""

    def on_evaluate(self, run: RunState, record: EvalRecord) -> Request | None:
        """After an evaluation on the validation data."""

    def on_save(self, run: RunState, record: CheckpointRecord) -> Request | None:
        """A checkpoint is complete, or has failed (`record.ok`); with background saves some steps after it began."""

    def on_run_end(self, run: RunState, result: TrainingResult) -> None:
        """Once, when the last checkpoint is written. Not called when the run dies of an exception."""


CALLBACKS: Registry[Callable[[], Callback]] = Registry("train.callbacks", "callback")
Event = Literal["on_run_begin", "on_step_end", "on_log", "on_evaluate", "on_save", "on_run_end"]


class Callbacks:
    """Tells all of them of an event, and collects what a person's callbacks ask for."""

    def __init__(
        self,
        own: Iterable[Callback],
        persons: Iterable[Callback],
        mesh: Mesh,
        state: Callable[[], RunState],
        on_error: Literal["raise", "warn"],
    ) -> None:
        """`own` of the trainer, first. `state` is asked for each of them: one may have changed what the next sees.
        `on_error`: what an exception of one of the `persons` does to the run.
        """
        self.own, self.persons, self.mesh, self.on_error = list(own), list(persons), mesh, on_error
        self._state = state
        self._asked: list[Request] = []

    def emit(self, event: Event, *facts: Any) -> None:
        """Call `event` of all, in their order. Raises CallbackError where a person's has raised."""
        for callback in self.own:
            getattr(callback, event)(self._state(), *facts)
        for callback in self.persons:
            try:
                asked = getattr(callback, event)(self._state(), *facts)
            except Exception as error:
                text = f"callback {_name(callback)}.{event}: {type(error).__name__}: {error} ({_line(error)})"
                if self.on_error == "raise":
                    raise CallbackError(f"{text}; train.on_callback_error=warn goes on without it") from error
                logger.warning("%s", text, exc_info=logger.isEnabledFor(logging.DEBUG))
                continue
            if asked is not None:
                self._asked.append(asked)

    def requests(self) -> Request:
        """What any callback of any rank has asked for since the last call, the same on every rank (collective)."""
        if not self.persons:
            return Request()
        asked, self._asked = self._asked, []
        reasons = [one.stop for one in asked if one.stop is not None]
        flags = [bool(reasons), any(one.evaluate for one in asked), any(one.save for one in asked)]
        mine = torch.tensor(flags, dtype=torch.int64, device=self.mesh.device)
        stops, evaluates, saves = self.mesh.sum_over("world", mine).tolist()
        every = self.mesh.from_all(reasons) if stops else []
        return Request(next((reason for one in every for reason in one), None), bool(evaluates), bool(saves))


def load_callbacks(names: Iterable[str]) -> list[Callback]:
    """An object of each class that `train.callbacks` names. Raises ValueError for one that is none."""
    loaded = []
    for name in names:
        callback = CALLBACKS.resolve(name)()
        if not isinstance(callback, Callback):
            raise ValueError(f"train.callbacks={name}: a subclass of moe_dist.train.callbacks.Callback is needed")
        loaded.append(callback)
    return loaded


def _name(callback: Callback) -> str:
    return f"{type(callback).__module__}:{type(callback).__qualname__}"


def _line(error: BaseException) -> str:
    """Where it was raised: `file.py:12`."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "unknown line" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
