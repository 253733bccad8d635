"""Ranks that prove, started again when one of them dies of a case. Imports no torch."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from launcher.connect.environment import detect, started_by_torchrun
from launcher.connect.exit_codes import EXIT_DIFFERS, EXIT_FAILED
from launcher.connect.rank_job import Proof
from moe_dist.config import Config, ConfigError, ParallelConfig
from moe_dist.verify.bugs import BUGS
from moe_dist.verify.cases import GROUPS, choose
from moe_dist.verify.scenarios import Smallness

_STARTS = 20
"""A mistake that ends ranks in more cases than this is known by then."""


def prove(config: Config, proof: Proof, world_size: int) -> int:
    """Returns the exit code. Raises ConfigError for what cannot be asked."""
    if proof.plant is not None and proof.plant not in BUGS:
        raise ConfigError(f"--inject-bug {proof.plant}: not a known bug; allowed: {', '.join(BUGS)}")
    config.parallel = ParallelConfig()  # layouts have their own
    if started_by_torchrun():
        from launcher.rank.worker import run_under_torchrun

        run_under_torchrun(config, detect(), proof)
    if proof.layouts not in GROUPS:
        choose(Smallness(config, world_size, proof.plant), proof.layouts)
    config.launch.nproc_per_node = world_size
    from launcher.backends.local import launch

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # stacks of its stores, when a case ends ranks
    with tempfile.TemporaryDirectory(prefix="moe-dist-verify-") as folder:
        file = Path(folder) / "verdicts.jsonl"
        proof = replace(proof, file=str(file))
        for _ in range(_STARTS):
            code = launch(config, proof)
            if code != EXIT_FAILED or not _ended_in_a_case(file):
                break
    return EXIT_FAILED if code == EXIT_DIFFERS else code


def _ended_in_a_case(file: Path) -> bool:
    """Whether a case has begun that has no verdict."""
    lines = file.read_text().splitlines() if file.exists() else []
    return bool(lines) and "begun" in json.loads(lines[-1])
