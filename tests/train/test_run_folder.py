"""A run destroys and moves nothing that it has not written, and a start that cannot be leaves everything as it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from patches import Replace, replaced
from test_saving import TEXTS, TREE, run, steps

from moe_dist.checkpoint import run_folder
from moe_dist.config import ConfigError
from moe_dist.monitor.sinks.multi_sink import Sinks
from moe_dist.train import MoETrainer, evaluation
from moe_dist.train import trainer as trainer_module


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file and link of a folder."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_a_persons_files_stop_the_start(tmp_path: Path) -> None:
    """`train e1/config.yaml output_dir=e1` wrote over the person's own run file; so did an edited one of the run.

    Seen to fail without `refuse_foreign`: config.yaml was the run's.
    """
    for name in ("config.yaml", "metrics.jsonl"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("# mine\nmodel: {}")
        with pytest.raises(
            ValueError, match=rf"{folder}/{name} was not written by a run.*rename it, or choose another"
        ):
            run(folder)
        assert os.listdir(folder) == [name]
        assert (folder / name).read_text() == "# mine\nmodel: {}"
    folder = tmp_path / "run"
    run(folder, {"max_steps": 2})
    edited = (folder / "config.yaml").read_text().replace("max_steps: 2", "max_steps: 3")
    (folder / "config.yaml").write_text(edited)
    for resume in ("auto", "never"):
        with pytest.raises(ValueError, match=r"config\.yaml is not as a run has written it there"):
            run(folder, resume=resume)
    assert (folder / "config.yaml").read_text() == edited
    (folder / "config.yaml").rename(folder / "mine.yaml")
    assert run(folder, {"max_steps": 3}).steps == 3
    (folder / ".run.lock").unlink()  # copied without hidden files: it is a run's folder all the same
    assert run(folder, {"max_steps": 4}).steps == 4
    with pytest.raises(ConfigError, match=r"train\.output_dir=''"):
        MoETrainer({**TREE, "train": TREE["train"] | {"output_dir": ""}})
    with pytest.raises(ConfigError, match=r"output_dir is empty"):
        MoETrainer(TREE, output_dir="")


def test_a_run_from_before_the_first_line_goes_on(tmp_path: Path) -> None:
    """Seen to fail with a first line asked of every config.yaml."""
    run(tmp_path, {"max_steps": 2})
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().partition("\n")[2])
    assert run(tmp_path, {"max_steps": 3}).steps == 3
    config.write_text(config.read_text().partition("\n")[2] + "# mine\n")
    with pytest.raises(ValueError, match=r"config\.yaml is not as a run has written it there"):
        run(tmp_path, {"max_steps": 4})


def test_never_moves_the_runs_own_entries_only(tmp_path: Path, replace: Replace) -> None:
    """Inside the folder, in one line that says where to; the folder may be a link, or hold the data.

    Seen to fail when the folder itself was renamed: the link pointed nowhere, and the data was gone.
    """
    real, folder = tmp_path / "disk" / "run", tmp_path / "run"
    real.mkdir(parents=True)
    folder.symlink_to(real)
    run(folder, save_steps=3)
    (real / "tb").mkdir()
    for name in ("corpus.txt", "logs.txt", "tb/notes.txt", "aside-notes"):
        (real / name).write_text("mine")
    (real / "report.html").write_text("of the run")
    said: list[str] = []
    replace(Sinks, "message", lambda self, text: said.append(text))
    assert run(folder, {"max_steps": 1}, resume="never").steps == 1
    assert folder.is_symlink()
    (earlier,) = real.glob("earlier-*")
    assert steps(earlier) == [3, 6]
    assert steps(folder) == [1]
    moved = {".last-step", ".run.lock", "checkpoint-3", "checkpoint-6", "config.yaml", "metrics.jsonl", "report.html"}
    assert {path.name for path in earlier.iterdir()} == moved | {"train.log"}
    assert [(real / name).read_text() for name in ("corpus.txt", "logs.txt", "tb/notes.txt")] == ["mine"] * 3
    assert [text for text in said if "earlier-" in text] == [
        f"the run that was here is kept in {folder / earlier.name}"
    ]
    assert run(earlier, {"max_steps": 7}).losses[1:] == [], "and can be gone on with there"


def test_what_cannot_be_moved_moves_nothing(tmp_path: Path, replace: Replace) -> None:
    run(tmp_path, {"max_steps": 2})
    before = contents(tmp_path)
    rename = os.rename

    def busy(source: Any, target: Any) -> None:
        if Path(source).name == "metrics.jsonl" and "earlier-" in str(target):
            raise OSError(16, "Device or resource busy")
        rename(source, target)

    replace(run_folder.os, "rename", busy)
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl cannot be moved into .*earlier-.*: Device or resource busy; "
    ):
        run(tmp_path, resume="never")
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob("earlier-*"))


def test_a_run_knows_all_that_it_writes(tmp_path: Path) -> None:
    """A file that is new and not told in `run_folder` would stay behind with the next run."""
    monitor = TREE["monitor"] | {"tensorboard": True, "prometheus": {"port": 0}}
    MoETrainer({**TREE, "monitor": monitor}, output_dir=tmp_path).train(TEXTS)
    for path in run_folder._own_entries(tmp_path):
        (shutil.rmtree if (tmp_path / path).is_dir() else os.unlink)(tmp_path / path)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [tmp_path / ".run.lock"]


WRONG: dict[str, dict[str, Any]] = {
    "no such key": {"checkpoint": {"encryption_key": "env:NOT_THERE"}},
    "a tokenizer too large": {"model": TREE["model"] | {"vocab_size": 200}},
    "nothing to learn from": {"data": {"max_seq_length": 32, "validation_split": 0.2, "source": "memory"}},
    "no such checkpoint": {"checkpoint": {"resume": "7"}},
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("there_is_one", [False, True], ids=["new folder", "a run there"])
def test_a_start_that_cannot_be_changes_nothing(tmp_path: Path, what: str, there_is_one: bool) -> None:
    """Exit code 2, and no folder is left, nor the old run moved away.

    Seen to fail as it was: with `never` the old run had gone, and failed starts left folders with a log in them.
    """
    folder = tmp_path / "above" / "run"
    if there_is_one:
        run(folder, {"max_steps": 2})
    before = contents(tmp_path)
    tree = {**TREE, **WRONG[what]}
    tree["checkpoint"] = {"resume": "never"} | tree.get("checkpoint", {})
    with pytest.raises(ValueError, match=r"."):
        MoETrainer(tree, output_dir=folder).train(None if what == "nothing to learn from" else TEXTS)
    assert contents(tmp_path) == before
    if not there_is_one:
        assert list(tmp_path.iterdir()) == []


def in_step(replace: Replace, number: int, do: Any) -> None:
    """Something happens to a run that has done so many steps, once."""
    one_step = trainer_module.MoETrainer._one_step
    left = [do]

    def step(self: MoETrainer) -> None:
        if self.parts.counters.step == number and left:
            left.pop()()
        one_step(self)

    replace(trainer_module.MoETrainer, "_one_step", step)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in the run folder", "checkpoints elsewhere"])
def test_two_first_starts(tmp_path: Path, replace: Replace, elsewhere: bool) -> None:
    """The run folder is removed and another run started there, or with the same place for checkpoints, while the first
    still trains: that one writes and deletes nothing more, and says so.

    Seen to fail with generations compared alone: both are start 1, and the first deleted the second's checkpoints.
    """
    place = tmp_path / "place" if elsewhere else None
    options: dict[str, Any] = {"save_total_limit": 1, "folder": str(place) if elsewhere else None}
    second: list[Any] = []

    def take_over() -> None:
        if not elsewhere:
            shutil.rmtree(tmp_path / "run")
        folder = tmp_path / ("other" if elsewhere else "run")
        second.append(run(folder, {"max_steps": 2}, **options))

    in_step(replace, 1, take_over)
    first = run(tmp_path / "run", save_steps=3, **options)
    assert first.failed
    assert first.steps in (3, 4), "at its next save"
    assert ("writes here" if elsewhere else "of another run (process") in first.reason
    assert steps(place or tmp_path / "run") == [2]
    assert not second[0].failed


@pytest.mark.parametrize("what", ["removed", "moved"])
@pytest.mark.parametrize("saves", [True, False], ids=["saving", "not saving"])
def test_a_run_folder_that_goes(tmp_path: Path, replace: Replace, what: str, saves: bool) -> None:
    """In mid-run. Seen to fail as it was: a new folder was made for the last checkpoint, and the exit code was 0."""
    folder = tmp_path / "run"
    in_step(replace, 2, lambda: shutil.rmtree(folder) if what == "removed" else folder.rename(tmp_path / "moved"))
    result = run(folder, save_steps=4 if saves else 0, save_at_end=saves)
    assert result.failed
    assert result.steps in ((4, 5) if saves else (6,))
    where = rf" \(it is {tmp_path}/moved now\)" if what == "moved" else ""
    assert result.reason == f"train.output_dir={folder}: removed or moved while the run was writing there" + (
        where.replace("\\", "") + "; nothing more is written"
    )
    assert not folder.exists()


def test_a_finished_run_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so and gives what it gave; nothing is evaluated or written.

    Seen to fail as it was: a second evaluation and summary in the log, `5.61 -> nan`, and NaN from Python.
    """
    for name, train in (("all steps", {"eval_steps": 2}), ("no improvement", {"eval_steps": 1, "max_steps": 50})):
        if name == "no improvement":
            train |= {"early_stopping_patience": 2, "early_stopping_threshold": 9.0}
        first = run(tmp_path / name, train)
        before = contents(tmp_path / name)
        said: list[str] = []
        listen = replaced(Sinks, "message", lambda self, text, said=said: said.append(text))
        with listen, monkeypatch.context() as patch:
            patch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
            again = run(tmp_path / name, train)
        assert contents(tmp_path / name) == before
        assert said[-1] == f"finished at step {first.steps}: {first.reason}; nothing is left to do"
        assert again.losses == []
        same = (
            "initial_loss",
            "final_loss",
            "steps",
            "best_eval_loss",
            "unigram_loss",
            "reason",
            "checkpoint",
            "failed",
        )
        assert {key: getattr(again, key) for key in same} == {key: getattr(first, key) for key in same}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02d}.txt").write_text(text)
    (folder / "held.out").write_text(TEXTS[0] * 3)
    return folder


