"""Lives run by the real trainer, in layouts and in one process, and what they leave on disk held together."""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.checkpoint.reading import CheckpointRef, read_trainer_state, whole
from moe_dist.checkpoint.storage import open_storage
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.tools.inspecting import Tensors
from moe_dist.config import Config
from moe_dist.models.precision import in_dtype
from moe_dist.monitor.train_log import close_logging
from moe_dist.parallel.dispatch_choice import hosts_for
from moe_dist.parallel.mesh import Mesh
from moe_dist.train import step as step_module
from moe_dist.train.run_setup import RunStart
from moe_dist.train.trainer import MoETrainer
from moe_dist.verify.injected_bugs import planted
from moe_dist.verify.layouts import Case
from moe_dist.verify.life import COLUMNS, STEPS, Life
from moe_dist.verify.scenarios import Smallness
from moe_dist.verify.trial import DTYPES, difference, move_experts, whole_tensors

TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * (3 + i % 5) for i in range(32)]
_LAYER_FACTS = (
    *("tokens_per_expert", "aux_loss", "z_loss", "router_entropy", "router_logits_rms"),
    *("dropped_fraction", "fallback_tokens"),
)

_ASKED = itertools.count()
"""Of this process, the same on every rank: the store keeps what was said before."""


class ScriptedTrainer(MoETrainer):
    """The trainer, whose events between two steps come from a script."""

    def __init__(self, config: Config, mesh: Mesh, script: list[str]) -> None:
        super().__init__(config, mesh=mesh)
        self.script = iter(script)

    def _build(self, start: RunStart, dataset: Any) -> None:
        for handler in logging.getLogger("moe_dist").handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.CRITICAL)  # warnings are for the log: this run is an example
        super()._build(start, dataset)

    def _one_step(self) -> None:
        """Events up to and with the next step."""
        for event in self.script:
            if event in STEPS or event == "stop":
                around = {"skip": self._poisoned, "stop": self._interrupted}.get(event, nullcontext)
                with around():
                    super()._one_step()
                move_experts(self.parts.placing)
                return
            between = {
                "sample": self.parts.evaluating.sample,
                "save": self._save_now,
                "save_behind": self.parts.saving.save,
            }
            between.get(event, lambda: self.parts.evaluating.evaluate(self.parts.counters.step))()
        self.parts.stopping.stop("the script has ended")

    def _begin(self) -> None:
        self.found = self.held() if self.parts.counters.step else None
        super()._begin()

    def held(self) -> dict[str, Tensor]:
        """Every tensor of the run, whole (collective): what a start leaves, or in `found` what it goes on from."""
        with self.parts.placing.at_home():
            return whole_tensors(self.parts.persistence._state().tensors, self.mesh)

    def _save_now(self) -> None:
        self.parts.saving.save()
        self.parts.saving.settle()

    @contextmanager
    def _poisoned(self) -> Iterator[None]:
        """One micro-batch of the global batch, wherever it is, has a loss that is not a number."""
        next_step, cross_entropy = self.parts.loader.next_step, step_module.head_cross_entropy
        poisoned: list[Tensor] = []

        def remember() -> list[Any]:
            batches = next_step()
            poisoned.extend(batch.labels for batch in batches if batch.index == 1)
            return batches

        def wrong(hidden: Tensor, weight: Tensor, labels: Tensor, *arguments: Any, **options: Any) -> Tensor:
            loss = cross_entropy(hidden, weight, labels, *arguments, **options)
            return loss * float("nan") if any(torch.equal(labels.cpu(), bad) for bad in poisoned) else loss

        with (
            patch.object(self.parts.loader, "next_step", remember),
            patch.object(step_module, "head_cross_entropy", wrong),
        ):
            yield

    @contextmanager
    def _interrupted(self) -> Iterator[None]:
        """The last rank gets a signal in the middle of accumulating."""
        inputs = self.parts.step._inputs

        def hit(*arguments: Any) -> dict[str, Any]:
            if self.mesh.rank == self.mesh.layout.world_size - 1 and self.stop_requests.number is None:
                signal.raise_signal(signal.SIGTERM)
            return inputs(*arguments)

        with patch.object(self.parts.step, "_inputs", hit):
            yield


