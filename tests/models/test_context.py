"""What a pass needs from outside comes with the pass, and nobody leaves it on a layer."""

from __future__ import annotations

import ast
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from patches import Replace

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.auxiliary import LoadBalance
from moe_dist.models.context import RoutingContext
from moe_dist.models.transformer import Transformer

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=4, moe_intermediate_size=16
)


def set_from_outside(source: str) -> list[str]:
    """Attributes of a layer's `balance`, `router` or `dispatcher` that are assigned to; not += on a buffer."""
    targets = [
        target
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    return [
        ast.unparse(target)
        for target in targets
        if isinstance(target, ast.Attribute)
        and isinstance(target.value, ast.Attribute)
        and target.value.attr in ("balance", "router", "dispatcher")
    ]


def test_no_other_room_sets_what_a_layer_computes_with() -> None:
    """Injected bugs do, on purpose."""
    assert set_from_outside("moe.balance.global_load = None") == ["moe.balance.global_load"]
    found = [
        f"{file.relative_to(ROOT)}: {target}"
        for room in ("moe_dist", "launcher")
        for file in sorted((ROOT / room).rglob("*.py"))
        if "injected_bugs" not in file.parts and file.parent.name != "models"
        for target in set_from_outside(file.read_text())
    ]
    assert found == []


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_layer_and_every_repetition_sees_the_same_object(replace: Replace, recompute: str) -> None:
    """Planted: `dataclasses.replace(context)` in `Block._forward`."""
    seen: list[tuple[int, RoutingContext]] = []
    losses = LoadBalance.losses

    def watched(self: LoadBalance, routing: object, num_sequences: int, context: RoutingContext) -> object:
        seen.append((self.layer, context))
        return losses(self, routing, num_sequences, context)

    replace(LoadBalance, "losses", watched)
    model = Transformer(CONFIG, BalanceConfig())
    model.initialize(0)
    model.gradient_checkpointing_enable(recompute)
    context = RoutingContext(token_scale=1 / 8)
    model(torch.zeros(1, 8, dtype=torch.int64), context=context).sum().backward()
    assert [layer for layer, _ in seen] == [0, 1] + ([1, 0] if recompute == "full" else [])
    assert all(one is context for _, one in seen)
    with pytest.raises(FrozenInstanceError):
        context.token_scale = 1.0  # type: ignore[misc]
