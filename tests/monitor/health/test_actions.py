"""Automatic actions: the policy by hand, and real runs that recover, resume and agree across layouts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from ranks import run_ranks
from run_files import complaint, load
from tiny import mesh_of
from torch import Tensor

from moe_dist.checkpoint.config_diff import changes
from moe_dist.config import BalanceConfig, load_mapping
from moe_dist.models.router import Router
from moe_dist.monitor.expert_stats import layer_record, used_share
from moe_dist.monitor.health.actions import Policy, levers
from moe_dist.monitor.health.doctor import findings
from moe_dist.monitor.health.rules import Health
from moe_dist.monitor.records import ActionRecord
from moe_dist.monitor.report.page import write_report
from moe_dist.monitor.run_log import read_run
from moe_dist.train import MoETrainer

GOOD, DEAD, UNEVEN = [100, 90, 110, 100], [100, 0, 100, 100], [450, *[100] * 7]
COLLAPSED = [500, 1, 500, 1, 1, 1, 1, 1, 1, 1]


def policy(**keys: Any) -> Policy:
    balance = BalanceConfig(act="on", **{"bias_update_rate": 1e-3, "router_aux_loss_coef": 0.03, **keys})
    return Policy(levers(balance), [0, 5], 2, balance.act_cooldown, True)


def told(chosen: Policy, loads: Sequence[Sequence[int]], first: int = 1) -> list[tuple[int, str, float, float]]:
    """(interval, key, before, now) of what is done about layer 5 with a load in each interval; layer 0 is well."""
    done: list[ActionRecord] = []
    for number, load_E in enumerate(loads, first):
        chosen.add({0: GOOD, 5: load_E})
        done += chosen.decide(number)
    assert {record.layer for record in done} <= {5}
    return [(record.step, record.key.removeprefix("balance."), record.before, record.now) for record in done]


def test_a_step_at_a_time_within_bounds_and_back() -> None:
    """Seen to fail without `min` in `Lever.at`, with `wait` left at 0, and with `_down` going straight to the start."""
    chosen = policy(act_cooldown=4, act_max_bias_update_rate=3e-3, act_max_aux_loss_coef=0.05)
    bias, aux = "bias_update_rate", "router_aux_loss_coef"
    up = [(3, bias, 1e-3, 2e-3), (7, bias, 2e-3, 3e-3), (11, aux, 0.03, 0.05)]  # 3 intervals, then every 4
    assert told(chosen, [DEAD] * 30) == up
    assert chosen.values(5) == {bias: 3e-3, aux: 0.05}
    assert chosen.values(0) == {bias: 1e-3, aux: 0.03}
    # A relapse before the cool-down is over starts the count again; the last raised goes first.
    down = [(37, aux, 0.05, 0.03), (41, bias, 3e-3, 2e-3), (45, bias, 2e-3, 1e-3)]
    assert told(chosen, [GOOD, GOOD, DEAD] + [GOOD] * 30, 31) == down
    assert chosen.values(5) == chosen.values(0)


@pytest.mark.parametrize(("load_E", "intervals"), [(DEAD, 3), (COLLAPSED, 3), (UNEVEN, 10)])
def test_it_acts_when_the_finding_is_made(load_E: list[int], intervals: int) -> None:
    health = Health()
    record = layer_record(5, load_E, 0, sum(load_E) // 2, {}, 2)
    found = [number for number in range(1, 13) if health.observe([record])]
    assert found[0] == intervals
    assert told(policy(), [load_E] * intervals)[0][0] == intervals
    assert told(policy(), [*[load_E] * (intervals - 1), [90] * len(load_E)] * 5) == []


def test_only_what_the_routing_has() -> None:
    def keys(**balance: Any) -> list[str]:
        return [lever.key for lever in levers(BalanceConfig(**balance))]

    assert keys() == ["router_aux_loss_coef"]
    assert keys(bias_update_rate=1e-3) == ["bias_update_rate", "router_aux_loss_coef"]
    assert keys(bias_update_rate=1e-3, use_auxiliary_loss=False) == ["bias_update_rate"]
    assert keys(bias_update_rate=1e-3, freeze_router=True) == ["bias_update_rate"]


def test_parts_of_an_interval_and_its_state_add_up() -> None:
    """Stopped in the middle of an interval and gone on elsewhere. Seen to fail with `pairs` left out of the state."""
    whole, parts = policy(), policy()
    for number in range(1, 9):
        whole.add({0: GOOD, 5: DEAD})
        parts.add({0: [60, 0, 0, 100], 5: [100, 0, 0, 0]})
        parts, before = policy(), parts
        parts.load_state_dict(json.loads(json.dumps(before.state_dict())))
        parts.add({0: [40, 90, 110, 0], 5: [0, 0, 100, 100]})
        assert parts.decide(number) == whole.decide(number)
    assert whole.values(5)["bias_update_rate"] == 4e-3
    assert parts.state_dict() == whole.state_dict()


def test_keys(tmp_path: Path) -> None:
    config, _ = load(tmp_path, "balance:\n  act: on\n")  # YAML says true
    assert config.balance.act == "on"
    assert load(tmp_path, "balance:\n  act: off\n")[0].balance.act == "off"
    text = complaint(tmp_path, "balance:\n  act: on\n  use_auxiliary_loss: false\n")
    assert "act=on: nothing to raise; set bias_update_rate (1e-3), or router_aux_loss_coef (0.01)" in text
    text = complaint(tmp_path, "balance:\n  act: on\n  router_aux_loss_coef: 0.5\n")
    assert "act_max_aux_loss_coef=0.1: at least router_aux_loss_coef=0.5" in text
    saved = config.model_dump(mode="json")
    (change,) = changes(saved, saved | {"monitor": saved["monitor"] | {"logging_steps": 7}}, 1, 1)
    assert not change.free
    calm = saved | {"balance": saved["balance"] | {"act": "off"}}
    (change,) = changes(calm, calm | {"monitor": saved["monitor"] | {"logging_steps": 7}}, 1, 1)
    assert change.free


TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * 12 for i in range(24)]
STEPS = 60


class Collapsed(Router):
    """Begins with nearly all of its probability on experts 0 and 1, for every token."""

    def logits(self, x_TD: Tensor) -> Tensor:
        logits_TE = super().logits(x_TD)
        return logits_TE + F.pad(logits_TE.new_full((2,), 3.0), (0, self.num_experts - 2))


def tree(folder: Path | str, **balance: Any) -> dict[str, Any]:
    return {
        "model": {
            "vocab_size": 272,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "router": "test_actions:Collapsed",
        },
        "data": {"max_seq_length": 32, "validation_split": 0.0},
        "train": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "output_dir": str(folder),
        },
        "optimizer": {"lr_scheduler_type": "constant", "learning_rate": 1e-4, "adam_epsilon": 1e-6},
        "balance": {"bias_update_rate": 5e-4, "router_aux_loss_coef": 1e-3, "act_cooldown": 2, **balance},
        "monitor": {"progress": "none", "tensorboard": False, "logging_steps": 2},
        "checkpoint": {"save_at_end": False},
    }


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key != "time"} for row in found if row["kind"] == kind]


def used(folder: Path) -> float:
    """Share of experts in use at the end, the worst layer's."""
    return min(used_share(layer) for layer in read_run(folder).layers(rows(folder, "train")[-1]))


