"""Two ranks save and load together, and one of them cannot: the other neither waits for ever nor takes it for done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from patches import replaced
from ranks import run_ranks
from saved import MODEL, TEXTS, TRAINING, found_at, state, trainer_state
from tiny import mesh_of

from moe_dist.checkpoint import manager as manager_module
from moe_dist.checkpoint import state as state_module
from moe_dist.checkpoint.manager import Checkpoints, Outcome
from moe_dist.checkpoint.reading import whole
from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.checkpoint.writing import Writer
from moe_dist.config import CheckpointConfig
from moe_dist.train import MoETrainer
from moe_dist.train.checkpointing import Persistence

pytestmark = pytest.mark.dist


def spoiled_run(folder: str, is_mute: bool) -> tuple[list[tuple[int, int, str | None]], int]:
    """Five steps that save 2, 4 and 5; rank 1 cannot write its part of step 2, nor, when `is_mute`, say so.

    Returns for each save its step, the step at which it was settled and its error; and the count of failed ones.
    """
    trainer = MoETrainer(
        model_config=MODEL, training_config=TRAINING | {"max_steps": 5}, output_dir=folder, mesh=mesh_of(1)
    )
    settled = []
    write, receipt, settle, one_step = Writer._write, Writer._write_receipt, Persistence.settle, MoETrainer._one_step

    def fail(do: Callable[..., None]) -> Callable[..., None]:
        def act(self: Writer, *arguments: Any) -> None:
            if self.saving.step == 2 and self.rank == 1:
                raise OSError(28, "No space left on device")
            do(self, *arguments)

        return act

    def note(self: Persistence) -> Outcome:
        outcome = settle(self)
        settled.append((outcome.step, trainer.parts.counters.step, outcome.error))
        return outcome

    def after_the_write(self: MoETrainer) -> None:
        writer = self.parts.persistence.checkpoints._writer
        assert writer is None or writer.written.wait(60)
        one_step(self)

    with ExitStack() as stack:
        stack.enter_context(replaced(Writer, "_write", fail(write)))
        if is_mute:
            stack.enter_context(replaced(Writer, "_write_receipt", fail(receipt)))
        stack.enter_context(replaced(Persistence, "settle", note))
        stack.enter_context(replaced(MoETrainer, "_one_step", after_the_write))
        trainer.train(TEXTS)
    return settled, trainer.parts.counters.saves_failed


@pytest.mark.parametrize("is_mute", [False, True])
def test_another_rank_cannot_write(tmp_path: Path, is_mute: bool) -> None:
    """Settled by all within a step of the failure, with rank 1's reason, counted; the next save goes through.

    Seen to fail without `abort` (rank 0 waits for a receipt for ever), with errors of rank 0 alone, and with
    GAVE_UP, which rank 0 has to say of itself, taken for the cause.
    """
    for settled, failed in run_ranks(spoiled_run, 2, str(tmp_path / "run"), is_mute):
        (step, at, error), *others = settled
        assert (step, at, failed) == (2, 3, 1)
        assert error is not None
        assert error.endswith("/.checkpoint-2.1.tmp: No space left on device")
        assert [(step, error) for step, _, error in others] == [(4, None), (5, None)]
    folder = tmp_path / "run" / "checkpoints"
    assert LocalStorage(folder).candidates() == [4, 5]
    assert LocalStorage(folder).leftovers() == []
    assert [whole(found_at(folder, step)) for step in (4, 5)] == [[], []]


def read_with_one_that_cannot(folder: str) -> list[str]:
    """What each way of reading says on this rank when rank 1 alone meets an error."""
    mesh, storage = mesh_of(1), LocalStorage(Path(folder))
    checkpoints = Checkpoints(storage, mesh, CheckpointConfig())
    checkpoints.begin(1, state(1), trainer_state(1), {})
    assert checkpoints.settle().error is None
    found = found_at(Path(folder), 1)
    assert checkpoints.verify(found) == []
    loaded = checkpoints.read_state(found)

    def refuse(*_: Any) -> None:
        if mesh.rank == 1:
            raise OSError("no connection")

    def no_key(*_: Any) -> None:
        raise CheckpointError("the key is missing")

    said = []
    with pytest.MonkeyPatch.context() as patch:
        for place, name, bad, read in (
            (LocalStorage, "manifest", refuse, lambda: checkpoints.verify(found)),
            (checkpoints.keys, "opening", no_key, lambda: checkpoints.verify(found)),
            (manager_module, "read_trainer_state", refuse, lambda: checkpoints.read_state(found)),
            (state_module, "read_into", refuse, lambda: checkpoints.read_tensors(loaded, state(1))),
        ):
            with patch.context() as once:
                if mesh.rank == 1 or name == "read_into":  # these few tensors are no model's
                    once.setattr(place, name, bad)
                try:
                    said.append(str(read()))
                except CheckpointError as error:
                    said.append(f"raised: {error}")
    return said


def test_what_one_rank_cannot_read_none_does(tmp_path: Path) -> None:
    """Seen to fail with errors raised where they are met: the other rank then waits in a collective."""
    expected = ["['no connection']", "raised: the key is missing", "raised: no connection", "raised: no connection"]
    assert run_ranks(read_with_one_that_cannot, 2, str(tmp_path)) == [expected, expected]
