"""What a person types, and gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli.plan import amount_of
from moe_dist.config import ConfigError, load_config
from moe_dist.plan.cluster import cluster_of
from moe_dist.plan.machine import named_cluster
from moe_dist.plan.search import estimate, plan

ROOT = Path(__file__).parent.parent.parent
# File -> device, devices.
SHIPPED = {
    "demo": ("cpu", 2),
    "distributed": ("cpu", 4),
    "finetune": ("cpu", 2),
    "moe_16x": ("cpu", 2),
    "moe_32x": ("a100", 8),
    "moe_64x": ("a100", 8),
    "mixtral_8x7b": ("h200", 8),
    "qwen3_30b_a3b": ("h200", 8),
    "qwen3_235b_a22b": ("h200", 64),
    "qwen3_coder_480b_a35b": ("h200", 320),
    "finetune_mixtral": ("h200", 4),
}


def moe_dist(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", "plan", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_a_plan_is_given_back_to_check(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    done = moe_dist("configs/demo.yaml", "--gpus", "4", "--gpu", "cpu", "--tokens", "10M", "--report", str(page))
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "moe-dist launch torchrun configs/" in line)
    keys = [word for word in line.split() if "=" in word]
    assert estimate(load_config(str(ROOT / "configs/demo.yaml"), keys), 4, cluster_of("cpu")).fits(cluster_of("cpu"))
    assert "memory-bars" in page.read_text()
    assert "pareto" in page.read_text()


def test_a_machine_is_measured_into_a_cluster_file(tmp_path: Path) -> None:
    """And planned for in the same breath; the file is one that --cluster takes."""
    file = tmp_path / "here.yaml"
    done = moe_dist("configs/demo.yaml", "--gpus", "2", "--gpu", "cpu", "--tokens", "1M", "--calibrate", str(file))
    assert done.returncode == 0, done.stderr
    here = cluster_of("cpu", file)
    assert 1e9 < here.peak_float32 < 1e13
    assert 1e8 < here.memory_bandwidth < 1e12
    assert 0 < here.layer_overhead < 1
    assert here.network_bandwidth == cluster_of("cpu").network_bandwidth


def test_nothing_fits_is_said_with_the_nearest(tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text("memory_gb: 4\n")
    done = moe_dist("configs/mixtral_8x7b.yaml", "--gpus", "8", "--cluster", str(small))
    assert done.returncode == 1
    assert done.stdout.startswith("No layout fits")
    assert "The nearest is" in done.stdout
    told = moe_dist("configs/mixtral_8x7b.yaml", "--gpus", "8", "--cluster", str(small), "--json")
    assert json.loads(told.stdout)["ranked"] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [("memory_gib: 4\n", "memory_gib: no key of a cluster"), ("overlap: 3\n", "overlap=3"), ("", "an empty file")],
)
def test_a_cluster_file_is_refused_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        cluster_of("h100", file)


def test_tokens_as_people_write_them() -> None:
    assert (amount_of("1.5T"), amount_of("20B"), amount_of("300000")) == (1_500_000_000_000, 20_000_000_000, 300_000)
    with pytest.raises(ConfigError, match="--tokens many"):
        amount_of("many")


@pytest.mark.parametrize("name", list(SHIPPED))
def test_shipped_run_files_fit_their_machines(name: str) -> None:
    device, number = SHIPPED[name]
    cluster = cluster_of(device)
    found = estimate(load_config(str(ROOT / f"configs/{name}.yaml")), number, cluster)
    assert found.fits(cluster), found.memory


@pytest.mark.proof
@pytest.mark.parametrize("name", list(SHIPPED))
def test_a_plan_of_a_shipped_run_file_is_no_slower_than_the_file(name: str) -> None:
    """On the machine that it names, which is the one of its heading. Seen to fail with the last of the plan."""
    device, number = SHIPPED[name]
    config = load_config(str(ROOT / f"configs/{name}.yaml"))
    assert named_cluster(config) in (None, cluster_of(device))
    found = plan(config, number, cluster_of(device)).best
    assert found is not None
    assert found.tokens_per_second >= estimate(config, number, cluster_of(device)).tokens_per_second * (1 - 1e-9)


def test_the_run_file_that_says_it_does_not_fit_does_not() -> None:
    """configs/mixtral_8x22b.yaml: 222 GB of state on each of eight devices."""
    found = estimate(load_config(str(ROOT / "configs/mixtral_8x22b.yaml")), 8, cluster_of("h200")).memory
    assert found.weights + found.gradients + found.optimizer == pytest.approx(222e9, rel=0.01)
    assert found.total > cluster_of("h200").memory
