"""Twenty runs, ten healthy and ten ill: what the doctor says of each, as a table. Healthy: nothing to worry about."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.models.auxiliary import ROUTER_SUMS
from moe_dist.monitor.expert_stats import layer_record
from moe_dist.monitor.health.doctor import findings
from moe_dist.monitor.health.rules import Finding
from moe_dist.monitor.records import EvalRecord, LayerRecord, RunInfo, TrainRecord
from moe_dist.monitor.run_log import read_run
from moe_dist.monitor.sinks import JsonlSink

Make = Callable[..., TrainRecord]
Loads = Callable[[int, np.random.Generator], list[float]]
SHAPES = {"8/2": (8, 2), "64/6": (64, 6), "128/8": (128, 8), "128/2": (128, 2), "384/8": (384, 8), "4/3": (4, 3)}
INTERVALS = 60


def spread(shape: str, sigma: float, settle: int = 0) -> Loads:
    """Log-normal popularity of the experts that stays for the run; for the first `settle` intervals all but K sleep."""
    num_experts, top_k = SHAPES[shape]

    def loads(number: int, source: np.random.Generator) -> list[float]:
        weights = np.exp(sigma * np.random.default_rng(7).standard_normal(num_experts))
        if number < settle:
            weights[top_k:] *= 0.02
        return (weights / weights.sum()).tolist()

    return loads


def one_hot(shape: str, shares: float) -> Loads:
    """One expert with so many times its fair share, the others a little uneven."""
    usual = spread(shape, 0.2)

    def loads(number: int, source: np.random.Generator) -> list[float]:
        weights = np.array(usual(number, source))
        weights[5] = shares / len(weights)
        return (weights / weights.sum()).tolist()

    return loads


def at_work(shape: str, share: float) -> Loads:
    """A part of the experts gets nearly everything."""
    num_experts, _ = SHAPES[shape]
    weights = np.where(np.arange(num_experts) < share * num_experts, 1.0, 0.03)
    return lambda number, source: (weights / weights.sum()).tolist()


def onto_few(shape: str, since: int = 20) -> Loads:
    """From an interval on, all tokens go to the K same experts, but for one in a thousand."""
    num_experts, top_k = SHAPES[shape]

    def loads(number: int, source: np.random.Generator) -> list[float]:
        weights = np.full(num_experts, 1.0 if number < since else 1e-3)
        weights[:top_k] = 1.0
        return (weights / weights.sum()).tolist()

    return loads


def without(shape: str, expert: int, since: int = 20) -> Loads:
    num_experts, _ = SHAPES[shape]

    def loads(number: int, source: np.random.Generator) -> list[float]:
        weights = np.ones(num_experts)
        weights[expert] = number < since
        return (weights / weights.sum()).tolist()

    return loads


def validation(rise: Callable[[int], float]) -> Callable[[int, float], float]:
    return lambda number, loss: loss + 0.05 + rise(number)


def step(at: int, before: float, after: float) -> Callable[[int], float]:
    return lambda number: before if number < at else after


# Name, shape, load of the experts, other fields by interval, validation loss, balance keys, what must be said.
HEALTHY: list[tuple[str, str, Loads, dict[str, Any], Any, dict[str, float]]] = [
    ("small and even", "8/2", spread("8/2", 0.05), {}, None, {}),
    ("128 experts, one of them at 3.5 shares", "128/8", one_hot("128/8", 3.5), {}, None, {"bias_update_rate": 5e-3}),
    ("128 experts that begin on a few", "128/8", spread("128/8", 0.3, settle=12), {}, None, {}),
    ("384 experts", "384/8", spread("384/8", 0.5), {}, None, {}),
    ("128 experts, 40 % of them at work", "128/2", at_work("128/2", 0.4), {}, None, {}),
    ("three of four experts", "4/3", spread("4/3", 0.05), {}, None, {}),
    ("a pause of the data", "8/2", spread("8/2", 0.05), {"data_wait_share": lambda n: 0.5 * (20 < n < 30)}, None, {}),
    ("a spike that healed", "8/2", spread("8/2", 0.05), {"loss": lambda n: 2.0 * (n == 40)}, None, {}),
    ("a large gradient in the warm-up", "8/2", spread("8/2", 0.05), {"grad_norm": lambda n: 40.0 / (1 + n)}, None, {}),
    ("validation that follows", "64/6", spread("64/6", 0.2), {}, validation(lambda n: 0.02 * (n % 2)), {}),
]
ILL: list[tuple[str, str, Loads, dict[str, Any], Any, set[str]]] = [
    ("collapse of 8", "8/2", onto_few("8/2"), {}, None, {"collapse"}),
    ("collapse of 128", "128/8", onto_few("128/8"), {}, None, {"collapse"}),
    ("one dead of 128", "128/8", without("128/8", 77), {}, None, {"dead_experts"}),
    ("very uneven", "64/6", spread("64/6", 0.85), {}, None, {"uneven_load"}),
    ("half the throughput", "8/2", spread("8/2", 0.05), {"tokens_per_second": step(30, 17e3, 10e3)}, None,
     {"throughput_drop"}),
    ("an idle GPU", "8/2", spread("8/2", 0.05), {"device_utilisation": step(0, 0, 0.55)}, None, {"low_utilisation"}),
    ("three sequences in ten seconds", "8/2", spread("8/2", 0.05), {"samples_per_second": step(0, 0, 0.3)}, None,
     {"few_samples"}),
    ("large gradients, on and off", "8/2", spread("8/2", 0.05), {"grad_norm": lambda n: 15.0 if n % 5 else 3.0}, None,
     {"gradient_norm"}),
    ("learned by heart", "8/2", spread("8/2", 0.05), {"loss": lambda n: -0.03 * n}, lambda n, loss: 3.0,
     {"validation_diverging"}),
    ("validation creeps up", "8/2", spread("8/2", 0.05), {}, lambda n, loss: 2.9 + 0.001 * n, {"overfitting"}),
]  # fmt: skip


def records(
    shape: str, loads: Loads, changes: dict[str, Any], make: Make, source: np.random.Generator
) -> Iterator[TrainRecord]:
    num_experts, top_k = SHAPES[shape]
    noise, every = random.Random(3), changes.get("every", 10)
    for number in range(INTERVALS):

        def layer(index: int, number: int = number) -> LayerRecord:
            pairs = source.multinomial(400 * num_experts, loads(number, source)).tolist()
            tokens = sum(pairs) // top_k
            return layer_record(
                index, pairs, 0, tokens, dict.fromkeys(ROUTER_SUMS, tokens) | {"router_confidence": 0.3 * tokens}, top_k
            )

        loss = (2.0 + 4.0 * math.exp(-number / 15)) * noise.gauss(1.0, 0.02)
        fields: dict[str, Any] = {"loss": loss, "tokens_per_second": 17e3 * noise.gauss(1.0, 0.03), "grad_norm": 0.9}
        for name, change in changes.items():
            if name != "every":
                fields[name] = change(number) + (loss if name == "loss" else 0.0)
        yield make(1 + every * number, layers=[layer(index) for index in range(3)], **fields)


def diagnosed(
    folder: Path, info: RunInfo, make: Make, row: tuple[Any, ...], balance: dict[str, float]
) -> list[Finding]:
    """The run written as a real one is, and read back by the doctor."""
    _, shape, loads, changes, evaluate, _ = row
    sink, source = JsonlSink(folder / "metrics.jsonl"), np.random.default_rng(0)
    keys = {"router_aux_loss_coef": 0.01, **balance}
    text = "balance:\n" + "".join(f"  {key}: {value}\n" for key, value in keys.items())
    sink.open(RunInfo(**{**vars(info), "config_text": text}))
    for number, record in enumerate(records(shape, loads, changes, make, source)):
        sink.train(record)
        if evaluate is not None and number % 6 == 5:
            sink.evaluation(EvalRecord(record.step, evaluate(number, record.loss), 9.0, 1000, 1.0))
    sink.close()
    return [finding for finding in findings(read_run(folder)) if finding.kind != "no_end"]


@pytest.mark.parametrize("row", HEALTHY, ids=[row[0] for row in HEALTHY])
def test_a_healthy_run_is_called_healthy(
    tmp_path: Path, info: RunInfo, train_record: Make, row: tuple[Any, ...]
) -> None:
    """Nothing but information, which is no reason to worry. Seen to fail with the limits of eight experts for all (the
    second was unbalanced at 3 shares, the fifth collapsed at half of the experts, and a coefficient of variation of 0.2
    a warning for three) and with what is over counted (the third, seventh and eighth).
    """
    found = diagnosed(tmp_path, info, train_record, row, row[5])
    assert [str(finding) for finding in found if finding.severity != "info"] == []


@pytest.mark.parametrize("row", ILL, ids=[row[0] for row in ILL])
def test_an_ill_run_is_called_what_it_is(
    tmp_path: Path, info: RunInfo, train_record: Make, row: tuple[Any, ...]
) -> None:
    """Exactly the illness. The last six were silent without the rules they have now: a gradient that is large in four
    of five intervals, for one, was never large ten times in a row.
    """
    found = diagnosed(tmp_path, info, train_record, row, {})
    assert {finding.kind for finding in found if finding.severity != "info"} >= row[5]
    alarming = {finding.kind for finding in found if finding.severity != "info"} - row[5]
    # What collapses is uneven too, and what is very uneven has a busiest expert.
    along = {"uneven_load", "imbalance"} if row[5] & {"collapse", "uneven_load"} else set()
    assert alarming <= along, [*map(str, found)]


def test_advice_is_from_the_values_of_the_run(tmp_path: Path, info: RunInfo, train_record: Make) -> None:
    """Seen to fail with the sentence that was the same for all: `set balance.bias_update_rate (1e-3)` at 5e-3."""
    found = diagnosed(tmp_path, info, train_record, ILL[1], {"bias_update_rate": 5e-3, "router_aux_loss_coef": 0.02})
    (words,) = {finding.words.partition("; ")[2] for finding in found if finding.kind == "collapse"}
    assert words == (
        "raise balance.router_aux_loss_coef from 0.02 to 0.04, or raise balance.bias_update_rate from 0.005 to 0.01"
    )


def test_what_is_over_is_history(tmp_path: Path, info: RunInfo, train_record: Make) -> None:
    """One line for all that a kind has been, with when it was over, and no advice any more."""
    found = diagnosed(tmp_path, info, train_record, HEALTHY[2], {})
    (line,) = [finding for finding in found if finding.kind == "collapse"]
    assert (line.severity, line.layer, line.until) == ("info", None, 141)
    assert "3 times in all, layers 0, 1, 2, over since step 141" in line.words
    assert "raise" not in line.words
