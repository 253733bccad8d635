"""Dispatchers by name, and of a person's own: refused with what they lack, and the guide's runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import parity
import pytest
import torch
from ranks import run_ranks
from run_files import complaint, load

from moe_dist.config import Config
from moe_dist.models.moe import LocalDispatcher
from moe_dist.models.routing import Routing
from moe_dist.parallel.dispatch_choice import chosen_dispatcher, hosts_for, rows_between_hosts, rows_per_token
from moe_dist.parallel.dispatchers import build_dispatcher
from moe_dist.verify.trial import TrialResult, difference

GUIDE = Path(__file__).parents[2] / "docs" / "extending.md"
TWO_RANKS: Any = SimpleNamespace(size=lambda: 2)


class OneWay:
    def __init__(self, *arguments: Any) -> None: ...

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> Any: ...


class NoArguments(LocalDispatcher):
    def __init__(self) -> None:
        super().__init__(4)


class Own(LocalDispatcher):
    """All experts here; `answer` is put in the place of what it answers."""

    answer: Any = None

    def __init__(self, group: Any, num_experts: int, layer: int, clock: Any) -> None:
        super().__init__(num_experts)

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> Any:
        return self.answer or super().dispatch(x_TD, routing)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "all_to_al",
            "one of auto, all_to_all, dedup, hierarchical, deepep, static, all_gather, or package.module:Class of you",
        ),
        (":Class", "one of auto"),
        ("package:", "one of auto"),
        ("a b:c", "one of auto"),
    ],
)
def test_a_name_that_cannot_be_is_refused_before_any_import(tmp_path: Path, name: str, said: str) -> None:
    """Seen red without a check of the name: ranks were started first."""
    text = complaint(tmp_path, f"parallel: {{ep_size: 2, dispatcher: '{name}'}}")
    assert f"parallel.dispatcher='{name}': {said}" in text


def test_names_that_can_be(tmp_path: Path) -> None:
    for name in ("all_to_all", "all_gather", "somewhere.else:Dispatcher"):
        assert load(tmp_path, f"parallel: {{ep_size: 2, dispatcher: '{name}'}}")[0].parallel.dispatcher == name


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("OneWay", r"it has no combine; a dispatcher has dispatch\(x_TD, routing\)"),
        ("NoArguments", r"it is called with \(group, num_experts, layer, clock\): "),
        ("Nothing", "cannot be imported"),
    ],
)
def test_a_class_that_is_no_dispatcher_is_refused(own: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"parallel.dispatcher={__name__}:{own}: {said}"):
        build_dispatcher(f"{__name__}:{own}", TWO_RANKS, 4, 0)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (torch.zeros(2, 8), r"dispatch must answer \(rows_RD, plan\)"),
        ((torch.zeros(2, 8), object()), r"its plan needs rows_per_expert, int64 \(2,\)"),
        ((torch.zeros(2, 8), SimpleNamespace(rows_per_expert=torch.zeros(4, dtype=torch.int64))), "rows_per_expert"),
        ((torch.zeros(2, 8), SimpleNamespace(rows_per_expert=torch.zeros(2))), "its plan needs rows_per_expert"),
        ((torch.zeros(2, 8), SimpleNamespace(rows_per_expert=torch.zeros(2, dtype=torch.int64))), "needs sources"),
    ],
)
def test_a_plan_that_lacks_something_is_refused(monkeypatch: pytest.MonkeyPatch, answer: Any, said: str) -> None:
    monkeypatch.setattr(Own, "answer", answer if isinstance(answer, tuple) else [answer])
    dispatcher = build_dispatcher(f"{__name__}:Own", TWO_RANKS, 4, 0)
    with pytest.raises(ValueError, match=said):
        dispatcher.dispatch(torch.zeros(2, 8), Routing(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64)))


def in_training(dispatcher: str, folder: str) -> TrialResult:
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return parity.told((f"parallel.dispatcher={dispatcher}",), 2, 4, precision="float32")


@pytest.mark.dist
def test_the_guides_dispatcher_trains(tmp_path: Path) -> None:
    """Its rows are rounded on the way, so losses are near those of all_to_all, and not the same."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "class HalfOnTheWire" in block]
    (tmp_path / "wire.py").write_text(block)
    plain = run_ranks(in_training, 4, "all_to_all", str(tmp_path))[0]
    found = run_ranks(in_training, 4, "wire:HalfOnTheWire", str(tmp_path))[0]
    assert found.losses != plain.losses
    assert found.losses == pytest.approx(plain.losses, rel=1e-2)
    assert 0 < difference(found.gradients, plain.gradients) < 0.1


