"""`moe-dist sweep`: the grid of a command line, every combination checked, and what is known of each trial.

Imports neither Ray nor torch: `sweep_driver` trains, `sweep_report` shows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.config import Config, ConfigError, load_config
from moe_dist.parallel.layout import Layout
from moe_dist.plan.elastic import replan

TRIALS = ".trials"
"""Folder in that of the sweep: how each trial has ended."""
_MOST = 1000


@dataclass(frozen=True)
class Trial:
    """One combination: its name, values and configuration."""

    name: str
    values: dict[str, str]
    """As they were written, by the key of the command line."""
    config: Config

    @property
    def resources(self) -> dict[str, float]:
        """CPUs, and GPUs where they are asked for."""
        launch = self.config.launch
        found: dict[str, float] = {"cpu": launch.nproc_per_node * (launch.num_threads or 1)}
        return found | ({"gpu": launch.nproc_per_node} if launch.device == "cuda" else {})

    @property
    def digest(self) -> str:
        """Of the whole configuration: a trial of another is another trial."""
        return hashlib.sha256(self.config.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class Sweep:
    """All trials, and by what they are compared."""

    folder: Path
    keys: tuple[str, ...]
    trials: tuple[Trial, ...]
    metric: str
    mode: str
    max_concurrent: int | None = None

    @property
    def todo(self) -> list[Trial]:
        """Trials that have not ended well yet."""
        return [trial for trial in self.trials if not is_done(self.outcome(trial))]

    def outcome(self, trial: Trial) -> dict[str, Any] | None:
        """How a trial has ended; None before, and for one of another configuration."""
        with suppress(OSError, ValueError):
            found = json.loads((self.folder / TRIALS / f"{trial.name}.json").read_text())
            if isinstance(found, dict) and found.get("digest") == trial.digest:
                return found
        return None

    def ranked(self) -> list[tuple[Trial, dict[str, Any] | None]]:
        """The best first; then those without the metric."""

        def order(item: tuple[Trial, dict[str, Any] | None]) -> tuple[bool, float]:
            value = metric_of(item[1], self.metric) if is_done(item[1]) else None
            return value is None, 0.0 if value is None else value if self.mode == "min" else -value

        return sorted(((trial, self.outcome(trial)) for trial in self.trials), key=order)


def is_done(outcome: dict[str, Any] | None) -> bool:
    return outcome is not None and outcome["code"] == 0


def metric_of(outcome: dict[str, Any] | None, name: str) -> float | None:
    """A number of the last line about training, or for eval/NAME about evaluation, of the trial."""
    kind, _, field = name.rpartition("/")
    value = ((outcome or {}).get("metrics") or {}).get(kind or "train", {}).get(field)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def plan(path: str, words: Sequence[str], metric: str, mode: str, max_concurrent: int | None) -> Sweep:
    """The trials of a command line. Raises ConfigError naming the combination that cannot be trained."""
    if not re.fullmatch(r"(eval/)?\w+", metric):
        raise ConfigError(f"--metric {metric}: allowed: a name in metrics.jsonl such as loss, or eval/loss")
    if mode not in ("min", "max"):
        raise ConfigError(f"--mode {mode}: allowed: min, max")
    values: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            raise ConfigError(f"{word!r}: allowed: key=value, or key=value,value to try several")
        if key in values:
            raise ConfigError(f"{key}: given twice; allowed: once, with commas between the values")
        values[key] = split_values(key, text)
    keys = tuple(key for key, found in values.items() if len(found) > 1)
    if not keys:
        raise ConfigError("nothing to try: give a key several values, as in learning_rate=1e-4,3e-4")
    count = 1
    for key in keys:
        count *= len(values[key])
    if count > _MOST:
        raise ConfigError(f"{count} combinations; allowed: at most {_MOST}")
    whole = load_config(path, [f"{key}={found[0]}" for key, found in values.items()], notice=lambda text: None)
    folder = whole.train.output_dir
    trials: list[Trial] = []
    names: set[str] = set()
    for chosen in itertools.product(*values.values()):
        every = dict(zip(values, chosen, strict=True))
        combination = {key: every[key] for key in keys}
        name = _name(combination, names)
        names.add(name)
        try:
            config = load_config(path, [f"{key}={value}" for key, value in every.items()], notice=lambda text: None)
            config.train.output_dir = folder / name
            world_size = config.launch.nproc_per_node
            config, _ = replan(config, world_size)
            Layout.of(config, world_size)
        except ConfigError as error:
            said = " ".join(f"{key}={value}" for key, value in combination.items())
            raise ConfigError(f"the trial {said} cannot be trained: {error}") from error
        trials.append(Trial(name, combination, config))
    return Sweep(folder, keys, tuple(trials), metric, mode, max_concurrent)


def split_values(key: str, text: str) -> list[str]:
    """Values between commas; those inside quotes, [] and {} do not count. Raises ConfigError for an empty value."""
    found, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            found.append("")
            continue
        found[-1] += letter
    found = [value.strip() for value in found]
    if quote or depth:
        raise ConfigError(f"{key}={text}: a quote or bracket is not closed")
    if len(found) > 1 and "" in found:
        raise ConfigError(f"{key}={text}: an empty value between commas")
    if len(set(found)) < len(found):
        raise ConfigError(f"{key}={text}: a value twice")
    return found


def write_results(sweep: Sweep) -> Path:
    """results.json: everything that is known, the best first."""
    path = sweep.folder / "results.json"
    trials = []
    for trial, outcome in sweep.ranked():
        known = outcome or {}
        trials.append(
            {
                "values": trial.values,
                "state": state(outcome),
                "metric": metric_of(outcome, sweep.metric),
                "metrics": known.get("metrics", {}),
                "error": known.get("error"),
                "folder": str(trial.config.train.output_dir),
            }
        )
    write_whole(path, {"metric": sweep.metric, "mode": sweep.mode, "keys": list(sweep.keys), "trials": trials})
    return path


def state(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return "not trained"
    return {0: "done", 3: "stopped itself", 75: "stopped"}.get(outcome["code"], "failed")


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def _name(values: dict[str, str], taken: set[str]) -> str:
    """A folder's name, in the words of the command line as far as a file system likes them."""
    words = "_".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items())
    plain = re.sub(r"[^\w.+=-]+", "-", words)[:150]
    names = itertools.chain([plain], (f"{plain}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)
