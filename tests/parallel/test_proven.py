"""What was proven here is written down, and shown only for what it is a proof of."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from run_files import load

from moe_dist import versions
from moe_dist.config import Config
from moe_dist.parallel import proven
from moe_dist.parallel.proven import Proof

NAMES = {
    "ep1-zero0": "ep_size: 1",
    "ep2-zero3-shard2": "ep_size: 2, zero_stage: 3, shard_size: 2",
    "ep2-zero2-deepspeed": "ep_size: 2, zero_stage: 2, engine: deepspeed",
    "pp2-zero_bubble-ep2-zero1": "pp_size: 2, schedule: zero_bubble, ep_size: 2, zero_stage: 1",
}


def run(folder: Path, parallel: str, accumulation: int = 4) -> Config:
    return load(folder, f"parallel: {{{parallel}}}\ntrain: {{gradient_accumulation_steps: {accumulation}}}")[0]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", NAMES)
def test_a_placement_has_the_name_that_verify_gives_it(tmp_path: Path, name: str) -> None:
    assert proven.placement(run(tmp_path, NAMES[name])) == name


def test_what_passed_and_what_failed_is_shown(tmp_path: Path) -> None:
    """A placement passes when all its cases do. Planted: the last case decides."""
    good, bad, other = (run(tmp_path, NAMES[name]) for name in list(NAMES)[:3])
    cases = [(good, True), (bad, False), (replaced(bad, accumulation=1), True)]
    file = proven.write(Proof.of(cases, "cpu", 4, "configs/demo.yaml"))
    assert file == tmp_path / "cache" / "moe-dist" / "verify.json"
    torch = re.escape(str(versions.installed("torch")))
    said = [proven.line_for(config, "cpu", 4) for config in (good, bad, other)]
    day = r"20\d\d-\d\d-\d\d \(configs/demo.yaml, .*verify.json\)"
    assert re.fullmatch(rf"Layout ep1-zero0 of 4 ranks was proven with torch {torch} on cpu on {day}\.", said[0])
    assert re.match(rf"Layout ep2-zero3-shard2 of 4 ranks FAILED its proof with torch {torch} on cpu on {day}", said[1])
    assert "ep2-zero2-deepspeed of 4 ranks is not proven" in said[2]
    assert "moe-dist verify" in said[2]


def replaced(config: Config, accumulation: int) -> Config:
    changed = config.model_copy(deep=True)
    changed.train.gradient_accumulation_steps = accumulation
    return changed


@pytest.mark.parametrize(
    "other",
    [
        {"versions": {"torch": "2.10.0"}},
        {"code": "0" * 16},
        {"device": "cuda"},
        {"world_size": 8},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_proof_of_something_else_does_not_count(tmp_path: Path, other: dict) -> None:
    config = run(tmp_path, "ep_size: 2")
    proof = Proof.of([(config, True)], "cpu", 4)
    proven.write(replace(proof, **other))
    assert "is not proven" in proven.line_for(config, "cpu", 4)
    proven.write(proof)
    assert "was proven" in proven.line_for(config, "cpu", 4)
    assert len(proven.read()) == 2


def test_the_newest_proof_decides(tmp_path: Path) -> None:
    config = run(tmp_path, "ep_size: 2")
    for passed in (True, False):
        proven.write(Proof.of([(config, passed)], "cpu", 4))
    assert "FAILED" in proven.line_for(config, "cpu", 4)
    elsewhere = run(tmp_path, "ep_size: 4")
    proven.write(Proof.of([(elsewhere, True)], "cpu", 4))  # says nothing of the first
    assert "FAILED" in proven.line_for(config, "cpu", 4)


def test_a_damaged_file_is_no_proof_and_no_error(tmp_path: Path) -> None:
    config, path = run(tmp_path, "ep_size: 2"), tmp_path / "verify.json"
    for text in ("", "[{", '{"device": "cpu"}', '[{"device": "cpu"}]', "\udcff"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert "is not proven" in proven.line_for(config, "cpu", 4, path)
    proven.write(Proof.of([(config, True)], "cpu", 4), path)
    assert "was proven" in proven.line_for(config, "cpu", 4, path)


def test_the_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    proof = Proof.of([(run(tmp_path, "ep_size: 2"), True)], "cpu", 4)
    for number in range(52):
        path = proven.write(replace(proof, run=str(number)))
    assert [kept.run for kept in proven.read(path)] == [str(number) for number in range(2, 52)]


def test_a_proof_says_its_versions(tmp_path: Path) -> None:
    proof = Proof.of([(run(tmp_path, "ep_size: 2"), True)], "cpu", 4)
    assert re.fullmatch(
        r"Python 3\.\d+\.\d+, torch 2\.\S+, transformers 5\.\S+(, deepspeed \S+)?, on cpu", proof.sentence
    )
