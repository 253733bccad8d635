"""What a run has measured, beside what a plan says of it; and a plan that has learned from it."""

from __future__ import annotations

from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
from command_line import Say

from moe_dist.config import load_mapping
from moe_dist.monitor.run_log import RunLog, read_run
from moe_dist.plan.cluster import Cluster, cluster_of
from moe_dist.plan.measured import comparison, learned, measured_run
from moe_dist.plan.search import estimate
from moe_dist.train import MoETrainer

TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * 12 for i in range(24)]
TREE: dict[str, Any] = {
    "model": {
        "vocab_size": 272,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "moe_intermediate_size": 64,
        "num_experts": 8,
    },
    "data": {"max_seq_length": 64, "validation_split": 0.0},
    "train": {"max_steps": 6, "per_device_train_batch_size": 4},
    "checkpoint": {"save_steps": 3},
    "monitor": {"progress": "none", "tensorboard": False, "logging_steps": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    place = tmp_path_factory.mktemp("measured") / "run"
    config = load_mapping(TREE)
    config.train.output_dir = place
    MoETrainer(config).train(TEXTS)
    return place


def test_a_report_has_both(folder: Path, say: Say) -> None:
    """Of a real run: memory above Python's own, times, throughput. Seen to fail without the section."""
    names = [one.name for one in comparison(measured_run(read_run(folder)))]
    assert names == ["peak memory of a rank", "step", "tokens per second, of a device", "computing, in a step"]
    assert say("report", folder).code == 0
    page = (folder / "report.html").read_text()
    assert "Planned and measured" in page
    assert all(name in page for name in names)


def test_a_plan_learns_from_a_run(folder: Path, say: Say, tmp_path: Path) -> None:
    """It then plans the step that was measured, and its file is one that --cluster takes and that can be refined."""
    file = tmp_path / "ours.yaml"
    file.write_text("price_per_hour: 2\nwatts: 20\n")
    words = ("plan", folder / "config.yaml", "--gpus", 1, "--tokens", "1M", "--calibrate-from", folder)
    done = say(*words, "--gpu", "cpu", "--calibrate", file)
    assert done.code == 0, done.err
    assert "computing, in a step" in done.err
    here = cluster_of(None, file)
    assert (here.price_per_hour, here.watts, here.device) == (2, 20, "cpu")
    run = measured_run(read_run(folder), here)
    spent = run.estimate.time.compute + run.estimate.time.imbalance + run.estimate.time.update
    assert spent == pytest.approx(run.computing, rel=1e-4)
    before = file.read_text()
    assert say(*words, "--calibrate", file).code == 0
    assert [float(line.split()[1]) for line in lines(file.read_text())] == pytest.approx(
        [float(line.split()[1]) for line in lines(before)], rel=1e-3
    )


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "efficiency" in line or "bandwidth" in line]


def log(**parallel: Any) -> RunLog:
    """Of four ranks on two hosts, twice as slow as the plan in everything."""
    tree = TREE | {"parallel": {"ep_size": 4} | parallel}
    time = estimate(load_mapping(tree), 4, HOSTS).time
    computing = 2 * (time.compute + time.imbalance + time.update)
    phases = {"computing": [computing, computing / 2], "optimizer": [0.0, 0.0], "gradients": [2 * time.sharding, 9.0]}
    row = {
        "step": 4,
        "step_seconds": 2 * time.total,
        "all_to_all_share": time.dispatch / time.total,
        "layers": [{"load_imbalance": 1.5}],
        "memory_bytes": 5,
        "ranks": {"phase_seconds": phases, "memory_bytes": [10**9, 10**8]},
    }
    run = RunLog("run", Path("run"))
    start = {"config_text": str(tree), "world_size": 4, "device": "cpu", "hosts": ["a", "a", "b", "b"], "step": 2}
    run.starts.append(start | {"memory_before": 10**8})
    run.train += [row | {"step": 2, "step_seconds": 99.0}, row]
    run.checkpoints.append({"ok": True, "bytes": 10**8, "seconds": 2.0})
    return run


HOSTS = cluster_of("cpu").model_copy(update={"devices_per_host": 2})


@pytest.mark.parametrize(("ep_size", "links"), [(4, ["network"]), (2, ["link", "network"]), (1, ["network"])])
def test_what_is_twice_as_slow_is_learned(ep_size: int, links: list[str]) -> None:
    """Of the busiest rank, without the first interval; links by what has crossed them. Seen to fail with the mean over
    ranks, and with bandwidths of the other link."""
    run = measured_run(log(ep_size=ep_size), HOSTS)
    assert (run.memory, run.imbalance, run.storage) == (9 * 10**8, 1.5, 2.5e7)
    assert {one.row[3] for one in comparison(run)[1:]} == {"-50%", "+100%"}
    keys = learned(run)
    assert keys["gemm_efficiency"] == pytest.approx(HOSTS.gemm_efficiency / 2)
    assert keys["layer_overhead"] == pytest.approx(HOSTS.layer_overhead * 2)
    for name in ("link", "network"):
        wanted = getattr(HOSTS, f"{name}_bandwidth") / 2 if name in links else None
        assert keys.get(f"{name}_bandwidth") == (None if wanted is None else pytest.approx(wanted))
    again = measured_run(log(ep_size=ep_size), Cluster.model_validate(HOSTS.model_dump() | keys))
    assert again.estimate.time.compute == pytest.approx(2 * run.estimate.time.compute)
    assert again.estimate.time.dispatch == pytest.approx(2 * run.estimate.time.dispatch)


def test_shares_of_a_peak_end_at_one() -> None:
    """A device that is faster than it was thought to be has a higher peak."""
    run = measured_run(log(), HOSTS)
    keys = learned(changed(run, computing=run.computing / 10))
    assert max(keys[key] for key in ("gemm_efficiency", "grouped_efficiency", "attention_efficiency")) == 1.0
    assert keys["peak_float32"] * keys["gemm_efficiency"] == pytest.approx(
        5 * HOSTS.peak_float32 * HOSTS.gemm_efficiency
    )
    Cluster.model_validate(HOSTS.model_dump() | keys)


def test_an_older_log_on_a_cpu_has_no_memory_to_compare() -> None:
    run = log()
    run.starts[-1] |= {"memory_before": 0}
    assert measured_run(run, HOSTS).memory is None
