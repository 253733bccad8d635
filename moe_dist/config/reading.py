"""Layers of a run file, one over the other: base files, a `config.json`, Python, the command line; and their errors."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from moe_dist.config.huggingface import (
    HuggingFaceModel,
    architecture_differences,
    has_tokenizer,
    model_of,
    pretrained_config,
    read_huggingface,
)
from moe_dist.config.model_source import local_folder
from moe_dist.config.names import FIELDS, SECTIONS, keys_of, names_a_model, spellings, takes
from moe_dist.config.paths import expand, plain
from moe_dist.config.sections.all import Sections
from moe_dist.config.sections.model import ModelConfig
from moe_dist.config.wording import ConfigError, allowed, show
from moe_dist.config.yaml_text import parse_yaml, read_yaml

Tree = TypeVar("Tree", bound=Sections)

MAX_FILES = 100
Admit = Callable[[str, Any], Any]
"""Gets a full key (or `base`, `model.from`) and its value before anything is read by it, and returns what is meant;
raises ConfigError for what it does not allow."""


def as_it_is(key: str, value: Any) -> Any:
    return value


_KERNEL = "model.attn_implementation"  # how it is computed, not what
_PRETRAINED = "model.from_pretrained"


class Reading:
    """One call of `load_config`: values by full key, and who said each."""

    def __init__(self, notice: Callable[[str], None], admit: Admit = as_it_is) -> None:
        self._admit = admit
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.spellings: dict[str, str] = {}
        self.defaults: dict[str, Any] = {}
        self.pretrained: HuggingFaceModel | None = None
        self._architecture = ""
        self._notice: Callable[[str], None] | None = notice
        self._noticed: set[str] = set()
        self._files = 0

    def notice(self, text: str) -> None:
        if self._notice is not None and text not in self._noticed:
            self._noticed.add(text)
            self._notice(text)

    def changes(self, tree: Mapping[str, Any]) -> None:
        """What a program says over a file: which sections its keys belong to is ours to find, without a word."""
        notice, self._notice = self._notice, None
        self.layer(tree, "Python", Path())
        self._notice = notice

    def file(self, path: Path, said: str = "", stack: tuple[Path, ...] = ()) -> None:
        """Add a file's values, after those of the files it is based on."""
        raw = read_yaml(path, said)
        resolved = path.resolve()
        if resolved in stack:
            circle = " -> ".join(file.name for file in (*stack[stack.index(resolved) :], resolved))
            raise ConfigError(f"{said}: files based on each other in a circle ({circle}); allowed: a chain")
        self._files += 1
        if self._files > MAX_FILES:
            raise ConfigError(f"{said}: over {MAX_FILES} base files")
        base = raw.pop("base", None)
        for name in base if isinstance(base, list) else [] if base is None else [base]:
            if not isinstance(name, str):
                raise ConfigError(f"base={show(base)}: the path of a YAML file, or a list of them ({path})")
            said = f"base={show(name)} ({path})"
            self.file(Path(self._admit("base", str(path.parent / expanded(name, said)))), said, (*stack, resolved))
        self.layer(raw, str(path), path.parent)

    def layer(self, raw: Mapping[Any, Any], origin: str, folder: Path) -> None:
        """Add what one file or the command line says, over what is there."""
        said: dict[str, tuple[str, Any]] = {}
        for spelling, value in spellings(raw, origin):
            for key, meant in keys_of(spelling, value, origin, self.notice):
                meant = self._admit(key, meant)
                if key in said and said[key][1] != meant:
                    first, other = said[key]
                    both = f"{first}={show(other)} and {spelling}={show(value)}"
                    raise ConfigError(f"{both}: both mean {key}; allowed: one value ({origin})")
                said[key] = (spelling, meant)
        if "model.from" in said and said.get(_PRETRAINED, ("", None))[1] is not None:
            raise ConfigError(f"model.from and {_PRETRAINED}: both take a whole model; give one of them ({origin})")
        if (source := said.pop("model.from", ("", None))[1]) is not None:
            if not isinstance(source := plain(source), str):
                raise ConfigError(f"model.from={show(source)}: a config.json, or the folder it is in ({origin})")
            file = folder / expanded(source, f"model.from={show(source)} ({origin})")
            file = file / "config.json" if file.is_dir() else file
            self._replace_model(read_huggingface(file, f"model.from={show(source)}"), file)
        if _PRETRAINED in said:
            said[_PRETRAINED] = said[_PRETRAINED][0], self._start_from(said, origin, folder)
        self.values |= {key: value for key, (_, value) in said.items()}
        self.origins |= dict.fromkeys(said, origin)
        self.spellings |= {key: spelling for key, (spelling, _) in said.items()}

    def _start_from(self, said: Mapping[str, Any], origin: str, folder: Path) -> str | None:
        """Take the whole architecture of a folder with weights; its full path. Later keys must agree with it.

        A run's own config.yaml says all keys of the model: it needs the folder no more.
        """
        self.pretrained, self._architecture, source = None, "", plain(said[_PRETRAINED][1])
        if source is None:
            return None
        if not isinstance(source, str):
            raise ConfigError(
                f"{_PRETRAINED}={show(source)}: a folder with config.json and weights, org/name, or a URL"
            )
        source = expanded(source, f"{_PRETRAINED}={show(source)} ({origin})")
        path = Path(os.path.abspath(folder / source))
        path = local_folder(source, path, f"{_PRETRAINED}={show(source)}", self.notice)
        if (path / "config.json").exists() or any(key not in said for key in FIELDS if key.startswith("model.")):
            self.pretrained = pretrained_config(path, f"{_PRETRAINED}={show(source)}")
            self._drop_model()
            self.values |= self.pretrained.model
            self.origins |= dict.fromkeys(self.pretrained.model, str(path / "config.json"))
            self.defaults = dict(self.pretrained.balance)
            if has_tokenizer(path) and "data.tokenizer" not in said:
                self._take_tokenizer(path, origin)
        return str(path)

    def _take_tokenizer(self, path: Path, origin: str) -> None:
        """That of the folder, unless who says where to start from says another: ids mean what its tokenizer means."""
        key, own = "data.tokenizer", str(path)
        if (who := self.origins.get(key)) == origin:
            return
        if self.values.get(key, own) != own:
            self.notice(f"{key}={show(self.values[key])} ({who}) is not the tokenizer of {path.name}; its own is taken")
        self.values[key], self.origins[key] = own, str(path / "config.json")

    def check_pretrained(self, model: ModelConfig) -> None:
        """Raises ConfigError naming the keys in which a model is not that of the folder its weights come from."""
        if self.pretrained is None:
            return
        wrong = architecture_differences(model, model_of(self.pretrained))
        if wrong:
            raise ConfigError(
                f"model: {', '.join(wrong)}, as {_PRETRAINED}={model.from_pretrained} has it: leave out what differs, "
                "the weights are of no other model"
            )

    def _drop_model(self) -> list[str]:
        gone = [key for key in self.values if key.startswith("model.") and key != _KERNEL]
        for key in gone:
            del self.values[key], self.origins[key]
            self.spellings.pop(key, None)
        return gone

    def _replace_model(self, found: HuggingFaceModel, file: Path) -> None:
        """The whole architecture is the file's: what earlier files say of it would make neither model."""
        gone, self.pretrained = self._drop_model(), None
        self.values |= found.model
        self.origins |= dict.fromkeys(found.model, str(file))
        self.defaults, self._architecture = found.balance, str(file)
        dropped = [key.removeprefix("model.") for key in gone if key not in found.model]
        if dropped:
            self.notice(
                f"model.from replaces the whole model; of the base files nothing is left of {', '.join(dropped)}"
            )
        if found.ignored:
            self.notice(f"{file}: without meaning for training: {', '.join(found.ignored)}")
        if found.weights:
            self.notice(
                f"model.from takes the architecture alone: the weights beside it ({_few(found.weights)}) are not "
                "read, training starts from random weights (model.from_pretrained reads them)"
            )

    def say_what_changes_the_architecture(self) -> None:
        """Keys of a person's own over a `config.json`: the model is then another one than its name says."""
        mine = [
            f"{key.removeprefix('model.')}={show(value)}"
            for key, value in self.values.items()
            if self._architecture
            and key.startswith("model.")
            and self.origins[key] != self._architecture
            and key != _KERNEL
        ]
        if mine:
            self.notice(f"over {self._architecture}: {', '.join(mine)}")

    def check_bools(self) -> None:
        """pydantic reads 'yes' as true, true as 1 and 0 as false; whoever wrote that meant something else."""
        for key, value in self.values.items():
            kind = FIELDS[key].annotation
            words = allowed(kind)
            for entry in value if isinstance(value, list) else [value]:
                wants_bool = kind is bool or words in ("only true", "only false")
                choices = words.removeprefix("only ").removeprefix("one of ").split(", ")
                wants_number = "number" in words or all(choice.isdigit() for choice in choices)
                if wants_number if isinstance(entry, bool) else wants_bool:
                    raise ConfigError(f"{key}={show(value)}: {takes(key)} ({self.origins[key]})")


