"""Tasks by what a person calls them, on a model in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from moe_dist.tasks.result import TaskResult
from moe_dist.tasks.row_tasks import RowTask, read_rows
from moe_dist.tasks.whole_model import WholeModel


def run_tasks(model: WholeModel, tasks: Sequence[str], limit: int | None = None) -> dict[str, TaskResult]:
    """Results by name, on every rank. A collective.

    Each of `tasks` is `[NAME=]FILE.jsonl` (`row_tasks`), or for lm-evaluation-harness a YAML file or one of its own
    names. `limit`: rows of each at most, the first ones. Raises ValueError naming what is wrong with a task.
    """
    return model.on_rank_zero(lambda: _run(model, tasks, limit))


def check_tasks(tasks: Sequence[str]) -> None:
    """On rank 0, before anything is computed. Raises ValueError naming what can be seen to be wrong: a name twice, a
    file that cannot be read or has no rows, a package that is missing."""
    others = _read(tasks)[1]
    if others and find_spec("lm_eval") is None:
        raise ValueError(f"task {others[0]}: needs lm-evaluation-harness: pip install 'moe-dist[evaluate]'")
    for task in others:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise ValueError(f"task {task}: there is no such file")


def _run(model: WholeModel, tasks: Sequence[str], limit: int | None) -> dict[str, TaskResult]:
    check_tasks(tasks)
    of_rows, others = _read(tasks, limit)
    found = {name: rows.run(model) for name, rows in of_rows.items()}
    if others:
        from moe_dist.tasks.harness import run_harness

        found |= run_harness(others, model, limit)
    return found


def _read(tasks: Sequence[str], limit: int | None = None) -> tuple[dict[str, RowTask], list[str]]:
    """Those that are files of rows, by name, and all others."""
    of_rows: dict[str, RowTask] = {}
    others: list[str] = []
    for task in tasks:
        name, equals, path = task.partition("=")
        path = path if equals else task
        if path.endswith((".jsonl", ".json")):
            name = name if equals else Path(path).stem
            if name in of_rows:
                raise ValueError(f"task {task}: two are called {name}; give NAME=FILE")
            of_rows[name] = read_rows(path, limit)
        elif equals:
            raise ValueError(f"task {task}: NAME= is for files of JSON lines; others have their own")
        else:
            others.append(task)
    return of_rows, others
