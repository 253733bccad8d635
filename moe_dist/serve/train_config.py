"""What a client may have trained: a configuration whose files all lie in one folder, and which runs no code of its own.

Every value is looked at before anything is read by it. Imports no torch.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_dist.config import Config, ConfigError, flatten, load_config, load_mapping, show
from moe_dist.config.names import CODE_KEYS, PATH_KEYS

_MUST_EXIST = ("base", "data.name", "data.tokenizer", "lora.from_adapter", "model.from", "model.from_pretrained")
"""Else these would be names on a hub."""
_NO_PATHS = {"data.tokenizer": ("bytes",), "checkpoint.resume": ("auto", "never")}


def read_config(config: str | dict[str, Any], overrides: Sequence[str], folder: Path, *, own_code: bool) -> Config:
    """A run file in `folder`, or what one would hold, with overrides; its paths are whole ones. Raises ConfigError.

    `own_code`: whether classes by `package.module:Class` are allowed.
    """
    confined = _Confined(folder, own_code)
    how: dict[str, Any] = {"notice": _unheard, "admit": confined}
    if isinstance(config, dict):
        found = load_mapping(config, overrides, **how)
    else:
        found = load_config(confined("config", config), overrides, **how)
    for key, value in flatten(found).items():  # whatever way it has come
        confined(key, value)
    return found


def _unheard(text: str) -> None:
    pass


def _only_rows(key: str, tasks: Any) -> None:
    for text in tasks if isinstance(tasks, list) else [tasks]:
        if not (isinstance(text, str) and text.endswith(".jsonl") and "=" not in text):
            raise ConfigError(
                f"{key}={show(text)}: FILE.jsonl is allowed; one of lm-evaluation-harness can run code (--train-code)"
            )


class _Confined:
    """Every value on its way into a configuration: paths become whole ones within `folder`."""

    def __init__(self, folder: Path, own_code: bool) -> None:
        self.folder, self.own_code = folder.resolve(), own_code

    def __call__(self, key: str, value: Any) -> Any:
        if key in CODE_KEYS and not self.own_code:
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and ":" in text:
                    raise ConfigError(f"{key}={show(text)}: classes of one's own are not allowed here (--train-code)")
        if key in PATH_KEYS or key in ("base", "config", "model.from"):
            value, given = self._paths(key, value), value
            if key == "train.eval_tasks" and not self.own_code:
                _only_rows(key, given)
        return value

    def _paths(self, key: str, value: Any) -> Any:
        if key == "parallel.deepspeed_config" and isinstance(value, dict):
            return value  # the file's content
        if isinstance(value, list):
            return [self._paths(key, item) for item in value]
        if isinstance(value, dict):
            return {name: self._paths(key, item) for name, item in value.items()}
        if not isinstance(value, str) or value in _NO_PATHS.get(key, ()):
            return value
        if key == "checkpoint.resume" and value.isdecimal():
            return value
        return self._path(key, value)

    def _path(self, key: str, text: str) -> str:
        wrong = ConfigError(f"{key}={show(text)}: a path within the folder of this server's trainings is allowed")
        if not text or "\0" in text or "${" in text or text.startswith("~") or "://" in text:
            raise wrong
        path, is_pattern = self.folder / text, glob.has_magic(text)
        if is_pattern and ".." in path.parts:
            raise wrong
        try:
            found = glob.glob(str(path), recursive=True) if is_pattern else []
            real = [os.path.realpath(one) for one in (str(path), *found)]
            exists = os.path.exists(path)
        except (OSError, ValueError):  # too long, half a surrogate pair
            raise wrong from None
        if not all(Path(one).is_relative_to(self.folder) for one in real):
            raise wrong
        if key in _MUST_EXIST and not exists:
            raise ConfigError(f"{key}={show(text)}: there is no such path in the folder of this server's trainings")
        return str(path) if is_pattern else real[0]