def swapped(one: Path, two: Path) -> None:
    first, second = one.read_text(), two.read_text()
    one.write_text(second)
    two.write_text(first)


CHANGES: dict[str, tuple[Any, str]] = {
    "same size": (lambda c: (c / "03.txt").write_text((c / "03.txt").read_text().upper()), "03.txt is changed"),
    "two swapped": (lambda c: swapped(c / "03.txt", c / "04.txt"), "03.txt, 04.txt are changed"),
    "renamed": (lambda c: (c / "03.txt").rename(c / "99.txt"), "03.txt is missing; 99.txt is new"),
    "appended": (
        lambda c: (c / "05.txt").write_text(TEXTS[5] * 9),
        r"05.txt is changed \(the data was read in another",
    ),
    "one more": (lambda c: (c / "24.txt").write_text("more\n" * 40), "24.txt is new"),
}


def read(folder: Path, corpus: Path, max_steps: int, **data: Any) -> Any:
    tree = {**TREE, "train": TREE["train"] | {"max_steps": max_steps, "eval_steps": 2}}
    paths = {"source": "text", "path": f"{corpus}/*.txt", "validation_path": f"{corpus}/held.out"}
    tree["data"] = {"max_seq_length": 32, **paths, **data}
    return MoETrainer(tree, output_dir=folder).train()


