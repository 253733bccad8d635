"""A configuration from the text of a run file, and the one line an impossible one ends with."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_dist.config import Config, ConfigError, load_config


def load(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> tuple[Config, list[str]]:
    """The configuration in `text`, and the notices on the way."""
    file = folder / "run.yaml"
    file.write_text(text)
    notices: list[str] = []
    return load_config(file, overrides, notice=notices.append), notices


def get(config: Config, key: str) -> object:
    section, _, leaf = key.partition(".")
    return getattr(getattr(config, section), leaf)


def complaint(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1200
    return message
