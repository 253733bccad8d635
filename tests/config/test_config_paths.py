"""Paths are read one way: `~` and `${VAR}` mean the same in every key and on every command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import TypeAdapter
from run_files import complaint, get, load

from moe_dist.config import FIELDS, load_config, load_mapping
from moe_dist.config.paths import expand
from moe_dist.train.run_setup import merge_config

ROOT = Path(__file__).parents[2]
NO_PATHS = {
    "train.freeze",
    "train.train_only",
    "data.config_name",
    "data.ignored_columns",
    "data.split",
    "data.text_field",
    "model.model_type",
    "model.rope_scaling",
    "model.router",
    "model.expert",
    "monitor.prometheus.host",
    "monitor.prometheus.pushgateway",
    "train.sample_prompt",
    "lora.target_modules",
}


def _plain_texts(kind: Any) -> bool:
    """Whether a type takes text or a path as it is written."""
    if kind in (str, Path):
        return True
    inner = get_args(kind)
    if any(getattr(item, "func", None) is not None for item in inner):
        return False
    if getattr(kind, "__origin__", None) is dict:
        inner = inner[1:]
    return any(_plain_texts(item) for item in inner if not isinstance(item, str))


def test_every_key_with_text_is_a_path_or_said_to_be_none() -> None:
    """A new key that holds a path cannot forget to expand it. Seen red with `folder: str | None`."""
    plain = set()
    for key, field in FIELDS.items():
        if any(getattr(item, "func", None) is not None for item in field.metadata):
            continue
        if _plain_texts(field.annotation):
            plain.add(key)
    assert plain == NO_PATHS


@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("train.output_dir", ()),
        ("checkpoint.folder", ()),
        ("checkpoint.encryption_key", ()),
        ("checkpoint.resume", ()),
        ("data.path", ("data.source=text",)),
        ("data.validation_path", ()),
        ("data.tokenizer", ()),
        ("data.name", ("data.source=huggingface",)),
    ],
)
def test_home_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, more: tuple[str, ...]) -> None:
    """Seen red: `~` was a folder of that name in four of them, `${OUT}` in all."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("OUT", "/big/disk")
    section, _, leaf = key.partition(".")
    for written, meant in (("~/a", "/home/someone/a"), ("${OUT}/run", "/big/disk/run")):
        config, _ = load(tmp_path, f"{section}: {{{leaf}: '{written}'}}", more)
        assert str(get(config, key)) == meant
    message = complaint(tmp_path, f"{section}: {{{leaf}: '${{NOT_THERE}}/x'}}", more)
    assert f"{key}='${{NOT_THERE}}/x': the environment variable NOT_THERE is not set" in message


def test_lists_and_names_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", "/big")
    config, _ = load(tmp_path, "data: {source: text, path: {a: '${OUT}/a/*', b: ['${OUT}/b', c]}}")
    assert config.data.path == {"a": "/big/a/*", "b": ["/big/b", "c"]}
    text = "data: {source: text, path: {a: ['${NOT_THERE}/a']}}"
    assert "the environment variable NOT_THERE is not set" in complaint(tmp_path, text)


class Place:
    """A path as Python programs have them that is no `pathlib.Path`."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __fspath__(self) -> str:
        return self.text


@pytest.mark.parametrize("kind", [Path, Place])
def test_every_key_with_a_path_takes_path_objects(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in lists and in mappings."""
    monkeypatch.setenv("OUT", "b")
    with_paths = [field for field in FIELDS.values() if "expand" in repr((field.annotation, field.metadata))]
    assert len(with_paths) >= 12
    for field in with_paths:
        only_lists = get_origin(field.annotation) is list
        given: Any = [kind("${OUT}/a")] if only_lists else kind("${OUT}/a")
        read = TypeAdapter(Annotated[field.annotation, "", *field.metadata]).validate_python(given)
        assert str(read[0] if only_lists else read) == "b/a", field
    pair = load_mapping({"prometheus": {"tls_certificate": kind("c"), "tls_key": kind("k")}}).monitor.prometheus
    assert (pair.tls_certificate, pair.tls_key) == (Path("c"), Path("k"))
    assert load_mapping({"signing_key": kind("a")}).checkpoint.signing_key == "a"
    assert load_mapping({"encryption_key": [kind("a"), "b"]}).checkpoint.encryption_keys == ["a", "b"]
    mixed = load_mapping({"data": {"source": "text", "path": {"a": kind("x"), "b": [kind("y"), "z"]}}})
    assert mixed.data.path == {"a": "x", "b": ["y", "z"]}


