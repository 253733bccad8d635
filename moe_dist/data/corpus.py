"""Corpora: documents in one fixed order, and a list of those that could not be read."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from moe_dist.data import files as file_lists
from moe_dist.data.chat_template import ChatEncoder
from moe_dist.data.columns import Wanted
from moe_dist.data.formats import check_formats
from moe_dist.data.sources import Entry, FileSource, JsonlSource, RowSource, Source, Unreadable
from moe_dist.data.tokenised import TokenRow
from moe_dist.data.tokenizer import TokenIds

logger = logging.getLogger(__name__)

SOURCES = ("stdlib", "text", "jsonl", "parquet", "huggingface")
MAX_WARNINGS = 5


@dataclass(frozen=True)
class Document:
    """One document: its text, or its token ids where it came tokenised. `id` is the same on every machine."""

    id: str
    text: str | None
    tokens: TokenIds | None = None
    domain: int = 0
    """Number of the named source it comes from."""
    labels: TokenIds | None = None
    """Of a document that came with them: the label of each of its tokens, -100 where it is not learned."""
    whole: bool = False
    """It ends as it is, without an end-of-document token, and stays in one sample."""
    rejected: TokenRow | None = None
    """Of a preference, where this is the chosen answer with its prompt: the other one."""


@dataclass(frozen=True)
class SkippedDocument:
    """A document left out: `offset` in bytes of the file or rows of the dataset; `reason` says what is wrong."""

    id: str
    offset: int
    reason: str
    file: str = ""
    count: int | None = 1
    """Documents that are lost here; None: the rest of a file, nobody knows how many."""


class Corpus:
    """Documents in one fixed order, read again from the source at each iteration.

    `skipped` lists what could not be read during the latest iteration. `streaming` tells that a pass is long
    and should not be packed into memory; `whole`, that documents are conversations, which no sample may hold a part
    of; `pairs`, that each is a preference; `truncated` lists those that were cut off to fit. `fingerprint` is None, or
    changes when the documents may have changed. Only one iteration may run at a time.
    """

    def __init__(
        self,
        source: Source,
        *,
        on_error: str = "skip",
        limit: int | None = None,
        streaming: bool = False,
        keep: Callable[[str], bool] | None = None,
        keep_name: str = "all",
        domains: file_lists.Domains | None = None,
        files: Sequence[tuple[str, str]] = (),
        whole: bool = False,
        pairs: bool = False,
    ) -> None:
        """`limit`: only the first so many documents of the source, unreadable ones counted.

        `keep`: of those, only the ones with an id that it accepts (the others are not read);
        `keep_name` says which they are, for the fingerprint. `domains`: the named sources, if there are several.
        `files`: (id, path) of what is read, in this order, where it is files.
        """
        if on_error not in ("skip", "fail"):
            raise ValueError(f"on_error is {on_error!r}; allowed: 'skip', 'fail'")
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}; give at least 1, or None for all documents")
        self._source = source
        self._on_error = on_error
        self._limit = limit
        self._keep = keep
        self._keep_name = keep_name
        self._domains = domains
        self.files = tuple(files)
        self._position = 0
        self.streaming = streaming
        self.whole, self.pairs = whole, pairs
        self.skipped: list[SkippedDocument] = []
        self.truncated: list[SkippedDocument] = []

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the sources the documents come from; empty unless there are several."""
        return self._domains.names if self._domains is not None else ()

    @property
    def fingerprint(self) -> str | None:
        """A text equal for equal documents (as far as names, sizes and times of files tell), or None."""
        if self._source.fingerprint is None:
            return None
        return f"{self._source.fingerprint}|limit={self._limit}|keep={self._keep_name}"

    def __iter__(self) -> Iterator[Document]:
        return self.iter_from(None)

    def iter_from(self, state: dict[str, Any] | None) -> Iterator[Document]:
        """Documents after the point that `state_dict` gave; None: all of them.

        Raises ValueError naming the file and offset of an unreadable document where `on_error` is 'fail'.
        """
        self._position = 0 if state is None else int(state["position"])
        self.skipped, self.truncated = [], []
        for entry in self._source.entries(self._position, None if state is None else state["source"]):
            if self._limit is not None and self._position >= self._limit:
                return
            self._position += 1
            if self._keep is not None and not self._keep(entry.id):
                continue
            document = self._read(entry)
            if document is not None:
                yield document

    def state_dict(self) -> dict[str, Any]:
        """Where the latest iteration stands, just after the document it gave last."""
        return {"position": self._position, "source": self._source.state()}

    def select(self, keep: Callable[[str], bool], name: str) -> Corpus:
        """The documents of this corpus with an id that `keep` accepts; `name` identifies the choice."""

        def both(id_: str) -> bool:
            return (self._keep is None or self._keep(id_)) and keep(id_)

        return Corpus(
            copy.copy(self._source),  # its own position; the documents behind it are shared
            on_error=self._on_error,
            limit=self._limit,
            streaming=self.streaming,
            keep=both,
            keep_name=f"{self._keep_name},{name}",
            domains=self._domains,
            files=self.files,
            whole=self.whole,
            pairs=self.pairs,
        )

    def _read(self, entry: Entry) -> Document | None:
        try:
            value = entry.read()
        except Unreadable as error:
            if error.stops:
                raise ValueError(str(error)) from None
            if self._on_error == "fail":
                raise ValueError(
                    f"unreadable document {entry.id!r}: {error}. Repair or remove it, or set on_error='skip'"
                ) from None
            file = error.where.partition(", line ")[0]
            self.skipped.append(SkippedDocument(entry.id, error.offset, str(error), file, error.count))
            if len(self.skipped) <= MAX_WARNINGS:
                last = " (further ones are only counted)" if len(self.skipped) == MAX_WARNINGS else ""
                logger.warning("skipped document %r: %s%s", entry.id, error, last)
            return None
        domain = self._domains.of(entry.id) if self._domains is not None else 0
        if isinstance(value, str):
            return Document(entry.id, value, None, domain)
        if value.note:
            self.truncated.append(SkippedDocument(entry.id, 0, value.note, value.note.partition(", line ")[0], 0))
        return Document(entry.id, None, value.ids, domain, value.labels, value.whole, value.rejected)


