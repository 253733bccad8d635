"""A job that starts again goes on from what it has saved itself, whatever its first start was told to go on from."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from patches import replaced
from test_saving import TEXTS, TREE, run, steps

from moe_dist.checkpoint.lock import Job
from moe_dist.train import MoETrainer
from moe_dist.train.checkpointing import Persistence

FIRST = Job(("job=1",))
LATER = Job(("job=1",), ("job=1",))
BEGIN = Persistence.begin


class Death(Exception):
    """In place of a kill."""


def start(output_dir: Path, job: Job, resume: str, dies: str | None = None, **checkpoint: Any) -> list[float]:
    """The losses of one start, to step 6 with a save every other step. `dies`: "before" it has begun, or "after"."""

    def begin(self: Persistence, *arguments: Any) -> None:
        if dies == "after":
            BEGIN(self, *arguments)
        raise Death

    tree = {**TREE, "checkpoint": {"resume": resume, "save_steps": 2, "save_total_limit": None, **checkpoint}}
    with replaced(Persistence, "begin", begin) if dies else nullcontext():
        try:
            return MoETrainer(tree, output_dir=output_dir, job=job).train(TEXTS).losses
        except Death:
            return []


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the six steps of a run that nobody disturbs."""
    return run(tmp_path_factory.mktemp("straight")).losses


def test_never_is_for_the_first_start(tmp_path: Path, straight: list[float]) -> None:
    """Seen to fail with the names not noted, and with every name taken for one that only an earlier start can know."""
    folder = tmp_path / "run"
    run(folder, {"max_steps": 2}, save_steps=2)  # somebody else's
    assert start(folder, FIRST, "never") == straight
    assert start(folder, LATER, "never") == [], "it is done"
    assert len(list(folder.glob("earlier-*"))) == 1
    assert start(folder, Job(("job=2",), ("job=2",)), "never", "after") == [], "another job, which dies"
    assert start(folder, Job(("job=2",), ("job=2",)), "never") == straight
    assert start(folder, Job(("job=2",)), "never") == straight, "a first start of that name"
    assert len(list(folder.glob("earlier-*"))) == 3


def test_a_start_that_has_not_begun_is_none(tmp_path: Path, straight: list[float]) -> None:
    """It died before it had set aside what it does not go on from: the next one is told the same again.

    Seen to fail with the names noted when the folder is taken: `2` then goes on from 6, `never` with the old run.
    """
    folder = tmp_path / "run"
    run(folder, save_steps=2, save_total_limit=None)
    start(folder, FIRST, "2", "before")
    assert start(folder, LATER, "2") == straight[2:]
    assert start(folder, LATER, "2") == [], "its own newest is 6"
    start(folder, FIRST, "never", "before")
    assert start(folder, LATER, "never") == straight


def test_from_elsewhere_until_there_is_one_of_its_own(tmp_path: Path, straight: list[float]) -> None:
    """Steps of another history in its place are set aside: they would be taken for the run's own newest.

    Seen to fail with only later steps of the same place set aside, as it was: the second start goes on from 6.
    """
    folder, other = tmp_path / "run", tmp_path / "other"
    run(folder, save_steps=2, save_total_limit=None)
    run(other, {"max_steps": 4}, save_steps=4)
    start(folder, FIRST, str(other / "checkpoint-4"), "after")
    assert steps(folder) == []
    assert start(folder, LATER, str(other / "checkpoint-4")) == straight[4:]
    assert steps(folder) == [6]
    assert start(folder, LATER, str(other / "checkpoint-4")) == []


def test_the_same_place_written_in_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail with the words compared: the step that it goes on from is set aside with the others."""
    run(tmp_path / "run", save_steps=2, save_total_limit=None)
    monkeypatch.chdir(tmp_path)
    start(tmp_path / "run", FIRST, "run/checkpoint-4", "after")
    assert steps(tmp_path / "run") == [2, 4]


def test_never_with_checkpoints_elsewhere(tmp_path: Path, straight: list[float]) -> None:
    """The old run is moved aside, and its checkpoints in another folder are not of the new run's past.

    Seen to fail without: the second start goes on from 6 of the old run.
    """
    place = str(tmp_path / "checkpoints")
    start(tmp_path / "run", FIRST, "auto", folder=place)
    start(tmp_path / "run", FIRST, "never", "after", folder=place)
    assert steps(Path(place)) == []
    assert start(tmp_path / "run", LATER, "never", folder=place) == straight