class Alone:
    """What one process leaves on disk of lives: kept until others are asked for."""

    def __init__(self) -> None:
        self._folders: dict[str, Path] = {}
        self._failures: dict[str, str] = {}
        self._mine: list[tempfile.TemporaryDirectory[str]] = []

    def of(self, life: Life, small: Smallness, world: Mesh) -> Path:
        """All events in one process, which nothing stops: what others save at the end, it saves in between.

        Collective. Raises RuntimeError, on every rank, when that has failed.
        """
        self.prepare([life], small, world)
        key = _key(life, small)
        if key in self._failures:
            raise RuntimeError(f"in one process: {self._failures[key]}")
        return self._folders[key]

    def prepare(self, lives: Sequence[Life], small: Smallness, world: Mesh) -> None:
        """Have them lived, each on one rank, at the same time (collective)."""
        wanted = {_key(life, small): life for life in lives}
        if wanted.keys() <= self._folders.keys() | self._failures.keys():
            return
        self.forget()
        folders: dict[str, Path] = {}
        failures: dict[str, str] = {}
        device = world.device if world.layout.world_size > 1 else "cpu"
        for turn, (key, life) in enumerate(wanted.items()):
            if turn % world.layout.world_size == world.rank:
                try:
                    folders[key] = self._live(life, small, device)
                except Exception as error:
                    failures[key] = f"{type(error).__name__}: {error}"
        if world.group("world") is not None:
            # Who is done waits outside of any collective: a life takes longer than a group's time-out may be.
            store, number = dist.distributed_c10d._get_default_store(), next(_ASKED)
            store.set(f"life/{number}/{world.rank}", "")
            store.wait([f"life/{number}/{rank}" for rank in range(world.layout.world_size)], timedelta(minutes=15))
        for lived, failed in world.from_all((folders, failures)):
            self._folders |= lived
            self._failures |= failed

    def _live(self, life: Life, small: Smallness, device: torch.device | str) -> Path:
        config, folder = life.config(small, None), tempfile.TemporaryDirectory(prefix="moe-dist-alone-")
        self._mine.append(folder)
        config.train.output_dir = Path(folder.name)
        try:
            with in_dtype(DTYPES[life.precision]):
                ScriptedTrainer(config, Mesh.single(device), _in_one_process(life)).train(TEXTS)
        finally:
            close_logging()
        return Path(folder.name)

    def forget(self) -> None:
        """Remove this rank's. A process that ends without ceremony would leave them behind."""
        for folder in self._mine:
            folder.cleanup()
        for known in (self._mine, self._folders, self._failures):
            known.clear()


def _key(life: Life, small: Smallness) -> str:
    return f"{life.config(small, None).model_dump_json()} {_in_one_process(life)}"


def _in_one_process(life: Life) -> list[str]:
    """Its events, without the stops."""
    events = [event for script in life.scripts for event in script]
    return [part for event in events for part in (["train", "save"] if event == "stop" else [event])]