@pytest.mark.parametrize("what", CHANGES)
def test_other_data_than_before(tmp_path: Path, corpus: Path, what: str) -> None:
    """Named by file, and gone on with only when told to. Seen to fail as it was: all but the two that change the number
    of samples went on without a word."""
    read(tmp_path / "run", corpus, 2)
    change, words = CHANGES[what]
    change(corpus)
    with pytest.raises(ValueError, match=rf"training data is not what it was: {words}.*data\.on_change=warn"):
        read(tmp_path / "run", corpus, 4)
    assert read(tmp_path / "run", corpus, 4, on_change="warn").steps == 4
    assert read(tmp_path / "run", corpus, 5).steps == 5, "it is the run's data now"


def test_the_same_data_elsewhere(tmp_path: Path, corpus: Path, replace: Replace) -> None:
    """Copied with other times, it is the same; other held-out data is not held against the best loss of before."""
    first = read(tmp_path / "run", corpus, 2)
    shutil.copytree(corpus, tmp_path / "copy", copy_function=shutil.copyfile)
    assert read(tmp_path / "run", tmp_path / "copy", 4).best_eval_loss <= first.best_eval_loss
    (corpus / "held.out").write_text("".join(map(chr, range(33, 127))) * 8)
    said: list[str] = []
    replace(Sinks, "message", lambda self, text: said.append(text))
    assert read(tmp_path / "run", corpus, 6).best_eval_loss > first.best_eval_loss
    assert "the validation data is not what it was: held.out is changed; the best loss is counted anew" in said
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stopping"]["skipped_in_a_row"] == 0
