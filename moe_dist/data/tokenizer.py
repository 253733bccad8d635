"""Tokenizers: the built-in byte tokenizer, or any that `transformers.AutoTokenizer` loads."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

TokenIds = Sequence[int] | npt.NDArray[Any]


class Tokenizer(Protocol):
    """What the rest of the package needs to know of a tokenizer.

    A tokenizer may also have `encode_batch(texts) -> list of ids` (used when there) and
    `fingerprint: str`, equal exactly when two tokenizers encode alike (needed by the cache of `pack`).
    """

    name: str
    vocab_size: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> TokenIds:
        """Token ids of `text`, each in [0, vocab_size), without any special token added."""

    def decode(self, ids: TokenIds) -> str:
        """The text of `ids`, special tokens left out."""


class ByteTokenizer:
    """One token per UTF-8 byte (0 to 255), then end of document 256 and padding 257.

    Needs no files and no training, loses nothing, and makes sequences about four times longer than BPE.
    """

    name = "bytes"
    fingerprint = None
    """Reading a cache would take as long as encoding."""
    vocab_size = 258
    eos_id = 256
    pad_id = 257

    def encode(self, text: str) -> npt.NDArray[np.uint8]:
        """UTF-8 bytes of `text`, (num_bytes,) uint8."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: TokenIds) -> str:
        """Text of `ids`; ids that are no byte are left out, broken UTF-8 becomes U+FFFD."""
        values = np.asarray(ids, dtype=np.int64).reshape(-1)
        return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer of `transformers` behind the `Tokenizer` protocol.

    `vocab_size` is one more than the largest id the tokenizer can give (added tokens included). Padding falls
    back to the end-of-document token, which is safe because padded positions never carry a label.
    Raises ValueError for a tokenizer without an end-of-document token.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {name!r} has no eos token, and packing separates documents with it: set "
                f"'eos_token' in its tokenizer_config.json (it has: {tokenizer.special_tokens_map})"
            )
        self._tokenizer = tokenizer
        self.name = name
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # A slow tokenizer has no serialised form to compare: no fingerprint, hence no cache.
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest() if backend is not None else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no special tokens added (those spelled out in the text are recognised)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; fast tokenizers work on all cores (TOKENIZERS_PARALLELISM)."""
        ids: list[list[int]] = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # documents longer than the model's context are ordinary here: they get packed
        )["input_ids"]
        return ids

    @property
    def inner(self) -> Any:
        """The tokenizer of `transformers`."""
        return self._tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can be asked."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, by the tokenizer's template, up to where the assistant's turn begins.

        `messages`: `{"role": "system" | "user" | "assistant", "content": text}` each. Raises ValueError without a
        template, and for what it refuses.
        """
        if not self.has_chat_template:
            raise ValueError(f"tokenizer {self.name!r} has no chat template: it was not made for conversations")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # of jinja, in the words of whoever wrote the template
            raise ValueError(f"the chat template of {self.name!r} refuses this: {error}") from error
        return self.encode(text)

    def decode(self, ids: TokenIds) -> str:
        """Text of `ids`, special tokens left out and spaces as they were."""
        values = np.asarray(ids, dtype=np.int64).reshape(-1).tolist()
        return str(self._tokenizer.decode(values, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "bytes", a folder, or a model name on the Hugging Face Hub.

    A folder is read without touching the network, and code that comes with a tokenizer is never run.
    Raises ValueError naming `name` when nothing loads, or when the tokenizer has no eos token.
    """
    if name == "bytes":
        return ByteTokenizer()
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    is_folder = folder.is_dir()
    here = is_folder or not _hub_is_reachable()
    try:
        with _quiet_hub():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder) if is_folder else name, local_files_only=here, trust_remote_code=False
            )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for a bad name or folder
        found = (
            f"the folder holds {sorted(entry.name for entry in folder.iterdir())[:8]}"
            if is_folder
            else "there is no such folder, and it could not be had from the Hub"
        )
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"tokenizer {name!r} cannot be loaded: {found} ({type(error).__name__}: {first_line}). Give "
            "'bytes', a folder with tokenizer.json and tokenizer_config.json, or a Hub name; "
            "tools/train_tokenizer.py makes such a folder"
        ) from error
    return HuggingFaceTokenizer(tokenizer, name)


def _hub_is_reachable() -> bool:
    """Whether asking the Hub makes sense: a name that nobody can resolve would be asked for, again and again, for a
    minute. With a proxy, it is the proxy that resolves names.
    """
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without a line for every try of huggingface_hub: what matters is in the error."""
    hub = logging.getLogger("huggingface_hub")
    before = hub.level
    hub.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        hub.setLevel(before)
