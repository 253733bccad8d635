"""`moe-dist --help`, `train --help` and `check`: instant, light and to the point; mistakes are one line and 2."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from programs import BIN, ONE_RANK, Program

from moe_dist.config import load_config

DEMO = str(Path(__file__).parents[3] / "configs" / "demo.yaml")
HEAVY = ("torch", "ray", "deepspeed", "transformers", "datasets", "numpy")
PLAN = ("plan", DEMO, "--gpu", "cpu", "--gpus", "8")
INSTANT = [("--help",), ("train", "--help"), ("check", DEMO), ("check", DEMO, "--json")]


def moe_dist(*arguments: str, width: int = 200) -> subprocess.CompletedProcess[str]:
    """Run to the end; stdout and stderr as text."""
    return subprocess.run(
        [BIN / "moe-dist", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "COLUMNS": str(width)},
    )


@pytest.mark.parametrize("arguments", INSTANT, ids=" ".join)
def test_answers_at_once(arguments: tuple[str, ...]) -> None:
    spent = []
    for _ in range(2):  # the first call may compile
        process = subprocess.Popen([BIN / "moe-dist", *arguments], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        spent.append(usage.ru_utime + usage.ru_stime)
    assert min(spent) < 1.5


class Light(NamedTuple):
    """A command that has ended and imported nothing heavy: it has answered at once, whatever the clock says."""

    code: int
    out: str
    err: list[str]


def light(*arguments: str) -> Light:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "launcher", *arguments], capture_output=True, text=True, timeout=120
    )
    lines = done.stderr.splitlines()
    told = [line for line in lines if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in told}
    assert "pydantic" in imported, "the list of imports was not read"
    assert not imported & set(HEAVY)
    return Light(done.returncode, done.stdout, [line for line in lines if line not in told])


@pytest.mark.parametrize("arguments", [*INSTANT, PLAN], ids=" ".join)
def test_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert light(*arguments).code == 0


def test_help_says_how_to_start() -> None:
    text = moe_dist("--help").stdout
    for words in ("train", "check", "moe-dist train configs/demo.yaml", "130 Ctrl-C"):
        assert words in " ".join(text.split())
    assert moe_dist().stdout.strip() == text.strip()
    for command in ("train", "check"):
        text = moe_dist(command, "--help").stdout
        assert "CONFIG" in text
        assert f"moe-dist {command} configs/demo.yaml" in text
    assert moe_dist("--version").stdout.startswith("moe-dist ")
    assert moe_dist("-v").stdout == moe_dist("--version").stdout


LAYOUT_4 = """\
experts 0-7 8-15
replica 0 rank 0 rank 1
replica 1 rank 2 rank 3
pp 1 x edp 2 x ep 2 = 4 ranks; dense parameters on every rank of dp 4
dispatcher: dedup (0.75 instead of 1.00 rows of a token leave its rank, 25% fewer)

axis size groups of ranks ranks of a group ...
ep 2 [0,1] [2,3] share out the experts of every layer
edp 2 [0,2] [1,3] hold the same experts
dp 4 [0-3] hold the same dense parameters, see different data
pp 1 [0] [1] [2] [3] hold successive stages

parameters"""
LAYOUT_16 = """\
experts 0-1 2-3 4-5 6-7 8-9 10-11 12-13 14-15
replica 0 rank 0 rank 1 rank 2 rank 3 rank 4 rank 5 rank 6 rank 7
replica 1 rank 8 rank 9 rank 10 rank 11 rank 12 rank 13 rank 14 rank 15
pp 1 x edp 2 x ep 8 = 16 ranks; dense parameters on every rank of dp 16
dispatcher: all_to_all (dedup would spare 6% of the rows that leave a rank)

axis size groups of ranks ranks of a group ...
ep 8 [0-7] [8-15] share out the experts of every layer
edp 2 [0,8] [1,9] [2,10] [3,11] [4,12] [5,13] [6,14] [7,15] hold the same experts
dp 16 [0-15] hold the same dense parameters, see different data
pp 1 [0] [1] [2] [3] [4] [5] [6] [7] ... 16 groups hold successive stages