def expanded(path: str, said: str) -> str:
    try:
        return expand(path)
    except ValueError as error:
        raise ConfigError(f"{said}: {error}") from None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _override_tree(overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """`a.b=c`, `--a.b=c` and the pair `--a.b`, `c`, each as the nested mapping a file would hold."""
    items = iter(overrides)
    for item in items:
        name, equals, text = item.removeprefix("--").partition("=")
        if not equals and not item.startswith("--"):
            raise ConfigError(f"{item!r}: not an override; allowed: section.key=value or --section.key value")
        if not equals:
            following = next(items, "--")
            if following.startswith("--"):
                raise ConfigError(f"{item!r}: an override without a value; allowed: --section.key value")
            text = following
        name = name.strip().replace("-", "_")
        if name == "base" or not all(name.split(".")):
            raise ConfigError(f"{item!r}: not a key; allowed: section.key=value (`base` only inside a file)")
        try:
            value = parse_yaml(text)
        except ConfigError as error:
            # *.txt would be an alias in YAML: what does not begin a list or a mapping is taken as text.
            if text.lstrip()[:1] in ("[", "{"):
                raise ConfigError(f"{name}={text!r}: {str(error).partition(': ')[2]} (command line)") from None
            value = text
        for part in reversed(name.split(".")):
            value = {part: value}
        yield value


def _reworded(error: ValidationError, reading: Reading, origin: str) -> ConfigError:
    """pydantic's findings in one line: the first, and how many more keys are wrong."""
    found = error.errors()
    first, location = found[0], found[0]["loc"]
    names = [".".join(str(part) for part in location[:depth]) for depth in (3, 2)]
    key = next((name for name in names if name in FIELDS), names[-1])
    if key in FIELDS:
        origin = reading.origins.get(key, origin)
        written = reading.spellings.get(key, key).rpartition(".")[2]
        other = "" if key.endswith(f".{written}") else f" (written as {written})"
        # Of a value of the right type a validator says itself what is wrong with it.
        same = [item for item in found if item["loc"][: key.count(".") + 1] == location[: key.count(".") + 1]]
        why = next((item["ctx"]["error"] for item in same if item["type"] == "value_error"), None)
        text = f"{key}={show(reading.values.get(key))}{other}: {why or takes(key)}"
    else:
        text = str(first.get("ctx", {}).get("error", first["msg"]))
        if key in SECTIONS and not text.startswith(f"{key}."):
            text = f"{key}.{text}"
        origin = reading.origins.get(re.split("[=:]", text)[0], origin)
    more = len({item["loc"][: key.count(".") + 1] for item in found}) - 1
    return ConfigError(f"{text} ({origin}){f' (and {more} more)' if more else ''}")


def _is_no_model(tree: Mapping[str, Any]) -> bool:
    return not any(names_a_model(spelling) for spelling, _ in spellings(tree, ""))


def validated(kind: type[Tree], reading: Reading, overrides: Sequence[str], origin: str) -> Tree:
    """A `kind` of what was read and the overrides. Raises ConfigError for anything wrong."""
    # A model.from replaces what came before; keys beside it, in whatever order, are meant to change it.
    for tree in sorted(_override_tree(overrides), key=_is_no_model):
        reading.layer(tree, "command line", Path())
    reading.say_what_changes_the_architecture()
    reading.values = reading.defaults | reading.values
    reading.origins = dict.fromkeys(reading.values, origin) | reading.origins
    reading.check_bools()
    nested: dict[str, Any] = {}
    for key, value in reading.values.items():
        *sections, leaf = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = value
    try:
        made = kind.model_validate(nested)
    except ValidationError as error:
        raise _reworded(error, reading, origin) from None
    reading.check_pretrained(made.model)
    return made