def run_life(
    life: Life,
    small: Smallness,
    world: Mesh,
    mesh_of: Callable[[Case, int | None], Mesh],
    plant: str | None,
    alone: Alone,
) -> dict[str, float]:
    """Deviations of the life from the same events in one process; the same on every rank."""
    folder = Path(world.ask_rank_zero(lambda: tempfile.mkdtemp(prefix="moe-dist-life-")))
    try:
        if not all(world.from_all(folder.is_dir())):
            raise OSError(f"{folder}: a life needs a folder that all ranks see; set TMPDIR to one")
        with in_dtype(DTYPES[life.precision]):
            wanted = alone.of(life, small, world)
            left: dict[str, Tensor] | None = None
            resumed = 0.0
            with planted(plant) if plant else nullcontext():
                for layout, script in zip(life.layouts, life.scripts, strict=True):
                    config = life.config(small, layout)
                    config.train.output_dir = folder
                    config.checkpoint.allow_config_change = True  # accumulation follows the layout
                    trainer = ScriptedTrainer(config, mesh_of(layout, hosts_for(config, None)), script)
                    trainer.train(TEXTS)
                    if left is not None:
                        resumed = max(resumed, difference(trainer.found or {}, left))
                    left = trainer.held()
        return world.ask_rank_zero(lambda: compare(folder, wanted)) | {"resumed": resumed}
    finally:
        close_logging()
        world.barrier()
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def compare(found: Path, wanted: Path) -> dict[str, float]:
    """Largest relative differences of what two runs have left on disk, by `COLUMNS`."""
    worst = dict.fromkeys(COLUMNS, 0.0)
    for column, kind, key in (
        ("losses", "train", "loss"),
        ("losses", "train", "learning_rate"),
        ("losses", "train", "tokens"),
        ("norms", "train", "grad_norm"),
        ("evaluation", "eval", "loss"),
    ):
        worst[column] = max(worst[column], _furthest(_series(found, kind, key), _series(wanted, kind, key)))
    for fact in _LAYER_FACTS:
        worst["loads"] = max(worst["loads"], _furthest(_layers(found, fact), _layers(wanted, fact)))
    for column, value in _checkpoints(found, wanted).items():
        worst[column] = max(worst[column], value)
    return worst


def _rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if (row := json.loads(line)).get("kind") == kind]


def _series(folder: Path, kind: str, key: str) -> dict[int, list[float]]:
    """A number of every step."""
    return {row["step"]: [_number(row[key])] for row in _rows(folder, kind)}


def _number(value: float | str | None) -> float:
    """As it was before it was written: JSON has words for what is not finite (`json_safe`)."""
    return float("nan") if value is None else float(value)


def _layers(folder: Path, key: str) -> dict[int, list[float]]:
    found = {}
    for row in _rows(folder, "train"):
        values = [layer[key] for layer in row["layers"]]
        numbers = [number for value in values for number in (value if isinstance(value, list) else [value])]
        found[row["step"]] = [_number(number) for number in numbers]
    return found


def _furthest(found: dict[int, list[float]], wanted: dict[int, list[float]]) -> float:
    """Largest relative difference; numbers that are not finite must be so on both sides."""
    if found.keys() != wanted.keys():
        return float("inf")
    worst = 0.0
    for step, numbers in wanted.items():
        if len(found[step]) != len(numbers):
            return float("inf")
        for one, other in zip(found[step], numbers, strict=True):
            if math.isfinite(one) and math.isfinite(other):
                worst = max(worst, abs(one - other) / max(abs(other), 1e-12))
            elif math.isfinite(one) or math.isfinite(other):
                return float("inf")
    return worst


def _checkpoints(found: Path, wanted: Path) -> dict[str, float]:
    """Every step that either has saved: the tensors, and what else there is."""
    here, there = open_storage(found), open_storage(wanted)
    worst = {"weights": 0.0, "moments": 0.0, "state": 0.0}
    if here.candidates() != there.candidates():
        return dict.fromkeys(worst, float("inf"))
    for step in there.candidates():
        one, other = CheckpointRef(here, step), CheckpointRef(there, step)
        if whole(one):
            return dict.fromkeys(worst, float("inf"))
        (a, state_a), (b, state_b) = _read(one), _read(other)
        for column, start in (("weights", "model."), ("moments", "optimizer.")):
            parts = ({name: t for name, t in tensors.items() if name.startswith(start)} for tensors in (a, b))
            worst[column] = max(worst[column], difference(*parts))
        worst["state"] = max(worst["state"], 0.0 if state_a == state_b else float("inf"))
    return worst


def _read(found: CheckpointRef) -> tuple[dict[str, Tensor], dict[str, Any]]:
    manifest = found.storage.manifest(found.step)
    tensors = Tensors(found, manifest, Keys())
    values = {name: tensors.read(name).double() for name in tensors.names()}
    tensors.close()
    state = read_trainer_state(found, manifest, Keys())
    measured = ("elapsed", "initial_loss", "final_loss")  # losses are compared where they are logged
    counters = {name: value for name, value in state["counters"].items() if name not in measured}
    stopping = {name: value for name, value in state["stopping"].items() if name != "best_loss"}
    return values, {"counters": counters, "stopping": stopping, "data": state["data"]}
