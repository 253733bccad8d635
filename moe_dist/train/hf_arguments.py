"""What `transformers.TrainingArguments` asks for, in our keys. Imports no transformers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from enum import Enum
from typing import Any

from moe_dist.config import ALIASES, HOMES, ConfigError, show

logger = logging.getLogger("moe_dist")
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
    for name, strategy in (("eval_steps", "eval_strategy"), ("save_steps", "save_strategy")):
        if name in chosen and values.get(strategy) == "no":
            raise ConfigError(f"{name}={show(values[name])}: nothing is done with {strategy}='no'; set it to 'steps'")
    for name in chosen:
        if name.endswith("_token"):
            chosen[name] = f"<{name}>"  # a secret does not belong into an error, and from there into logs
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
    if found.get("report_to") in ([], ["tensorboard"]):
        found["tensorboard"] = bool(found.pop("report_to"))
    if found.pop("activation_checkpointing", False):  # its newer name
        found["gradient_checkpointing"] = True
    kwargs = [found.pop(f"{name}_checkpointing_kwargs", None) for name in ("activation", "gradient")]
    for said in filter(None, kwargs):  # each is a copy of the other
        if said != {"use_reentrant": False}:
            raise ConfigError(
                f"gradient_checkpointing_kwargs={show(said)}, or activation_checkpointing_kwargs: only "
                "use_reentrant=false"
            )
    if found.get("torch_compile_backend") == "inductor":  # the one there is; filled in beside torch_compile=True
        del found["torch_compile_backend"]
    if found.get("logging_first_step"):  # it always is
        del found["logging_first_step"]
    if found.pop("fp16", False):
        logger.warning(
            "TrainingArguments.fp16 is read as bf16: half precision needs loss scaling, which is not offered"
        )
        found["bf16"] = True
    if found.pop("use_cpu", False):
        found["device"] = "cpu"
    if found.pop("full_determinism", False):
        found["deterministic"] = True
    return found