@pytest.mark.parametrize(
    ("top_k", "ep_size", "chosen", "rows"),
    [
        (1, 4, "all_to_all", (0.75, 0.75)),  # nothing to save
        (2, 2, "dedup", (1.0, 0.75)),
        (2, 4, "dedup", (1.5, 1.3125)),
        (2, 8, "all_to_all", (1.75, 1.640625)),  # 6 % of the rows
        (8, 2, "dedup", (4.0, 0.99609375)),
        (
            8,
            8,
            "dedup",
            (7.0, 4.594695),
        ),
        (
            8,
            64,
            "all_to_all",
            (7.875, 7.457535),
        ),
    ],
)
def test_auto_is_what_saves_rows(top_k: int, ep_size: int, chosen: str, rows: tuple[float, float]) -> None:
    assert rows_per_token(top_k, ep_size) == pytest.approx(rows, rel=1e-4)
    sizes = {"num_experts": 128, "num_experts_per_tok": top_k, "norm_topk_prob": top_k > 1}
    tree = {"model": sizes, "parallel": {"ep_size": ep_size}}
    name, why = chosen_dispatcher(Config.model_validate(tree))
    assert name == chosen
    saved = f"{1 - rows[1] / rows[0]:.0%}"
    assert (f"{rows[1]:.2f} instead of {rows[0]:.2f} rows" if chosen == "dedup" else "dedup would spare") in why
    assert saved in why
    tree["parallel"]["dispatcher"] = "all_gather"
    assert chosen_dispatcher(Config.model_validate(tree)) == ("all_gather", "")


def test_auto_where_nothing_travels() -> None:
    assert chosen_dispatcher(Config.model_validate({})) == ("all_to_all", "")


@pytest.mark.parametrize(
    ("dispatcher", "top_k", "ep_size", "here", "chosen", "rows"),
    [
        ("auto", 8, 16, 4, "hierarchical", (4.84, 2.7)),
        ("auto", 8, 4, 2, "hierarchical", (1.8, 1.0)),
        ("auto", 2, 16, 2, "all_to_all", None),  # few tokens have experts on two ranks of a host
        ("auto", 8, 16, 16, "dedup", None),
        ("auto", 8, 16, 3, "dedup", None),  # hosts do not hold whole rows of ranks
        ("auto", 8, 16, 1, "dedup", None),
        ("hierarchical", 8, 16, 16, "dedup", None),
        ("hierarchical", 2, 16, 2, "hierarchical", None),
        ("dedup", 8, 16, 4, "dedup", None),
    ],
)
def test_between_hosts(
    dispatcher: str, top_k: int, ep_size: int, here: int, chosen: str, rows: tuple[float, float] | None
) -> None:
    sizes = {"num_experts": 128, "num_experts_per_tok": top_k}
    config = Config.model_validate({"model": sizes, "parallel": {"ep_size": ep_size, "dispatcher": dispatcher}})
    name, why = chosen_dispatcher(config, here)
    assert name == chosen
    assert hosts_for(config, here) == (here if chosen == "hierarchical" else None)
    if rows is not None:
        assert rows_between_hosts(top_k, ep_size, here) == pytest.approx(rows, abs=0.01)
        assert f"{rows[1]:.2f} instead of {rows[0]:.2f} rows of a token leave its host" in why
    if dispatcher == "hierarchical" and chosen == "dedup":
        assert "not on several hosts" in why


@pytest.mark.parametrize("here", [1, 3, 4, 8])
def test_hosts_that_are_none_are_refused(tmp_path: Path, here: int) -> None:
    said = complaint(tmp_path, f"parallel: {{ep_size: 4, dispatcher: hierarchical, ranks_per_host: {here}}}")
    assert f"parallel.ep_size=4 is not several hosts of several ranks (parallel.ranks_per_host={here})" in said
