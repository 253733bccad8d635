"""One configuration, every way of starting it: the same losses, and a run folder that holds everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import ONE_RANK, Program, Run, losses

from moe_dist.config import load_config
from moe_dist.parallel.layout import Layout

pytestmark = pytest.mark.dist

NOISE = ("Warning", "Traceback", "[Gloo]", "[W", "W1", "elastic", "pynccl", "OMP_NUM_THREADS")


def check_folder(run: Run, world_size: int) -> None:
    files = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    wanted = {"config.yaml", "metrics.jsonl", "train.log", "checkpoint-3/trainer_state.json"}
    wanted |= {f"logs/rank-{rank}.log" for rank in range(1, world_size)}
    assert wanted <= files
    assert not [name for name in files if ".tmp" in name]


def test_one_process(one_rank: Run, config: Path) -> None:
    assert one_rank.code == 0
    check_folder(one_rank, 1)
    assert len(losses(one_rank.folder)) == 3
    assert "step: 3/3" in one_rank.program.out
    assert one_rank.program.err == ""
    saved = load_config(one_rank.folder / "config.yaml")
    assert saved.train.output_dir == one_rank.folder
    assert saved.train.gradient_accumulation_steps == 2


def test_two_ranks_learn_what_one_does(one_rank: Run, two_ranks: Run) -> None:
    assert two_ranks.code == 0, two_ranks.program.out
    check_folder(two_ranks, 2)
    assert losses(two_ranks.folder) == pytest.approx(losses(one_rank.folder), abs=1e-5)
    assert losses(two_ranks.folder)[2] < losses(two_ranks.folder)[0]
    saved = load_config(two_ranks.folder / "config.yaml")
    assert (saved.launch.nproc_per_node, saved.parallel.ep_size) == (2, 2)
    assert "Layout ep2-zero0 of 2 ranks" in two_ranks.program.out  # proven or not
    assert "Layout" not in one_rank.program.out


def test_a_layout_left_open_is_chosen_and_trains_the_same(config: Path) -> None:
    """On devices with so little memory that four ranks need a pipeline, recomputation and small micro-batches; as one
    process does with the same sequences in a step. The report has what was planned beside what was measured."""
    folder = config.parent / "auto"
    (config.parent / "small.yaml").write_text("gpu: cpu\nmemory_gb: 8.0e-4\n")
    words = ["balance.aux_loss_scope=sequence", "parallel.layout=auto", f"launch.cluster={config.parent}/small.yaml"]
    run = Program("moe-dist", "train", config, *words, "launch.nproc_per_node=4", f"train.output_dir={folder}")
    alone = config.parent / "auto-alone"
    steps = ["train.gradient_accumulation_steps=4", f"train.output_dir={alone}"]
    twin = Program("moe-dist", "train", config, *ONE_RANK, words[0], *steps)
    assert (run.end(), twin.end()) == (0, 0), (run.err, twin.err)
    assert "parallel.layout=auto on 4 ranks of cpu: pp2-1f1b-ep1-zero0-selective-mb1, 4 micro-" in run.out + run.err
    saved = load_config(folder / "config.yaml")
    layout = Layout.of(saved, saved.parallel.planned_ranks or 0)
    assert (layout.pp_size, layout.dp_size, saved.train.gradient_checkpointing) == (2, 2, "selective")
    assert losses(folder) == pytest.approx(losses(alone), abs=1e-5)
    report = Program("moe-dist", "report", folder)
    assert report.end() == 0
    assert "Planned" in (folder / "report.html").read_text()


def test_a_terminal_shows_a_live_line_and_is_left_sane(two_ranks: Run) -> None:
    text = two_ranks.program.out
    assert "\x1b[?25l" in text, "no live area was drawn"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is still hidden"
    assert text.endswith("\n")
    assert "3/3" in text
    assert str(two_ranks.folder) in text


def test_nobody_sees_the_libraries_talking(one_rank: Run, two_ranks: Run) -> None:
    for run in (one_rank, two_ranks):
        for text in (run.program.out, run.program.err):
            assert not [word for word in NOISE if word in text], text


@pytest.mark.launch
@pytest.mark.slow
def test_torchrun_starts_the_same_run(two_ranks: Run, torchrun_module: Run) -> None:
    assert torchrun_module.code == 0, torchrun_module.program.err
    check_folder(torchrun_module, 2)
    assert losses(torchrun_module.folder) == losses(two_ranks.folder)
    assert torchrun_module.program.out.count("step: 3/3") == 1
    ours = [line for line in torchrun_module.program.err.splitlines() if "Warning" in line or "moe-dist" in line]
    assert not ours


@pytest.mark.launch
@pytest.mark.slow
def test_two_agents_of_torchrun_start_the_same_run(two_ranks: Run, two_agents: list[Run]) -> None:
    for run in two_agents:
        assert run.code == 0, run.program.err
    check_folder(two_agents[0], 2)
    assert losses(two_agents[0].folder) == losses(two_ranks.folder)
    rows = (two_agents[0].folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["world_size"] == 2
    assert "step: 3/3" in two_agents[0].program.out
    assert two_agents[1].program.out == ""
