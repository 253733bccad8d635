"""Where a rank's time goes, what it sends and receives, and that all of it travels in the one reduction."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import mesh_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import moe_dist.parallel.status
from moe_dist.config import ModelConfig
from moe_dist.data.loader import GlobalLoader
from moe_dist.models.auxiliary import LoadFacts
from moe_dist.models.counts import expert_share, flops_per_token, parameter_counts
from moe_dist.models.routing import Routing
from moe_dist.models.transformer import Transformer
from moe_dist.monitor.collector import Collector
from moe_dist.monitor.devices import peak_flops
from moe_dist.monitor.expert_stats import imbalance_seconds, layer_record
from moe_dist.monitor.health.doctor import findings
from moe_dist.monitor.rank_facts import (
    PHASE_KEYS,
    RankFacts,
    all_to_all_seconds,
    bytes_between_hosts,
    mean_phases,
    over_ranks,
    ranks_record,
)
from moe_dist.monitor.records import RanksRecord
from moe_dist.monitor.run_log import read_run
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.dispatch import AllToAllDispatcher
from moe_dist.parallel.status import PHASES, Status
from moe_dist.train import MoETrainer


def test_every_second_counts_for_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock set by hand. Seen to fail with an all-to-all inside an evaluation counted as one of training."""
    now = [1000.0]
    # By any other clock these seconds would be next to nothing.
    monkeypatch.setattr(moe_dist.parallel.status, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def passes(seconds: float) -> None:
        now[0] += seconds

    status = Status()
    passes(7.0)
    status.take()
    status.at("waiting for data")
    passes(2.0)
    status.at("computing")
    passes(3.0)
    before = status.inside("the all-to-all", 3)
    passes(4.0)
    status.back(before)
    assert status.own_seconds == 5.0
    status.at("evaluating")
    before = status.inside("the all-to-all", 3)
    assert (PHASES[status.phase], status.layer) == ("the all-to-all", 3)  # where it is, for whoever looks for it
    passes(5.0)
    status.back(before)
    taken = {phase: seconds for phase, seconds in status.take().items() if seconds}
    assert taken == {"waiting for data": 2.0, "computing": 3.0, "the all-to-all": 4.0, "evaluating": 5.0}
    assert sum(status.take().values()) == 0.0


def test_changing_phase_costs_nothing() -> None:
    status, started = Status(), time.process_time()
    for _ in range(10_000):
        status.back(status.inside("the all-to-all", 1))
    assert (time.process_time() - started) / 20_000 < 20e-6


def traffic(hidden: int) -> dict[str, Any]:
    """One layer forward and backward on every rank: rank r sends token t to expert (t + r) % 4."""
    rank, size = dist.get_rank(), dist.get_world_size()
    clock = Clock(torch.device("cpu"))
    group = mesh_of(ep_size=size).group("ep")
    assert group is not None
    dispatcher = AllToAllDispatcher(group, 4, layer=0, clock=clock)
    tokens = 5 + rank
    ids_TK = ((torch.arange(tokens) + rank) % 4)[:, None]
    x_TD = torch.randn(tokens, hidden, requires_grad=True)

    def once() -> None:
        rows, plan = dispatcher.dispatch(x_TD, Routing(expert_ids_TK=ids_TK, weights_TK=torch.ones(tokens, 1)))
        dispatcher.combine(rows * 2.0, plan).sum().backward()

    with clock.stopped():
        once()
    stopped = clock.take_traffic(), clock.take()
    once()
    owners = (ids_TK // (4 // size)).flatten()
    sent_rows = [int((owners == peer).sum()) for peer in range(size)]
    return {"stopped": stopped, "traffic": clock.take_traffic(), "sent": sent_rows, "seconds": clock.take()}


@pytest.mark.dist
def test_bytes_and_rows_are_those_that_travelled() -> None:
    """Counted by hand on 2 ranks. Seen to fail with a rank's rows to itself counted as sent."""
    hidden = 24
    told = run_ranks(traffic, 2, hidden)
    for rank, one in enumerate(told):
        assert one["stopped"] == (((), 0, ()), {"dispatch": 0.0, "combine": 0.0})
        other = 1 - rank
        received = told[rank]["sent"][rank] + told[other]["sent"][rank]
        # Forward: rows out, results of the other's rows back. Backward: the same gradients the same ways.
        rows = 2 * (one["sent"][other] + told[other]["sent"][rank])
        header = (4 + 4 // 2) * 8  # layer, hidden size, seed of noise, rows; rows for each of its two experts
        bytes_to = [0, 0]
        bytes_to[other] = rows * hidden * 4 + header
        assert one["traffic"] == (tuple(bytes_to), received, tuple(one["sent"]))
        assert min(one["seconds"].values()) > 0


def test_rows_of_ranks_share_the_reduction_of_the_layers() -> None:
    """Seen to fail with every rank writing into row 0."""
    calls: list[Tensor] = []
    world: list[Collector] = []

    def reduce(packed: Tensor) -> Tensor:
        calls.append(packed.clone())
        return packed

    for rank in range(3):
        collector = Collector([1], 4, 2, "cpu", reduce, ep_size=2, rank=rank, world_size=3)
        facts = LoadFacts.zeros(4, torch.device("cpu"))
        facts.pairs_E += torch.tensor([4, 2, 1, 1])
        facts.tokens += 4
        collector.add({1: facts})
        world.append(collector)
    seconds = [0.125 * index for index in range(len(PHASE_KEYS))]
    flow = [([0, 0], [0, 0]), ([3, 4], [0, 2**40 + 1]), ([1, 1], [8, 0])]
    told = [RankFacts(1.5 + rank, seconds, 0.5, 0.25, 2**52 + rank, 5 + rank, *flow[rank]) for rank in range(3)]
    for collector, facts_of_rank in zip(world, told, strict=True):
        collector.take_all(facts_of_rank.row())
    assert len(calls) == 3  # one reduction per rank
    summed = torch.stack(calls).sum(0)
    collector = Collector([1], 4, 2, "cpu", lambda packed: summed, ep_size=2, rank=0, world_size=3)
    (layer,), gathered = collector.take_all(told[0].row())
    assert gathered == [one.row() for one in told]
    assert layer.tokens_per_expert == [12, 6, 3, 3]
    assert layer.rank_imbalance == 18 / 12
    travelled = [told[0].of_row(row) for row in gathered]
    assert travelled == told
    ranks = ranks_record(travelled, num_steps=5)
    assert ranks.own_seconds == [1.5, 2.5, 3.5]
    assert ranks.received_rows == [2**52, 2**52 + 1, 2**52 + 2]
    assert list(zip(ranks.rows_to, ranks.bytes_to, strict=True)) == flow
    assert ranks.sent_bytes == [0, 2**40 + 1, 8]
    alone = RankFacts(1.0, seconds, 0.0, 0.0, 0, 7)
    assert ranks_record([alone.of_row(alone.row())], 1).rows_to == []
    assert (ranks.dispatch_seconds, ranks.combine_seconds) == ([0.1] * 3, [0.05] * 3)
    assert ranks.phase_seconds["computing"] == [0.125 / 5] * 3
    assert mean_phases(travelled)["computing"] == 0.125
    # As the table says: two means, and the memory of the rank that reports.
    expected = {"memory_bytes": 5, "dispatch_seconds": 0.1, "combine_seconds": 0.05}
    assert over_ranks(ranks) == pytest.approx(expected)


def test_the_all_to_all_of_every_group_and_between_hosts() -> None:
    """Two groups of two ranks, whose bytes stay in a host or not; a rank that waits says nothing about the network."""
    ranks = RanksRecord(
        [1.0] * 4, {}, [0] * 4, [0] * 4, [0] * 4,
        bytes_to=[[0, 10], [20, 0], [0, 40], [80, 0]],
        dispatch_seconds=[0.5, 0.02, 0.03, 0.3], combine_seconds=[0.01, 0.02, 0.03, 0.0],
    )  # fmt: skip
    assert bytes_between_hosts(ranks, ["a", "a", "a", "b"]) == 120
    assert bytes_between_hosts(ranks, ["a"] * 4) == 0
    assert all_to_all_seconds(ranks, 2) == pytest.approx(0.06)  # of (0.51, 0.04) and (0.06, 0.3)
    assert all_to_all_seconds(ranks, 4) == pytest.approx(0.04)


def test_the_imbalance_tax_adds_up_over_layers() -> None:
    """Two layers that burden different ranks do not cancel: each makes the others wait."""

    def layer(number: int, load: list[int]) -> Any:
        return layer_record(number, load, 0, sum(load) // 2, {}, 2, ep_size=2)

    layers = [layer(0, [30, 30, 10, 10]), layer(1, [10, 10, 30, 30])]
    assert [one.rank_imbalance for one in layers] == [1.5, 1.5]
    assert imbalance_seconds(layers, 0.2) == pytest.approx(0.1)
    assert imbalance_seconds([layer(0, [20, 20, 20, 20]), layer(1, [0, 0, 0, 0])], 0.2) == 0.0
    assert imbalance_seconds([], 0.2) == 0.0


@pytest.mark.parametrize("shared", [0, 24])
def test_operations_are_those_torch_counts(shared: int) -> None:
    """Forward and backward of the specification's experts, whose products torch can see (it has no rule for grouped
    ones). Seen to fail with all experts counted as active, and with 3 * N for backward.
    """
    length = 16
    model = ModelConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=2,
        shared_expert_intermediate_size=shared,
        expert="swiglu_loop",
        attn_implementation="eager",
    )
    made = Transformer(model)
    made.initialize(0)
    with FlopCounterMode(display=False) as counter:
        made(torch.randint(0, 96, (3, length))).sum().backward()
    expected = flops_per_token(model, length) * 3 * length
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)
    share = 6 * parameter_counts(model).active_experts / flops_per_token(model, length)
    assert expert_share(model, length) == share
    assert 0 < share < 1


@pytest.mark.parametrize(
    ("name", "bf16", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", True, 989e12),
        ("NVIDIA H100 PCIe", True, 756e12),
        ("NVIDIA H200", False, 67e12),
        ("NVIDIA A100-SXM4-80GB", True, 312e12),
        ("NVIDIA L40S", True, 362e12),
        ("NVIDIA L4", True, 121e12),
        ("NVIDIA A10G", True, None),
        ("Tesla K80", True, None),
    ],
)
def test_known_devices(name: str, bf16: bool, peak: float | None) -> None:
    """Names are whole words: an A100 is no A10, an L40S no L4."""
    assert peak_flops(name, bf16) == peak


SLEEP = 0.2
TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * 12 for i in range(24)]


def train_rows(folder: str, **options: Any) -> list[dict[str, Any]]:
    """A run on all ranks of this set; what rank 0 has logged of training."""
    model = {
        "vocab_size": 272,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    training = {
        "max_seq_length": 32,
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "logging_steps": 4,
        "eval_steps": 6,
        "ep_size": 2,
        "progress": "none",
        "tensorboard": False,
        "validation_split": 0.2,
        "monitor.peak_flops": 1e10,
        "save_at_end": False,
    } | options
    MoETrainer(model_config=model, training_config=training, output_dir=folder, mesh=mesh_of(2)).train(TEXTS)
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] in ("run", "train")]