def test_files_that_programs_name_by_path_objects(tmp_path: Path) -> None:
    """`model.from`, a DeepSpeed file, a run file and the run folder."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "mixtral", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, '
        '"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, '
        '"num_experts_per_tok": 2, "rope_theta": 1e4}'
    )
    for kind in (Path, Place):
        found = load_mapping({"model": {"from": kind(str(tmp_path))}}, notice=lambda text: None)
        assert found.model.vocab_size == 300
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 1}}')
    section = {"engine": "deepspeed", "zero_stage": 1, "deepspeed_config": Place(str(tmp_path / "zero.json"))}
    assert isinstance(load_mapping({"parallel": section}).parallel.deepspeed_config, dict)
    (tmp_path / "run.yaml").write_text("train: {seed: 7}\n")
    merged = merge_config(Place(str(tmp_path / "run.yaml")), None, None, Place("out"))
    assert (merged.train.seed, merged.train.output_dir) == (7, Path("out"))


def test_files_that_a_configuration_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OUT", str(tmp_path))
    (tmp_path / "base.yaml").write_text("train: {seed: 7}\n")
    (tmp_path / "run.yaml").write_text("base: ['~/base.yaml', '${OUT}/base.yaml']\n")
    assert load_config("~/run.yaml").train.seed == 7
    assert load_config("${OUT}/run.yaml").train.seed == 7
    assert "NOT_THERE is not set" in complaint(tmp_path, "base: '${NOT_THERE}/x'")
    assert "NOT_THERE is not set" in complaint(tmp_path, "model: {from: '${NOT_THERE}/x'}")
    text = "parallel: {engine: deepspeed, zero_stage: 1, deepspeed_config: '${NOT_THERE}/x'}"
    assert "NOT_THERE is not set" in complaint(tmp_path, text)


def test_what_is_no_path_stays() -> None:
    for text in ("bytes", "env:KEY", "s3://bucket/a~b", "a/~b", "$HOME/x", "Qwen/Qwen3-30B-A3B"):
        assert expand(text) == text
    with pytest.raises(ValueError, match="no such user"):
        expand("~nobody-of-that-name/x")


@pytest.mark.parametrize("words", [("doctor", "${NOT_THERE}"), ("report", "${NOT_THERE}"), ("checkpoint", "ls", "~/x")])
def test_paths_on_the_command_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Seen red: `there is no such folder` about one that is called ${NOT_THERE}, and about ~/x."""
    env = {**os.environ, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    wanted = "NOT_THERE is not set" if words[-1].startswith("$") else f"{tmp_path}/home/x: there is no such folder"
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert wanted in done.stderr


def test_names_beyond_ascii_under_the_locale_c(tmp_path: Path) -> None:
    """A run file, a name in it and a path are UTF-8, whatever the locale says; with UTF-8 mode switched off, too."""
    folder = tmp_path / "données"
    folder.mkdir()
    (folder / "läuf.yaml").write_text("train: {output_dir: exécuter}\ndata: {source: text, path: 数据}\n", "utf-8")
    code = (
        "import sys; from moe_dist.config import load_config\n"
        "config = load_config(sys.argv[1]); sys.stdout.buffer.write(repr(config.train.output_dir).encode('utf-8'))"
    )
    for mode in ("1", "0"):
        env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": mode, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder / "läuf.yaml")], env=env, capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "exécuter" in done.stdout.decode("utf-8")
