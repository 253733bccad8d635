"""The form of `trainer_state.json`: looked at as a whole before anything of a run is touched. Imports no torch.

Hashes tell that a file is the one that was written, not that it was written by a trainer. Keys that are not known here
are let pass: another version may have put them there.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_dist.checkpoint.storage.manifest import CheckpointError, Manifest
from moe_dist.config import Config

Count = Annotated[int, Field(ge=0, le=2**53)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Counts = list[Count]


class _Open(BaseModel):
    """Nothing converted; more keys than these may be there."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Counters(_Open):
    step: Count
    tokens: Count = 0
    skipped: Count = 0
    elapsed: Seconds = 0.0
    initial_loss: float | None = None
    saves_failed: Count = 0


class _Stopping(_Open):
    best_loss: float | None
    evaluations_without_improvement: Count
    has_learned: bool = True
    first_pace: Annotated[list[Count | None], Field(min_length=2, max_length=2)] | None = None


class _Stream(_Open):
    samples: Count
    documents: Count
    passes: Count
    corpus: dict[str, Any]
    buffer_tokens: Counts


class _Data(_Open):
    samples_consumed: Count
    num_samples: Count | None = None
    seed: int | None = None
    shuffle: bool | None = None
    stream: _Stream | None = None


class _Absence(_Open):
    intervals: Counts = []
    missed: Counts = []


class _Layer(_Open):
    levels: Counts
    wait: int
    lasted: dict[str, int]
    calm: int
    pairs: Counts
    absence: _Absence = _Absence()


class _State(_Open):
    counters: _Counters
    stopping: _Stopping
    data: _Data
    acting: dict[str, _Layer] | None = None
    config: dict[str, Any]


_OF_VERSIONS = ("extra_forbidden", "value_error", "missing", "literal_error")
"""What a configuration of another version may have: other keys, other words, other rules."""


def config_sha256(config: dict[str, Any]) -> str:
    """What the manifest says of the configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def check_trainer_state(state: Any, manifest: Manifest, where: str) -> dict[str, Any]:
    """`state` itself when it is one, of the manifest's step and configuration. Raises CheckpointError that names the
    first key that is wrong."""
    try:
        found = _State.model_validate(state)
        Config.model_validate(found.config)
    except ValidationError as error:
        in_config = error.title == Config.__name__
        wrong = [one for one in error.errors() if not (in_config and one["type"] in _OF_VERSIONS)]
        if wrong:
            key = ".".join(map(str, ("config",) * in_config + wrong[0]["loc"]))
            raise CheckpointError(f"{where}: {key or 'the whole'}: {wrong[0]['msg']}") from None
    if state["counters"]["step"] != manifest.step:
        raise CheckpointError(f"{where}: counters.step is {state['counters']['step']}, the manifest's {manifest.step}")
    if config_sha256(state["config"]) != manifest.config_sha256:
        raise CheckpointError(f"{where}: config is not the one that the manifest names (config_sha256)")
    return dict(state)
