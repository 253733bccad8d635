"""How many tokens a tokenizer knows, without loading it. Imports nothing heavy, for `moe-dist check`."""

from __future__ import annotations

import json
from pathlib import Path

BYTES = 258
"""Of the tokenizer `bytes`, which stands in `data`, a room of its own: every byte, the end of a document, padding."""


def vocabulary_needed(name: str) -> int | None:
    """`vocab_size` that `data.tokenizer` asks for: of `bytes`, and of folders with tokenizer.json; else None."""
    if name == "bytes":
        return BYTES
    try:
        tree = json.loads((Path(name).expanduser() / "tokenizer.json").read_text("utf-8"))
        vocabulary = tree["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return 1 + max([*ids, *(token["id"] for token in tree.get("added_tokens", []))])
    except (OSError, ValueError, KeyError, TypeError):
        return None
