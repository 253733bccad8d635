"""What `moe-dist verify` has proved on this machine: it writes it down, and `moe-dist train` shows it at the start.

One JSON file for all proofs of a person: `moe-dist/verify.json` in the folder for caches (XDG_CACHE_HOME, else
~/.cache). A proof counts for the same code, PyTorch, device and number of ranks. Loads no torch.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

import moe_dist
from moe_dist import versions
from moe_dist.config import Config

_KEPT = 50
"""Proofs in the file; the oldest go."""


def placement(config: Config) -> str:
    """How a run's state is spread over ranks, by the words of `moe-dist verify --layouts`: `pp2-1f1b-ep2-zero1`.

    Accumulation and recomputation are not in it: whatever they are, the same ranks hold the same things.
    """
    parallel = config.parallel
    words = [f"pp{parallel.pp_size}", parallel.schedule] if parallel.pp_size > 1 else []
    words += [f"ep{parallel.ep_size}", f"zero{parallel.zero_stage}"]
    words += [f"shard{parallel.shard_size}"] if parallel.shard_size is not None else []
    words += [parallel.dispatcher] if parallel.ep_size > 1 and parallel.dispatcher != "auto" else []
    return "-".join([*words, *([parallel.engine] if parallel.engine != "torch" else [])])


@cache
def code() -> str:
    """A hash of this package's source: a proof of other code proves nothing about this."""
    folder = Path(moe_dist.__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@dataclass(frozen=True)
class Proof:
    """What one `moe-dist verify` came to. A placement passed when every case with it did."""

    device: str
    """`cpu` or `cuda`."""
    world_size: int
    passed: list[str]
    failed: list[str]
    """Placements."""
    run: str = ""
    """The run file whose kind of model it was."""
    versions: dict[str, str] = field(default_factory=versions.arithmetic)
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))
    code: str = field(default_factory=code)

    @classmethod
    def of(cls, cases: Iterable[tuple[Config, bool]], device: str, world_size: int, run: str = "") -> Proof:
        """From every case, as the configuration that ran, and whether it passed."""
        verdicts: dict[str, bool] = {}
        for config, passed in cases:
            name = placement(config)
            verdicts[name] = passed and verdicts.get(name, True)
        names = {kept: sorted(name for name, passed in verdicts.items() if passed is kept) for kept in (True, False)}
        return cls(device, world_size, names[True], names[False], run)

    @property
    def sentence(self) -> str:
        """The versions it is about: `Python 3.11.7, torch 2.13.0+cpu, transformers 5.24.0, on cpu`."""
        return ", ".join([f"{name.replace('python', 'Python')} {said}" for name, said in self.versions.items()]) + (
            f", on {self.device}"
        )

    def is_about(self, device: str, world_size: int) -> bool:
        """Whether it counts for this code and PyTorch, on this device, for so many ranks."""
        recorded = (self.code, self.versions.get("torch"), self.device, self.world_size)
        return recorded == (code(), versions.installed("torch"), device, world_size)


_FILE = TypeAdapter(list[Proof])


def default_path() -> Path:
    """Where proofs are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-dist" / "verify.json"


def read(path: Path | None = None) -> list[Proof]:
    """All proofs, the newest last; none where there is no file, or one that is not understood."""
    try:
        return _FILE.validate_json((path or default_path()).read_bytes())
    except (OSError, ValidationError):
        return []


def write(proof: Proof, path: Path | None = None) -> Path:
    """Add a proof, and return the file it is in. Raises OSError where that cannot be written."""
    path = path or default_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.{os.getpid()}.part")
    whole.write_bytes(_FILE.dump_json([*read(path), proof][-_KEPT:], indent=1))
    whole.replace(path)
    return path


def line_for(config: Config, device: str, world_size: int, path: Path | None = None) -> str:
    """Whether a run's layout is proven here, in one sentence. The newest proof that names the layout decides."""
    name = placement(config)
    here = f"with torch {versions.installed('torch')} on {device}"
    for proof in reversed(read(path)):
        if not proof.is_about(device, world_size):
            continue
        of = f"{proof.date} ({proof.run}, {path or default_path()})" if proof.run else f"{proof.date}"
        if name in proof.failed:
            return f"Layout {name} of {world_size} ranks FAILED its proof {here} on {of}: see moe-dist verify"
        if name in proof.passed:
            return f"Layout {name} of {world_size} ranks was proven {here} on {of}."
    return f"Layout {name} of {world_size} ranks is not proven {here} yet; moe-dist verify proves it."