def load_documents(
    source: str,
    *,
    path: file_lists.Paths | None = None,
    name: str | None = None,
    config_name: str | None = None,
    split: str = "train",
    text_field: str = "text",
    ignored_columns: Sequence[str] = (),
    streaming: bool = False,
    on_error: str = "skip",
    limit: int | None = None,
    format: str = "auto",
    chat: ChatEncoder | None = None,
) -> Corpus:
    """The corpus that `source` names.

    - "stdlib": every .py file of Python's own standard library but its tests; no other argument needed.
    - "text": files matching `path` (one glob or several, `**` allowed, .gz decompressed), a document per
      file. With a mapping of names to globs the documents know which name they come from (`Corpus.domains`).
    - "jsonl": likewise, a document per line, its text in `text_field` (or a list of token ids).
    - "parquet": likewise, a document per row.
    - "huggingface": `datasets.load_dataset(name, config_name, split=split, streaming=streaming)`.

    `on_error`: 'skip' lists unreadable documents in `Corpus.skipped`, 'fail' raises ValueError at the first
    one. `ignored_columns`: of instruction data, those that are left out on purpose (`columns.py`). `format`: what rows
    are, one of `columns.FORMATS`; `chat` makes tokens of conversations. `limit`: only the first so many documents.
    `streaming`: a corpus too large to pack in memory. Raises ValueError for an unknown source, a path without files,
    columns that are not there, or that could be several things.
    """
    files: Sequence[tuple[str, str]]
    wanted = Wanted(text_field, ignored_columns, format, chat)
    if source in ("stdlib", "text") and wanted.is_talk:
        raise ValueError(f"data.format={format}: data.source={source} has texts; set data.source=jsonl or parquet")
    if source == "stdlib":
        files = file_lists.standard_library_files()
        found: Source = FileSource(files, file_lists.fingerprint("stdlib", files))
    elif source in ("text", "jsonl", "parquet"):
        files = file_lists.matching_files(path, source)
        check_formats(files, source)
        if source == "text":
            found = FileSource(files, file_lists.fingerprint(f"{source}:{text_field}", files))
        elif source == "jsonl":
            file_lists.check_jsonl_field(files, wanted)
            found = JsonlSource(files, wanted, file_lists.fingerprint(f"{source}:{wanted.stamp}", files))
        else:
            from moe_dist.data.dataset_sources import ParquetSource

            file_lists.check_parquet_field(files, wanted)
            found = ParquetSource(files, wanted, file_lists.fingerprint(f"{source}:{wanted.stamp}", files))
    elif source == "huggingface":
        from moe_dist.data.hub import guilty_file, load_dataset_named

        return documents_from(
            load_dataset_named(name, config_name, split, streaming),
            text_field=text_field,
            ignored_columns=ignored_columns,
            on_error=on_error,
            limit=limit,
            format=format,
            chat=chat,
            name=f"{name}/{config_name or ''}/{split}",
            explain=partial(guilty_file, str(name), config_name, split),
        )
    else:
        raise ValueError(f"data source {source!r} is unknown; allowed: {', '.join(SOURCES)}")
    named = file_lists.domains(path, source) if source != "stdlib" else None
    return Corpus(found, on_error=on_error, limit=limit, streaming=streaming, domains=named, files=files, **wanted.kind)