def test_a_collapse_that_would_stay_is_mended(tmp_path: Path) -> None:
    """Two runs that differ in nothing but `balance.act`; a third only says what it would do."""
    results = {}
    for act in ("off", "log", "on"):
        config = load_mapping(tree(tmp_path / act, act=act))
        results[act] = MoETrainer(config).train(TEXTS).losses
    assert results["off"] == results["log"] != results["on"]
    assert used(tmp_path / "off") < 0.5 < 0.8 < used(tmp_path / "on"), [used(tmp_path / act) for act in results]

    assert rows(tmp_path / "off", "action") == []
    done = [ActionRecord.of(row) for row in rows(tmp_path / "on", "action")]
    assert {record.layer for record in done} == {0, 1}
    assert {record.step for record in done if record.before == 5e-4} == {6}
    bounds = {"balance.bias_update_rate": 1e-2, "balance.router_aux_loss_coef": 0.1}
    assert all(record.applied and record.now <= bounds[record.key] for record in done)
    assert not any(record.applied for record in map(ActionRecord.of, rows(tmp_path / "log", "action")))
    words = "layer 0: balance.bias_update_rate is raised from 0.0005 to 0.001: experts get no tokens"
    assert f"step 6: {words}" in (tmp_path / "on/train.log").read_text()
    assert f"step 6: {words}" in map(str, findings(read_run(tmp_path / "on")))
    assert words.replace("is raised", "would be raised") in (tmp_path / "log/train.log").read_text()
    page = write_report([tmp_path / "on"]).read_text()
    assert words in page
    name = '<script type="application/json" id="figure-load_imbalance-0">'
    traces = json.loads(page.split(name)[1].split("</script>")[0])["data"]
    logged = {row["step"]: row["layers"] for row in rows(tmp_path / "on", "train")}
    for name, up in (("balancing raised", True), ("taken back", False)):
        (marks,) = [trace for trace in traces if trace["name"] == name]
        wanted = [record for record in done if (record.now > record.before) is up]
        assert list(zip(marks["x"], marks["text"], strict=True)) == [(record.step, record.words) for record in wanted]
        assert marks["y"] == [logged[record.step][record.layer]["load_imbalance"] for record in wanted]