def two_runs(folder: str) -> list[list[dict[str, Any]]]:
    plain = GlobalLoader.next_step

    def slowly(loader: GlobalLoader) -> Any:
        time.sleep(SLEEP)
        return plain(loader)

    healthy = train_rows(f"{folder}/run")
    if dist.get_rank() == 1:
        GlobalLoader.next_step = slowly  # type: ignore[method-assign]
    return [healthy, train_rows(f"{folder}/slow")]


@pytest.mark.dist
def test_a_real_run_tells_where_its_time_goes(tmp_path: Path) -> None:
    """And one whose rank 1 has slow data. Seen to fail with rank 0's waiting for data as the run's."""
    (start, *rows), (_, *slow) = run_ranks(two_runs, 2, str(tmp_path))[0]
    assert len(start["hosts"]) == 2
    assert [row["step"] for row in rows] == [1, 4, 8, 12]
    for before, row in zip([None, *rows], rows, strict=False):
        steps, ranks = row["step"] - (before["step"] if before else 0), row["ranks"]
        # Every pair arrives somewhere, none twice: the routed ones, counted elsewhere, by the router.
        assert sum(ranks["received_rows"]) == sum(sum(layer["tokens_per_expert"]) for layer in row["layers"])
        assert [sum(column) for column in zip(*ranks["rows_to"], strict=True)] == ranks["received_rows"]
        assert row["row_imbalance"] == pytest.approx(2 * max(ranks["received_rows"]) / sum(ranks["received_rows"]))
        assert row["all_to_all_bytes"] * steps == pytest.approx(sum(ranks["sent_bytes"]), abs=steps)
        assert row["all_to_all_bytes_between_hosts"] == 0
        both = ranks["dispatch_seconds"], ranks["combine_seconds"]
        for parts, whole in zip(zip(*both, strict=True), ranks["phase_seconds"]["all_to_all"], strict=True):
            assert sum(parts) == pytest.approx(whole, rel=0.2, abs=0.01)
        assert row["dispatch_seconds"] == pytest.approx(sum(both[0]) / 2)
        assert row["combine_seconds"] == pytest.approx(sum(both[1]) / 2)
        assert row["tokens_per_second_per_device"] == row["tokens_per_second"] / 2
        assert (row["loss_std"] > 0) == (steps > 1)
        assert row["mfu"] == pytest.approx(row["flops_per_second"] / 2e10)
        phases = row["phase_seconds"]
        in_steps = sum(phases[key] for key in ranks["phase_seconds"])
        assert in_steps <= row["step_seconds"] * steps * 1.3 + 0.02  # no second counted twice, on a busy machine either
        assert in_steps >= row["step_seconds"] * steps * 0.5
        for own, data, computing in zip(
            ranks["own_seconds"], *map(ranks["phase_seconds"].get, ("data", "computing")), strict=True
        ):
            assert own > 0
            assert math.isfinite(own)
            assert data + computing > 0
        assert row["stragglers"] == []
    assert [row["phase_seconds"]["evaluation"] > 0 for row in rows] == [False, False, True, False]
    for row in slow:
        data = row["ranks"]["phase_seconds"]["data"]
        assert data[1] > max(SLEEP, data[0])
        assert row["data_wait_share"] == pytest.approx(min(1.0, data[1] / row["step_seconds"]), rel=1e-3)
    assert "data_starved" in {finding.kind for finding in findings(read_run(tmp_path / "slow"))}
