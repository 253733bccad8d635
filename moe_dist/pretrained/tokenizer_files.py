"""The tokenizer beside an exported model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from moe_dist.config import Config
from moe_dist.data.tokenizer import load_tokenizer

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer that there are."""
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)


def write_tokenizer(config: Config, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Copy a tokenizer that is a folder. Returns the ids of special tokens, and what people should know."""
    name = config.data.tokenizer
    source = Path(name).expanduser()
    notes = []
    if name != "bytes":
        copy_tokenizer(source, folder)
    if name == "bytes":
        notes.append("tokens are UTF-8 bytes (data.tokenizer=bytes): Hugging Face has no such tokenizer, none is there")
    elif not source.is_dir():
        notes.append(f"the tokenizer {name} is no folder here: its files are not in the export")
    try:
        tokenizer = load_tokenizer(name)
    except (ValueError, ImportError) as error:
        return {}, [*notes, f"the ids of its special tokens are not in config.json: {error}"]
    return {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}, notes
