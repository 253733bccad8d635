"""Datasets by name, from the Hugging Face Hub or a folder; a line with file and cause where one cannot be used."""

from __future__ import annotations

import gzip
from functools import partial
from typing import Any

_ELSEWHERE = ("aiohttp", "fsspec", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3")


def load_dataset_named(name: str | None, config_name: str | None, split: str, streaming: bool) -> Any:
    """`datasets.load_dataset`. Raises ValueError with the file that cannot be used, where it is one, and the cause."""
    if not name:
        raise ValueError("data source 'huggingface' needs `name`, the name of a dataset on the Hub or a folder")
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    try:
        return load_dataset(name, config_name, split=split, streaming=streaming)
    except Exception as error:  # of datasets, pyarrow, pandas, the network: many types, one meaning
        where = guilty_file(name, config_name, split) if is_data_error(error) else ""
        raise ValueError(
            f"dataset {name!r} (configuration {config_name!r}, split {split!r}) cannot be loaded: "
            f"{where or causes(error)}"
        ) from error


def causes(error: BaseException) -> str:
    """The first line of an error and of those behind it, each once."""
    found: list[str] = []
    while True:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        if not any(text in other for other in found):
            found.append(text)
        behind = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if behind is None:
            return ": ".join(found)
        error = behind


def is_data_error(error: BaseException | None) -> bool:
    """Whether the data are wrong, and would be at the next try: not a network or a disk that has failed."""
    while error is not None:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            return False
        if type(error).__module__.partition(".")[0] in _ELSEWHERE:
            return False
        error = error.__cause__ or error.__context__
    return True


def guilty_file(name: str, config_name: str | None, split: str) -> str:
    """The file of a folder that cannot be read as the first one is, and why; "" where it is not a file."""
    from datasets import load_dataset, load_dataset_builder

    try:
        builder = load_dataset_builder(name, config_name)
        files = list(builder.config.data_files[split])
        load = partial(load_dataset, builder.name, split="train", streaming=True)
    except Exception:  # no folder of files: then the first error says all there is
        return ""
    first: list[str] | None = None
    for path in files:
        rows = 0
        try:
            for values in load(data_files=[path]):
                rows += 1
                columns = sorted(values)
                if first is not None and columns != first:
                    return f"{path}: has the columns {', '.join(columns)}, and {files[0]} {', '.join(first)}"
                first = columns
        except Exception as error:
            return f"{path}, after {rows} rows: {causes(error)}"
    return ""
