"""One typed tree: the YAML file.

Every key a person can write is a field of a section (`sections/`), with its meaning beside it. Model keys are those of
Hugging Face's Qwen3-MoE `config.json`; training keys are those of `TrainingArguments`. Nothing here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from moe_dist.config.attributes import read, write
from moe_dist.config.checks import check_sections
from moe_dist.config.sections.all import Sections


class Config(Sections):
    """A run: everything `moe-dist train` needs to know."""

    _sections_fit_together = model_validator(mode="after")(check_sections)

    if not TYPE_CHECKING:  # a misspelt section is an error of types all the same

        def __getattr__(self, name: str) -> Any:
            """A key without its section, or by the name another trainer has for it: `config.batch_size`."""
            if name.startswith("_"):
                return super().__getattr__(name)  # pydantic's own
            return read(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """`config.batch_size = 16` as `train.per_device_train_batch_size: 16` in a file: checked, with the rest."""
        if name.startswith("_") or name in type(self).model_fields:
            super().__setattr__(name, value)
            return
        write(self, name, value)
