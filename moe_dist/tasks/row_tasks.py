"""Tasks that are a file of JSON lines: classes to choose from, or answers to write.

A row with `label` is a text of a class: the one whose name is likeliest behind the text is found. A row with
`reference` is a text to go on from. A first row with neither is what all others have in common.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.generate.options import SamplingOptions
from moe_dist.tasks import text_metrics
from moe_dist.tasks.result import Sums, TaskResult, means
from moe_dist.tasks.whole_model import WholeModel

Row = Mapping[str, Any]
MAX_TOKENS = 64
"""Of an answer, unless a row says `max_tokens`."""
_NO_TEXT = ("label", "idx", "choices", "reference", "max_tokens", "stop")


@dataclass(frozen=True)
class RowTask:
    """`rows`: all of one kind, with what they have in common."""

    path: str
    rows: list[Row]

    @property
    def is_classification(self) -> bool:
        return "label" in self.rows[0]

    def run(self, model: WholeModel) -> TaskResult:
        """On rank 0, inside `on_rank_zero`. Raises ValueError naming file and row."""
        return _classify(self, model) if self.is_classification else _write(self, model)


def read_rows(path: str, limit: int | None = None) -> RowTask:
    """The task in a file, its first `limit` rows. Raises ValueError naming file and line."""
    common: dict[str, Any] = {}
    rows: list[Row] = []
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: it cannot be read ({getattr(error, 'strerror', None) or error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is no JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} is no JSON object")
        if not rows and not common and not {"label", "reference"} & row.keys():
            common = row
            continue
        row = common | row
        kinds = {"label", "reference"} & row.keys()
        if len(kinds) != 1 or (rows and not kinds & rows[0].keys()):
            raise ValueError(f'{path}: line {number}: one of "label" and "reference", the same in all rows')
        if not _is_answer(row):
            key = kinds.pop()
            allowed = "a whole number or text" if key == "label" else "a text, or a list of texts"
            raise ValueError(f"{path}: line {number}: {key}={row[key]!r}: {allowed}")
        rows.append(row)
    if not rows:
        raise ValueError(f'{path}: there is no row with "label" or "reference"')
    return RowTask(path, rows[:limit])


def _is_answer(row: Row) -> bool:
    if "label" in row:
        return isinstance(row["label"], (int, str)) and not isinstance(row["label"], bool)
    given = row["reference"]
    given = [given] if isinstance(given, str) else given
    return isinstance(given, list) and bool(given) and all(isinstance(one, str) for one in given)


def prompt_of(row: Row, path: str) -> str:
    """`template` with the row's columns in it; else `prompt`; else its columns of text, a line for each, and whose
    value is asked for, as GLUE's tasks are. Raises ValueError for a template of other columns."""
    if "template" in row:
        try:
            return re.sub(r"\{(\w+)\}", lambda found: str(row[found[1]]), str(row["template"]))
        except KeyError as error:
            raise ValueError(f"{path}: template={row['template']!r}: a row has no column {error.args[0]}") from error
    if "prompt" in row:
        return str(row["prompt"])
    texts = [f"{key}: {value}\n" for key, value in row.items() if isinstance(value, str) and key not in _NO_TEXT]
    return "".join(texts) + ("label:" if "label" in row else "answer:")


def choices_of(task: RowTask) -> list[list[str]]:
    """Of each row, what may stand behind its prompt: `choices`, or all labels of the file, in order, each behind a
    blank. Raises ValueError."""
    labels = sorted({row["label"] for row in task.rows}, key=lambda label: (str(type(label)), label))
    default = [f" {label}" for label in labels]
    each = [list(map(str, row.get("choices", default))) for row in task.rows]
    if any(len(choices) < 2 for choices in each):
        raise ValueError(f"{task.path}: a row has fewer than two choices: {min(each, key=len)}")
    return each


def right_class(row: Row, choices: Sequence[str], labels: Sequence[Any], path: str) -> int:
    """The number of the row's choice: its label as a number, or as a text. Raises ValueError."""
    label = row["label"]
    if "choices" not in row:
        return labels.index(label)
    if isinstance(label, int) and 0 <= label < len(choices):
        return label
    names = [choice.strip() for choice in choices]
    if isinstance(label, str) and label.strip() in names:
        return names.index(label.strip())
    raise ValueError(f"{path}: label={label!r} is none of the choices {list(choices)}, nor the number of one")


def _classify(task: RowTask, model: WholeModel) -> TaskResult:
    each = choices_of(task)
    labels = sorted({row["label"] for row in task.rows}, key=lambda label: (str(type(label)), label))
    right = [right_class(row, choices, labels, task.path) for row, choices in zip(task.rows, each, strict=True)]
    pairs = []
    for row, choices in zip(task.rows, each, strict=True):
        prompt = model.asked(prompt_of(row, task.path))
        pairs += [model.encode_pair(prompt, choice) for choice in choices]
    scores = iter(model.score(pairs))
    found = []
    for choices in each:
        logs = [next(scores)[0] for _ in choices]
        found.append(logs.index(max(logs)))
    metrics = {"accuracy": text_metrics.accuracy(right, found), "f1": text_metrics.macro_f1(right, found)}
    hits = means({"accuracy": [float(a == b) for a, b in zip(right, found, strict=True)]})
    classes = range(max(map(len, each)))
    rows = [
        [float(sign) for one in classes for sign in (a == b == one, a == one, b == one)]
        for a, b in zip(right, found, strict=True)
    ]
    return TaskResult(metrics, len(task.rows), {**hits, "f1": Sums("macro_f1", rows)})


def _write(task: RowTask, model: WholeModel) -> TaskResult:
    options = []
    for row in task.rows:
        stop = row.get("stop", "\n")
        stops = (stop,) if isinstance(stop, str) else tuple(map(str, stop))
        try:
            options.append(SamplingOptions(max_tokens=int(row.get("max_tokens", MAX_TOKENS)), stop=stops))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{task.path}: {error}") from error
    asked = [model.asked(prompt_of(row, task.path)) for row in task.rows]
    prompts = [model.encode(text) or [model.first_id] for text in asked]
    answers = [text.strip() for text in model.write(prompts, options)]
    given = [row["reference"] for row in task.rows]
    references = [[one] if isinstance(one, str) else one for one in given]
    metrics = {
        "bleu": text_metrics.bleu(answers, references),
        "chrf": text_metrics.chrf(answers, references),
        "exact_match": text_metrics.exact_match(answers, references),
    }
    hits = [text_metrics.exact_match([answer], [right]) for answer, right in zip(answers, references, strict=True)]
    sums = {"bleu": Sums("bleu", text_metrics.bleu_rows(answers, references)), **means({"exact_match": hits})}
    return TaskResult(metrics, len(task.rows), sums)
