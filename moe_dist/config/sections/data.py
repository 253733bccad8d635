"""What is trained on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from moe_dist.config.paths import PathText
from moe_dist.config.sections.base import (
    Choice,
    NonNegative,
    Positive,
    Section,
)

FILE_SOURCES = ("text", "jsonl", "parquet")
SourceName = Annotated[str, AfterValidator(Choice("stdlib", *FILE_SOURCES, "huggingface", "memory"))]
MAX_DOMAINS = 16
"""Named sources of data whose routing is counted apart."""


Format = Literal["auto", "text", "chat", "prompt_completion", "instruction", "preference"]


def file_source(path: object) -> str:
    """The source that reads such files, by the names of the first."""
    while isinstance(path, (list, dict)):
        path = next(iter(path.values() if isinstance(path, dict) else path), "")
    name = str(path).removesuffix(".gz")
    return next((kind for kind in ("jsonl", "parquet") if name.endswith(f".{kind}")), "text")


def _texts(path: Any) -> list[str]:
    """Every pattern in a value of `data.path`."""
    if isinstance(path, dict):
        return [text for item in path.values() for text in _texts(item)]
    return [] if path is None else [str(path)] if isinstance(path, str) else [str(item) for item in path]


def check_data(data: DataConfig) -> DataConfig:
    """A source with what it reads from, and nothing that it would not read."""
    if data.source in FILE_SOURCES and not data.path:
        raise ValueError(f"path=null: source={data.source} needs data.path (a file or a pattern)")
    if data.path and data.source not in FILE_SOURCES:
        raise ValueError(
            f"path={data.path}: source={data.source} reads no files; set data.source={file_source(data.path)} "
            f"(one of {', '.join(FILE_SOURCES)}), or data.path=null"
        )
    for key in ("path", "validation_path"):
        if url := next((text for text in _texts(getattr(data, key)) if "://" in text), None):
            raise ValueError(
                f"{key}={url}: files are read from this machine's folders; copy or mount it here, or give a dataset by "
                "data.source=huggingface data.name=..."
            )
    if isinstance(data.path, dict) and len(data.path) > MAX_DOMAINS:
        raise ValueError(
            f"path: {len(data.path)} names; routing is counted for each, at most {MAX_DOMAINS} (a name may have a list)"
        )
    if data.source == "huggingface" and not data.name:
        raise ValueError("name=null: source=huggingface needs data.name")
    for key in ("name", "config_name"):
        value = getattr(data, key)
        if value and data.source != "huggingface":
            raise ValueError(
                f"{key}={value}: source={data.source} has none; set data.source=huggingface, or data.{key}=null"
            )
    if data.format not in ("auto", "text") and data.source in ("stdlib", "text"):
        raise ValueError(f"format={data.format}: source={data.source} has texts; set data.source=jsonl or parquet")
    if data.streaming and data.source not in ("huggingface", "memory") and ":" not in data.source:
        raise ValueError(f"streaming=true: only for source=huggingface, not {data.source}")
    return data


class DataConfig(Section):
    """Text to tokens to batches."""

    source: SourceName = "stdlib"
    """`stdlib` is the source of Python's own standard library: real text present on every machine; `memory`: what a
    program gives to `MoETrainer.train`; `package.module:function` of your own (docs/extending.md)."""
    path: PathText | list[PathText] | dict[str, PathText | list[PathText]] | None = None
    """File, folder pattern or list of them, for text, jsonl and parquet. Named, as in {code: a/*.py, prose: b/*.txt},
    routing is counted for each name."""
    validation_path: PathText | list[PathText] | None = None
    """Separate held-out files; without it documents are split by validation_split. They are of the same kind as path;
    beside other sources .jsonl and .parquet are known by their names, and the rest is text."""
    name: PathText | None = None
    """Dataset name for `huggingface`."""
    config_name: str | None = None
    """Configuration of that dataset, where it has several."""
    split: str = "train"
    """Split of the Hugging Face dataset."""
    text_field: str = "text"
    """Column that holds the text."""
    ignored_columns: list[str] = []
    """Columns of instruction data (instruction, messages, ...) that are left out on purpose: every token of text_field
    is then learned, and nothing of these."""
    format: Format = "auto"
    """What rows are: `text` (text_field, all of it learned); `chat` (messages, or ShareGPT's conversations),
    `prompt_completion` (texts or turns) and `instruction` (instruction, input, output), of which only what the
    assistant says is learned; `preference` (prompt, chosen, rejected): which answer is better (section `dpo`); `auto`:
    by the columns, and where they could be several things the run stops."""
    assistant_turns: Literal["all", "last"] = "all"
    """Which turns of the assistant are learned: all that have no `train: false`, or the last of them alone."""
    on_overlong: Literal["truncate", "drop", "error"] = "truncate"
    """A conversation of more than max_seq_length tokens: cut off, leave out, or stop and name it; the first two are
    counted and named. Of a preference both answers or none. Texts go on in the next sample."""
    packing: bool = True
    """Several documents share a sample, each for itself by document_mask; false: a sample has one, and padding."""
    streaming: bool = False
    """Read a Hugging Face dataset as a stream, without an index: needs max_steps or max_time, and has no held-out part
    but validation_path."""
    tokenizer: PathText = "bytes"
    """`bytes`, or the folder or name of any `transformers` tokenizer."""
    max_seq_length: Positive = 256
    """Tokens S in one training sample, on each side of one of preferences."""
    validation_split: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of documents held out for validation; not of a stream."""
    document_mask: bool = True
    """Attention and positions restart at document boundaries inside a packed sample."""
    shuffle: bool = True
    """Shuffle samples, anew in each epoch."""
    on_error: Literal["skip", "fail"] = "skip"
    """An unreadable or non-UTF-8 document: name, count and skip it, or stop."""
    on_change: Literal["stop", "warn"] = "stop"
    """A run goes on and its training data is not what it was: stop and name the files, or say so and go on, after as
    large a part of the epoch. Of a stream nobody can tell."""
    limit: Positive | None = None
    """Read at most this many documents."""
    dataloader_num_workers: NonNegative = 0
    """Batches prepared ahead by this many workers."""
    dataloader_pin_memory: bool = False
    """Page-locked host memory for batches (CUDA)."""

    _source_has_what_it_needs = model_validator(mode="after")(check_data)

    @property
    def validation_source(self) -> str:
        """What the files of validation_path are."""
        return self.source if self.source in FILE_SOURCES else file_source(self.validation_path)
