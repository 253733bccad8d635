"""What `transformers.TrainingArguments` asks for, in our keys. Imports no transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any

from moe_dist.config_loading import ALIASES, HOMES, ConfigError

NOT_FOR_US = {"do_train", "do_eval", "do_predict"}
"""For scripts around Hugging Face's Trainer, which does not read them either."""


def settings_of(arguments: Any) -> dict[str, Any]:
    """A mapping as it is; of a `TrainingArguments` every value that has a key here.

    Its values count, those nobody has chosen too: they are what Hugging Face's Trainer would train with. What has no
    key here must be as in a fresh one, else it stays in the answer, and reading it as a configuration refuses it by
    name. Raises ConfigError for anything else than these two.
    """
    if isinstance(arguments, Mapping):
        return dict(arguments)
    if not dataclasses.is_dataclass(arguments) or not hasattr(arguments, "output_dir"):
        raise ConfigError(
            f"training_config={arguments!r:.60}: a mapping, or a transformers.TrainingArguments, "
            f"not {type(arguments).__name__}"
        )
    # Its own defaults are not those of the fields: __post_init__ fills in many.
    fresh = type(arguments)(output_dir=arguments.output_dir)  # type: ignore[call-arg, misc]
    values = {field.name: _plain(getattr(arguments, field.name)) for field in dataclasses.fields(arguments)}
    chosen = {name: value for name, value in values.items() if value != _plain(getattr(fresh, name))}
    known = {name: value for name, value in values.items() if name in HOMES and value is not None}
    # An alias is another trainer's key: the 30 minutes of ddp_timeout nobody has chosen are not launch.timeout.
    found = known | {name: value for name, value in chosen.items() if name in ALIASES or name not in HOMES}
    return _same_meaning(found, values)


def _plain(value: Any) -> Any:
    """A number or text instead of a member of an enumeration, and whole numbers as such: 0.0 steps are 0."""
    value = value.value if isinstance(value, Enum) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _same_meaning(found: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that have no twin here but say something that can be said."""
    found = {name: value for name, value in found.items() if name not in NOT_FOR_US}
    if values.get("save_strategy") == "no":
        del found["save_strategy"]
        found |= {"save_steps": 0, "save_at_end": False}
    if values.get("eval_strategy") == "no":
        found["eval_steps"] = 0
    elif found.get("eval_strategy") == "steps":
        del found["eval_strategy"]
    if found.get("metric_for_best_model") == "loss":
        found["metric_for_best_model"] = "eval_loss"
    if found.get("report_to") == ["tensorboard"]:
        del found["report_to"]
        found["tensorboard"] = True
    if found.pop("activation_checkpointing", False):  # its newer name
        found["gradient_checkpointing"] = True
    if found.pop("use_cpu", False):
        found["device"] = "cpu"
    if found.pop("full_determinism", False):
        found["deterministic"] = True
    return found