def documents_from(
    dataset: Any,
    *,
    text_field: str = "text",
    ignored_columns: Sequence[str] = (),
    on_error: str = "skip",
    limit: int | None = None,
    format: str = "auto",
    chat: ChatEncoder | None = None,
    name: str = "memory",
    explain: Callable[[], str] = str,
) -> Corpus:
    """The corpus in a Python object.

    `dataset`: a list of texts, of dicts with `text_field`, or of lists of token ids; a `datasets.Dataset`; or
    a `datasets.IterableDataset` (the corpus is then streaming). The value of `text_field` may be token ids
    too. Raises ValueError for an empty dataset, another type, or a text field that is not there.
    """
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, dict):
        raise ValueError(f"dataset {name!r} holds several splits, {sorted(columns)}: give one, e.g. dataset['train']")
    wanted = Wanted(text_field, ignored_columns, format, chat)
    if columns is not None:
        wanted.check(columns, f"dataset {name!r}")
        dataset = dataset.select_columns(wanted.selected(columns))
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, str | bytes | dict):
        if len(dataset) == 0:
            raise ValueError(f"dataset {name!r} is empty")
        if columns is None and isinstance(dataset[0], dict):
            wanted.check(list(dataset[0]), f"dataset {name!r}, row 0")
        stamp = getattr(dataset, "_fingerprint", None)  # datasets.Dataset: changes with every transformation
        found: Source = RowSource(dataset, name, wanted, stamp and f"{stamp}|{wanted.stamp}")
        return Corpus(found, on_error=on_error, limit=limit, **wanted.kind)
    if hasattr(dataset, "load_state_dict") and hasattr(dataset, "__iter__"):
        from moe_dist.data.dataset_sources import StreamSource

        if columns is None:  # not known before the first row is read
            first_row: dict[str, Any] = next(iter(copy.deepcopy(dataset)), {})
            wanted.check(list(first_row), f"dataset {name!r}, row 0,")
        source = StreamSource(dataset, name, wanted, explain)
        return Corpus(source, on_error=on_error, limit=limit, streaming=True, **wanted.kind)
    raise ValueError(
        f"dataset {name!r} is {type(dataset).__name__}; give a list of texts, of dicts or of token ids, "
        "a datasets.Dataset or a datasets.IterableDataset"
    )
