"""The small models that are proven: small, and of the same kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import Config, load_config
from moe_dist.verify.bugs import BUGS
from moe_dist.verify.layouts import Case, shrunken
from moe_dist.verify.scenarios import Scenario, Smallness

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_run_file_shrinks(file: Path) -> None:
    config = load_config(file, notice=lambda text: None)
    small = shrunken(config, 8)
    assert small.model.num_experts % 8 == 0
    assert small.model.norm_topk_prob == config.model.norm_topk_prob
    assert small.model.qk_norm == config.model.qk_norm
    assert (small.model.kv_heads == small.model.num_attention_heads) == (
        config.model.kv_heads == config.model.num_attention_heads
    )


@pytest.mark.parametrize(
    ("routing", "wanted"),
    [
        ({"num_experts": 160, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3}, (16, 6)),  # DeepSeek-V2
        ({"num_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}, (16, 8)),  # DeepSeek-V3
        ({"num_experts": 64, "num_experts_per_tok": 4, "n_group": 16, "topk_group": 1}, (32, 2)),
        ({"num_experts": 12, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 1}, (12, 2)),
        ({"num_experts": 2, "num_experts_per_tok": 2}, (2, 2)),
        ({"num_experts": 3, "num_experts_per_tok": 2}, (3, 2)),
        ({"num_experts": 64, "num_experts_per_tok": 1, "norm_topk_prob": False}, (8, 1)),
        ({"num_experts": 128, "num_experts_per_tok": 8}, (8, 4)),
    ],
)
def test_every_routing_shrinks(routing: dict[str, Any], wanted: tuple[int, int]) -> None:
    """Seen to fail before: no experts at all with 16 groups, a stack trace with DeepSeek-V2's and with 2 experts."""
    small = shrunken(Config.model_validate({"model": routing}), 4).model
    assert (small.num_experts, small.num_experts_per_tok) == wanted
    assert small.moe_layers


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ({"num_hidden_layers": 4, "mlp_only_layers": [1]}, [0, 2, 3, 4, 6, 7]),
        ({"num_hidden_layers": 24, "decoder_sparse_step": 2}, [1, 3, 5, 7]),
        ({"num_hidden_layers": 60, "mlp_only_layers": [0, 1, 2]}, [3, 4, 5, 6, 7]),
        ({"num_hidden_layers": 24, "decoder_sparse_step": 12}, [4, 5, 6, 7]),
        ({"num_hidden_layers": 6, "num_experts": 0}, []),
    ],
)
def test_the_pattern_of_layers_stays(pattern: dict[str, Any], wanted: list[int]) -> None:
    """Two stages of a layer for each of four ranks, dense and expert layers in the order they had."""
    small = shrunken(Config.model_validate({"model": pattern}), 4)
    assert small.model.num_hidden_layers == 8
    assert small.model.moe_layers == wanted


@pytest.mark.parametrize("switch", ["use_auxiliary_loss=false", "router_aux_loss_coef=0"])
def test_what_a_bug_needs_is_switched_on(switch: str) -> None:
    """Without the loss, its bugs would plant nothing."""
    settings = load_config(ROOT / "configs" / "demo.yaml", [f"balance.{switch}"], notice=lambda text: None)
    for plant in [name for name in BUGS if "auxiliary" in name or name.endswith(("_is_local", "_unknown"))]:
        training = Smallness(settings, 4, plant).training(Scenario(Case()))
        assert training.config.balance.aux_loss_coef > 0


def test_the_weights_of_a_folder_are_not_those_of_the_small_model() -> None:
    """With them, `verify` of such a run file would refuse its own small model. Seen red."""
    config = Config.model_validate({"model": {"from_pretrained": "/some/folder"}})
    assert shrunken(config, 4).model.from_pretrained is None
