"""The code in the guides runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_dist.models.experts import EXPERTS
from moe_dist.models.router import ROUTERS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def registries() -> Iterator[None]:
    kept = [(registry, dict(registry._entries)) for registry in (EXPERTS, ROUTERS)]
    yield
    for registry, entries in kept:
        registry._entries = entries


def test_custom_experts_guide_runs_as_one_file(registries: None, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "custom_experts.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    exec(compile("\n".join(blocks), "custom_experts.md", "exec"), {"__name__": "guide"})
    assert re.fullmatch(r"cosine: \S+ -> \S+\ntwo_layers: \S+ -> \S+\n", capsys.readouterr().out)


def test_routing_guide_names_real_keys() -> None:
    from moe_dist.config import Config

    text = (DOCS / "routing.md").read_text()
    for section, key in re.findall(r"`(model|balance)\.(\w+)", text):
        assert key in type(getattr(Config(), section)).model_fields
