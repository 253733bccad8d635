"""A save that is still being written while training goes on is of its own step, every part of it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patches import Replace
from saved import found_at, train, trained

from moe_dist.checkpoint import manager, shards
from moe_dist.checkpoint.reading import read_trainer_state
from moe_dist.checkpoint.storage import Buffer, LocalStorage
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.tools.inspecting import digests
from moe_dist.config import CheckpointConfig
from moe_dist.parallel.mesh import Mesh


def test_what_is_written_late_is_of_the_step_it_was_saved_at(tmp_path: Path, replace: Replace) -> None:
    """A disk on which every file takes a while: the steps between must not get into what is being saved.

    Seen to fail when the trainer's state was turned into text at the commit and not at the save: counters of step 4
    beside weights of step 2, so a run that went on left out two steps.
    """
    write = LocalStorage.write

    def slow(self: LocalStorage, path: str, chunks: Iterable[Buffer]) -> None:
        time.sleep(0.1)
        write(self, path, chunks)

    replace(LocalStorage, "write", slow)
    train(tmp_path / "run", eval_steps=2)
    for step in (2, 4, 6):
        states = []
        for run in (tmp_path / "run", trained()):
            found = found_at(run, step)
            state = read_trainer_state(found, found.storage.manifest(step), Keys())
            assert state["counters"]["step"] == step
            del state["counters"]["elapsed"], state["config"]
            states.append(state)
        assert states[0] == states[1]
        assert digests(found_at(tmp_path / "run", step)) == digests(found_at(trained(), step))


@pytest.mark.parametrize("stuck", [False, True])
def test_who_waits_for_a_save_hears_that_it_makes_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: Replace, stuck: bool
) -> None:
    """Sign after sign while pieces are written, none while a disk hangs: a watchdog must tell them apart.
    Seen to fail with one wait for the whole save, and with a sign in every round."""
    monkeypatch.setattr(manager, "_ROUND", 0.02)
    monkeypatch.setattr(shards, "CHUNK", 1024)
    write = LocalStorage.write

    def slow(self: LocalStorage, path: str, chunks: Iterable[Buffer]) -> None:
        if stuck:
            time.sleep(1.0)
        write(self, path, (chunk for chunk in chunks if time.sleep(0.0 if stuck else 0.1) is None))

    replace(LocalStorage, "write", slow)
    state: Any = SimpleNamespace(tensors={"model.a": torch.zeros(2048)}, model_shapes={}, wrong_shapes=list)
    saves = manager.Checkpoints(LocalStorage(tmp_path), Mesh.single(), CheckpointConfig())
    saves.begin(1, state, {"config": {}}, {})
    signs: list[None] = []
    assert saves.settle(lambda: signs.append(None)).error is None
    assert len(signs) <= 3 if stuck else len(signs) >= 5, len(signs)
