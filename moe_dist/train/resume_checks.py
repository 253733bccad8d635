"""What may differ between a checkpoint and the run that goes on from it, and what is said of it.

Each check raises CheckpointError, on every rank, for what may not.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

from moe_dist.checkpoint.config_diff import GLOBAL_BATCH, changes, micro_batch_change
from moe_dist.checkpoint.manager import Loaded
from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.config import Config
from moe_dist.data.identity import difference
from moe_dist.train.stopping import Stopping


def check_config(loaded: Loaded, config: Config, dp_size: int, message: Callable[[str], None]) -> None:
    """Show what is configured otherwise than in the checkpoint; refuse what changes the arithmetic."""
    layout = loaded.manifest.layout
    saved_dp = layout["edp"] * layout["ep"]
    before, now = loaded.trainer_state["config"], config.model_dump(mode="json")
    found = changes(before, now, saved_dp, dp_size)
    serious = [change for change in found if not change.free]
    if serious and not config.checkpoint.allow_config_change:
        keeps = ""
        if saved_dp != dp_size and any(change.key == GLOBAL_BATCH for change in serious):
            keeps = f" (on {dp_size} replicas instead of {saved_dp} parallel.elastic=true keeps the global batch)"
        raise CheckpointError(
            f"{'; '.join(map(str, serious))}: {loaded.checkpoint} was trained otherwise; set it back{keeps}, or go on "
            "with checkpoint.allow_config_change=true, or start afresh with checkpoint.resume=never"
        )
    if (text := micro_batch_change(before, now)) is not None:
        message(text)
    shown = [change for change in found if not change.key.startswith(("monitor.", "launch.", "checkpoint."))]
    if shown:
        message(f"configured otherwise than {loaded.checkpoint.folder}: {'; '.join(map(str, shown))}")


def check_model(loaded: Loaded, pretrained: dict[str, Any] | None) -> None:
    """Adapters belong to one model: the weights that were read from its folder, `pretrained`, must not be others."""
    saved, now = loaded.trainer_state.get("pretrained") or {}, pretrained or {}
    if saved.get("files") != now.get("files"):
        wrong = sorted({name for name, _ in set(saved.get("files", {}).items()) ^ set(now.get("files", {}).items())})
        raise CheckpointError(
            f"model.from_pretrained={now.get('folder')}: {wrong[0]} is not what the adapters of {loaded.checkpoint} "
            f"were trained on ({saved.get('folder')}); give that model"
        )


def check_reference(loaded: Loaded, config: Config, adapters: Set[str]) -> None:
    """`dpo.reference: auto` must not leave adapters out of the reference that come from another training.

    `adapters`: names in a checkpoint of those that the run has.
    """
    before = loaded.trainer_state["config"].get("data", {}).get("format")
    is_other = config.learns_preferences and before != config.data.format
    if is_other and config.dpo.reference == "auto" and adapters & loaded.manifest.tensors.keys():
        raise CheckpointError(
            f"dpo.reference=auto: {loaded.checkpoint} has adapters of another training; say whether the reference is "
            "the model with them (start) or without them (base)"
        )


def check_data(
    loaded: Loaded, corpus: dict[str, Any], order: str | None, config: Config, warn: Callable[[str], None]
) -> None:
    """The training data and its order must be what they were, unless the configuration allows others.

    `corpus`: identities of the data of this run; `order`: in what its order is another.
    """
    data, allowed = data_change(loaded, corpus, "train"), config.checkpoint.allow_config_change
    if data is not None:
        data = f"the training data is not what it was: {data}" + (f" ({order})" if order else "")
        if config.data.on_change == "stop" and not allowed:
            raise CheckpointError(
                f"{data}; {loaded.checkpoint} was trained on it: bring it back, or go on with data.on_change=warn"
            )
        allowed = True
        warn(data)
    if order is not None and not allowed:
        raise CheckpointError(
            f"{order}: some samples would be repeated and others left out; set it back, or go on in the new order "
            "with checkpoint.allow_config_change=true"
        )


def data_change(loaded: Loaded, corpus: dict[str, Any], part: str) -> str | None:
    """In what the training or validation data (`part`) is not what the checkpoint was made with."""
    saved, now = loaded.trainer_state.get("corpus", {}).get(part), corpus.get(part)
    return None if saved is None or now is None else difference(saved, now)


def end_change(before: Stopping, now: Stopping) -> str | None:
    """For people: the run ends at another step than with the batch and the data of the checkpoint."""
    if before.max_steps == now.max_steps:
        return None
    names = ("global batch size", "samples in an epoch")
    words = [
        f"{name}={one} (saved with {other})"
        for name, one, other in zip(names, now.pace, before.pace, strict=True)
        if one != other
    ]
    return (
        f"{', '.join(words)}: epochs are counted in samples, the run ends at step {now.max_steps}, not "
        f"{before.max_steps}; the learning rate goes on where it was"
    )