def test_a_run_stopped_between_two_decisions_goes_on_as_its_twin(tmp_path: Path) -> None:
    """Bitwise, with a change before the stop, one that the interval of the stop decides, and the same records.

    Seen to fail without `acting` in the checkpoint, and with the counts since the last logged line left out of it.
    """

    def run(name: str, steps: int, **checkpoint: Any) -> list[float]:
        settings = tree(tmp_path / name, act="on")
        settings["train"]["max_steps"] = steps
        settings["checkpoint"] = {"save_steps": 9, "save_total_limit": None, **checkpoint}
        settings["monitor"]["logging_steps"] = 4
        return MoETrainer(load_mapping(settings)).train(TEXTS).losses

    straight = run("straight", 24)
    first = run("stopped", 9)
    assert first + run("stopped", 24) == straight
    wanted = rows(tmp_path / "straight", "action")
    assert {row["step"] for row in wanted} == {12, 20}
    assert rows(tmp_path / "stopped", "action") == wanted
    # As after a kill: the line of the stop has not been logged, the counts are in the checkpoint.
    assert run("killed", 24, resume=str(tmp_path / "straight/checkpoint-9")) == straight[9:]
    assert rows(tmp_path / "killed", "action") == wanted

    def acting(name: str, step: int) -> dict[str, Any]:
        return json.loads((tmp_path / name / f"checkpoint-{step}/trainer_state.json").read_text())["acting"]

    one_step = 2 * 2 * 32 * 2  # micro-batches, sequences, tokens, experts of each
    assert [sum(state["pairs"]) for state in acting("straight", 9).values()] == [one_step] * 2
    assert acting("killed", 18) == acting("straight", 18)


def on_ranks(folder: str, ep_size: int, pp_size: int) -> tuple[list[float], dict[int, float], dict[int, float]]:
    settings = tree(folder, act="on", aux_loss_scope="sequence")
    mesh = mesh_of(ep_size, pp_size=pp_size)
    settings["train"] |= {"max_steps": 16, "gradient_accumulation_steps": 4 // mesh.layout.dp_size}
    settings["train"]["per_device_train_batch_size"] = 1
    settings["parallel"] = {"ep_size": ep_size, "pp_size": pp_size}
    trainer = MoETrainer(load_mapping(settings), mesh=mesh)
    losses = trainer.train(TEXTS).losses
    coefficients = {layer: moe.balance.aux_coef for layer, moe in trainer.parts.balancer.layers.items()}
    return losses, trainer.parts.balancer.rates, coefficients


@pytest.mark.dist
@pytest.mark.parametrize(("ep_size", "pp_size"), [(1, 1), (2, 1), (1, 2)])
def test_every_layout_acts_alike(tmp_path: Path, ep_size: int, pp_size: int) -> None:
    """At the same step, on every rank, in the layers it has. Seen to fail with the change made on rank 0 only."""
    alone, rates, coefficients = on_ranks(str(tmp_path / "alone"), 1, 1)
    assert max(rates.values()) > 5e-4
    for losses, rates_there, coefficients_there in run_ranks(on_ranks, 2, str(tmp_path / "ranks"), ep_size, pp_size):
        assert losses == pytest.approx(alone, rel=2e-5)
        assert rates_there.items() <= rates.items()
        assert coefficients_there.items() <= coefficients.items()
    assert rows(tmp_path / "ranks", "action") == rows(tmp_path / "alone", "action")