parameters"""


@pytest.mark.parametrize(("world", "ep_size", "wanted"), [(4, 2, LAYOUT_4), (16, 8, LAYOUT_16)])
def test_check_shows_groups_and_experts(world: int, ep_size: int, wanted: str) -> None:
    done = moe_dist("check", DEMO, f"--world-size={world}", f"parallel.ep_size={ep_size}")
    assert done.returncode == 0, done.stderr
    text = "\n".join(" ".join(line.split()) for line in done.stdout.splitlines())
    assert wanted in text
    assert f"8 x 1 accumulated x {world} data parallel" in text


def test_check_never_breaks_a_group_of_ranks() -> None:
    text = moe_dist("check", DEMO, "-n", "16", "parallel.ep_size=8", width=72).stdout
    for first in range(8):
        assert f"[{first},{first + 8}]" in text


def test_check_shows_the_whole_configuration(tmp_path: Path) -> None:
    done = moe_dist("check", DEMO, "--show-config", "optimizer.learning_rate=0.125")
    assert done.returncode == 0
    (tmp_path / "shown.yaml").write_text(done.stdout)
    assert load_config(tmp_path / "shown.yaml") == load_config(DEMO, ["optimizer.learning_rate=0.125"])


def test_check_tells_programs_the_same() -> None:
    stages = ("parallel.pp_size=2", "train.gradient_accumulation_steps=2")
    done = moe_dist("check", DEMO, "--json", "-n", "4", *stages)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    shown = moe_dist("check", DEMO, "-n", "4", *stages).stdout
    assert told["groups"]["pp"] == [[0, 2], [1, 3]]
    assert [stage["layers"] for stage in told["stages"]] == [[0, 1], [2, 3]]
    numbers = [told["parameters"], told["active_parameters"], told["flops_per_token"]]
    numbers += [
        number for stage in told["stages"] for number in (stage["parameters"]["total"], stage["bytes"]["total"])
    ]
    for number in numbers:
        assert f"{number:,}" in shown
    whole = json.loads(moe_dist("check", DEMO, "--json", "--show-config").stdout)
    assert whole["model"]["num_experts"] == 16


@pytest.mark.parametrize(
    ("typed", "offered", "not_offered"),
    [
        ("tra", ["train"], ["check"]),
        ("check DEMO --js", ["--json"], []),
        ("train DEMO train.max_s", ["train.max_steps="], ["max_steps="]),
        ("train DEMO seed=1 learn", ["learning_rate="], []),
        ("launch slurm DEMO model.num_exp", ["model.num_experts=", "model.num_experts_per_tok="], []),
        ("train conf", [], ["config_name="]),  # a file comes here, and files are the shell's
    ],
)
def test_tab_completes(typed: str, offered: list[str], not_offered: list[str]) -> None:
    words = f"moe-dist {typed}".replace("DEMO", DEMO)
    variables = {"_MOE_DIST_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(
        [BIN / "moe-dist"], capture_output=True, text=True, timeout=60, env={**os.environ, **variables}
    )
    found = done.stdout.split()
    assert set(offered) <= set(found)
    assert not set(not_offered) & set(found)


def test_init_lays_down_and_keeps_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert light("init", str(folder)).code == 0
    assert (folder / "demo.yaml").read_bytes() == Path(DEMO).read_bytes()
    (folder / "demo.yaml").write_text("mine")
    (folder / "monitoring").mkdir()
    (folder / "monitoring" / "alerts.yml").symlink_to(tmp_path / "nowhere")
    done = light("init", str(folder), "--template=slurm")
    assert done.code == 0
    assert (folder / "demo.yaml").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    assert f"kept, was there  {folder / 'demo.yaml'}" in done.out
    assert (folder / "slurm/train.sbatch").is_file()
    done = light("init", str(folder / "demo.yaml"))
    assert (done.code, done.out) == (2, "")
    assert done.err == [f"moe-dist: error: {folder / 'demo.yaml'}: a file; moe-dist init needs a folder of that name"]


MISTAKES = {
    "impossible world": (("check", DEMO, "-n", "3"), "world_size=3"),
    "impossible world to train": (("train", DEMO, "launch.nproc_per_node=3"), "world_size=3"),
    "experts do not divide": (("train", DEMO, "parallel.ep_size=5"), "parallel.ep_size=5"),
    "unknown key": (("train", DEMO, "train.max_step=5"), "max_step"),
    "wrong type": (("train", DEMO, "train.max_steps=many"), "max_steps"),
    "missing file": (("train", "nowhere.yaml"), "nowhere.yaml"),
    "a key of another trainer": (
        ("train", DEMO, "qlora_r=8"),
        "qlora_r=8: not offered yet; there is: lora.quantize=nf4",
    ),
    "unknown template": (("init", "--template=x"), "'x' is not one of 'demo', 'pretrain'"),
    "unknown command": (("trian", DEMO), "trian"),
    "no file": (("train",), "CONFIG"),
    "a number in letters": (("check", DEMO, "-n", "two"), "-n two: give a whole number"),
    "a number in letters, long": (("verify", DEMO, "--world-size=two"), "--world-size two: give a whole number"),
    "a small vocabulary": (
        ("check", DEMO, "model.vocab_size=100"),
        "model.vocab_size=100: the tokenizer bytes needs 258",
    ),
    "port": (("train", DEMO, "launch.master_port=70000"), "launch.master_port=70000"),
}


@pytest.mark.parametrize(("arguments", "named"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, ...], named: str) -> None:
    done = light(*arguments)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err
    assert line.startswith("moe-dist: error: ")
    assert named in line


def test_a_taken_port_is_said_at_once(config: Path) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        done = light("train", str(config), f"launch.master_port={port}")
    assert done.code == 2
    (line,) = done.err
    assert f"launch.master_port={port}: in use" in line


def unread(*arguments: str, with_errors: bool = False) -> tuple[int, str]:
    """Exit code and standard error of a command whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "launcher", *arguments]
    done = subprocess.run(
        words, stdout=writer, stderr=writer if with_errors else subprocess.PIPE, text=True, timeout=120
    )
    os.close(writer)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", DEMO),
        ("check", DEMO, "--show-config"),
        ("--help",),
        ("launch", "--help"),
        ("-v",),
        ("launch", "k8s", DEMO, "--dry-run"),
        ("init", "FOLDER"),
    ],
    ids=" ".join,
)
def test_what_prints_ends_quietly_without_a_reader(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """As SIGPIPE would end it. Without care it was 1."""
    words = [str(tmp_path / "new") if word == "FOLDER" else word for word in arguments]
    code, said = unread(*words)
    assert code == 141
    assert all(line.startswith("note: ") for line in said.splitlines())


def test_a_mistake_without_a_reader_is_still_exit_code_2() -> None:
    """Seen to fail with `print` in place of `complain`: 141."""
    assert unread("check", "nowhere.yaml", with_errors=True) == (2, "")


@pytest.mark.dist
def test_ranks_that_print_end_quietly_without_a_reader(config: Path, tmp_path: Path) -> None:
    """Training goes on without a reader, a profile does not."""
    options = (*ONE_RANK, f"train.output_dir={tmp_path / 'run'}")
    assert unread("profile", str(config), "--steps=1", *options) == (141, "")
    code, said = unread("train", str(config), *options)
    assert code == 0
    assert "console failed" in said


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "option", "named"),
    [
        (1, "data.path=/nowhere/*.txt", "'/nowhere/*.txt' matches no file"),
        (2, "model.vocab_size=200", "model.vocab_size=200"),
        (2, "prometheus={port: 0, bearer_token: /nowhere}", "monitor.prometheus.bearer_token=/nowhere: cannot be read"),
    ],
)
def test_what_only_ranks_see_is_one_line_too(config: Path, tmp_path: Path, ranks: int, option: str, named: str) -> None:
    alone = ONE_RANK if ranks == 1 else ()
    program = Program("moe-dist", "train", config, *alone, option, f"train.output_dir={tmp_path / 'run'}")
    assert program.end() == 2
    (line,) = program.err.splitlines()
    assert line.startswith("moe-dist: error: ")
    assert named in line
    assert program.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.dist
def test_under_torchrun_one_rank_speaks_for_all(config: Path, tmp_path: Path) -> None:
    ours = ("-m", "moe_dist", "train", config, "model.vocab_size=200", f"train.output_dir={tmp_path / 'run'}")
    program = Program("torchrun", "--standalone", "--nproc-per-node=2", *ours, GLOO_SOCKET_IFNAME="lo")
    assert program.end() == 1
    assert program.err.count("moe-dist: error: model.vocab_size=200") == 1
