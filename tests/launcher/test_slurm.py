"""Training under a real Slurm: three nodes on this machine, jobs as a person submits them, time limits and dead nodes.

Where Slurm is not installed nothing of this is tested, and the summary of the tests says so.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import BIN, losses, metrics, write_config
from slurm_cluster import Cluster, missing

from moe_dist.checkpoint.inspecting import digests
from moe_dist.checkpoint.reading import Found
from moe_dist.checkpoint.storage import LocalStorage

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.launch,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]

STEPS = 60
# Writes down on which node each rank is. From the sixth step on it dawdles, until the test has seen enough.
PLACED = """
import os
import time
from pathlib import Path

from moe_dist.models.experts import Experts


class Placed(Experts):
    calls = 0

    def forward(self, rows, rows_per_expert):
        self.calls += self.training
        if "SEEN" in os.environ:
            seen = Path(os.environ["SEEN"])
            (seen / f"rank-{os.environ['RANK']}").write_text(os.environ["SLURMD_NODENAME"])
            if self.calls > 5 and not (seen / "hurry").exists():
                time.sleep(1.5)
        return super().forward(rows, rows_per_expert)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(nodes=3, cpus=2) as cluster:
        yield cluster
    assert not cluster.left()


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("slurm"))


class Work:
    """A run of its own folder, submitted with `moe-dist launch slurm`."""

    def __init__(self, cluster: Cluster, run_file: Path, folder: Path) -> None:
        self.cluster, self.run_file, self.folder = cluster, run_file, folder
        self.seen = folder / "seen"
        self.seen.mkdir()
        (folder / "placed.py").write_text(PLACED)
        self.number = ""

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    def submit(self, *words: str) -> str:
        """What the command prints; the job's number is kept."""
        overrides = (f"train.output_dir={self.run_folder}", "model.expert=placed:Placed", *words)
        # One host plays all nodes: their names lead nowhere.
        surroundings = {"MASTER_ADDR": "127.0.0.1", "MOE_DIST_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        done = self.cluster.run(
            *(BIN / "moe-dist", "launch", "slurm", self.run_file, *overrides),
            cwd=self.folder,
            env={"PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}", "SEEN": str(self.seen), **surroundings},
        )
        said = re.match(r"job (\d+) is submitted\n", done.stdout)
        assert said, done.stdout
        self.number = said[1]
        return done.stdout

    @property
    def output(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"*-{self.number}*.out")))

    def trains(self, step: int) -> None:
        """Wait until it has logged this step."""
        self.cluster.wait(lambda: self._alive() and f"step: {step}/" in self.output, f"step {step}: {self.output}")

    def _alive(self) -> bool:
        state = self.cluster.job(self.number)["JobState"]
        assert state in ("PENDING", "CONFIGURING", "RUNNING"), f"{state}\n{self.output}"
        return True

    def hurry(self) -> None:
        (self.seen / "hurry").touch()

    def ended(self, state: str = "COMPLETED") -> dict[str, str]:
        job = self.cluster.ended(self.number)
        assert job["JobState"] == state, f"{job}\n{self.output}"
        return job

    def nodes(self) -> list[str]:
        """Of rank 0, 1, ..."""
        return [path.read_text() for path in sorted(self.seen.glob("rank-*"))]

    def saved(self) -> list[int]:
        return sorted(int(path.parent.name.partition("-")[2]) for path in self.run_folder.glob("*/manifest.json"))


@pytest.fixture
def work(cluster: Cluster, run_file: Path, tmp_path: Path) -> Iterator[Work]:
    made = Work(cluster, run_file, tmp_path)
    yield made
    if made.number:
        cluster.run("scancel", made.number, check=False)
        cluster.wait(lambda: made.number not in cluster.run("squeue", "-h", "-o", "%A").stdout.split(), "an end")


@pytest.fixture(scope="module")
def twin(run_file: Path) -> Path:
    """The same run, by `moe-dist train` on this machine and left alone."""
    folder = run_file.parent / "twin"
    (run_file.parent / "placed.py").write_text(PLACED)
    command = [BIN / "moe-dist", "train", run_file, f"train.output_dir={folder}", "model.expert=placed:Placed"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{run_file.parent}"}
    done = subprocess.run([*command, f"train.max_steps={STEPS}"], env=environment, timeout=600, capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder


def is_the_same(folder: Path, twin: Path) -> None:
    """Every step's loss, and every weight, moment and bias at the end, bit for bit."""
    ours = {row["step"]: row["loss"] for row in metrics(folder, "train")}
    assert ours == {row["step"]: row["loss"] for row in metrics(twin, "train")}
    assert len(ours) == STEPS
    assert digests(Found(LocalStorage(folder), STEPS)) == digests(Found(LocalStorage(twin), STEPS))


LONG = ("--nodes=2", "--ntasks-per-node=1", f"train.max_steps={STEPS}", "checkpoint.save_steps=4")


@pytest.mark.parametrize("way", [(), ("--srun",)], ids=["torchrun", "srun"])
def test_two_nodes_share_the_experts(work: Work, twin: Path, way: tuple[str, ...]) -> None:
    """Seen to fail with `train.seed=1` on the one side."""
    work.hurry()
    said = work.submit(*way, "--nodes=2", "--ntasks-per-node=1", f"train.max_steps={STEPS}")
    assert f"tail -F moe-dist-{work.number}.out" in said
    job = work.ended()
    assert job["ExitCode"] == "0:0"
    assert len(set(work.nodes())) == 2, "both ranks on one node"
    layout = json.loads((work.run_folder / f"checkpoint-{STEPS}" / "manifest.json").read_text())["layout"]
    assert (layout["world"], layout["ep"]) == (2, 2)
    assert losses(work.run_folder) == losses(twin)
    is_the_same(work.run_folder, twin)
