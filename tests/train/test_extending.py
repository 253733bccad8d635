"""The parts of one's own that docs/extending.md shows train, save and go on, on one rank and on two."""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks
from saved import MODEL
from tiny import mesh_of

from moe_dist.checkpoint.storage import LocalStorage
from moe_dist.config import load_mapping
from moe_dist.train import MoETrainer, TrainingResult

ROOT = Path(__file__).parents[2]
TREE: dict[str, Any] = {
    "model": MODEL,
    "data": {"source": "my_parts:fables", "max_seq_length": 32, "validation_split": 0.2},
    "optimizer": {
        "optim": "sgd",
        "momentum": 0.9,
        "learning_rate": 0.1,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
    },
    "train": {"seed": 1, "per_device_train_batch_size": 2, "sample_tokens": 0, "eval_batches": 4},
    "monitor": {"progress": "none", "tensorboard": False, "logging_steps": 1},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a module `my_parts` with every block of the page."""
    folder = tmp_path_factory.mktemp("parts")
    page = (ROOT / "docs" / "extending.md").read_text("utf-8")
    (folder / "my_parts.py").write_text("\n\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    return str(folder)


def run(parts: str, folder: str, world: int, max_steps: int, overrides: dict[str, dict[str, Any]]) -> TrainingResult:
    if parts not in sys.path:
        sys.path.insert(0, parts)
        importlib.invalidate_caches()
    tree = {name: TREE.get(name, {}) | overrides.get(name, {}) for name in {*TREE, *overrides}}
    tree["train"] |= {"output_dir": folder, "max_steps": max_steps, "gradient_accumulation_steps": 4 // world}
    config = load_mapping(tree, notice=lambda text: None)
    return MoETrainer(config, mesh=mesh_of(config.parallel.ep_size)).train()


ENGINE = {"parallel": {"engine": "my_parts:PlainEngine"}}


def test_all_of_them_in_one_run(parts: str, tmp_path: Path) -> None:
    own = ENGINE | {
        "model": {"router": "my_parts:CosineRouter", "expert": "my_parts:SquaredReluExpert"},
        "train": {"callbacks": ["my_parts:StopWhenGood"], "eval_steps": 5},
        "monitor": {"sinks": ["my_parts:CsvSink"]},
    }
    result = run(parts, str(tmp_path), 1, 60, own)
    assert re.fullmatch(r"validation loss 1\.\d\d is good", result.reason)
    with open(tmp_path / "losses.csv", newline="") as file:
        assert [float(loss) for _, loss in csv.reader(file)] == result.losses
    assert LocalStorage(tmp_path).candidates()[-1] == result.steps


def test_an_engine_without_a_method_is_named(parts: str, tmp_path: Path) -> None:
    """Before anything is trained, also where the method would be called by a pipeline alone."""
    page = Path(parts, "my_parts.py").read_text()
    (tmp_path / "older_parts.py").write_text(page.replace("def before_last_backward", "def _unused"))
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ValueError, match=r"engine=older_parts:PlainEngine: it has no before_last_backward;"):
            run(parts, str(tmp_path / "run"), 1, 1, {"parallel": {"engine": "older_parts:PlainEngine"}})
    finally:
        sys.path.remove(str(tmp_path))


def losses_of(parts: str, folder: str, max_steps: int, overrides: dict[str, dict[str, Any]]) -> list[float]:
    both = overrides | {"parallel": overrides.get("parallel", {}) | {"ep_size": dist.get_world_size()}}
    return run(parts, folder, dist.get_world_size(), max_steps, both).losses


@pytest.mark.dist
def test_the_engine_on_two_ranks_is_the_built_in_one_on_one(parts: str, tmp_path: Path) -> None:
    """And either goes on from what the other has saved. Seen to fail without its `reduce`, with experts reduced over
    `dp`, without the sum over `ep` in the norm, and without `named_state`.
    """
    straight = run(parts, str(tmp_path / "built in"), 1, 6, {}).losses
    here, again = str(tmp_path / "own"), {"checkpoint": {"allow_config_change": True}}
    first = run_ranks(losses_of, 2, parts, here, 3, ENGINE)
    assert first[0] == pytest.approx(straight[:3], rel=1e-5)
    assert run(parts, here, 1, 5, again).losses == pytest.approx(straight[3:5], rel=1e-5)
    last = run_ranks(losses_of, 2, parts, here, 6, ENGINE | again)
    assert last[0] == pytest.approx(straight[5:], rel=1e-5)
    rows = [json.loads(line) for line in Path(here, "metrics.jsonl").read_text().splitlines()]
    norms = [row["grad_norm"] for row in rows if row.get("kind") == "train"]
    whole = [json.loads(line) for line in (tmp_path / "built in/metrics.jsonl").read_text().splitlines()]
    assert norms == pytest.approx([row["grad_norm"] for row in whole if row.get("kind") == "train"], rel=1e-5)
