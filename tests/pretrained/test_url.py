"""`model.from_pretrained` as a URL: fetched once, into a folder that no later version changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from folders import MODELS, random_weights, write_folder
from patches import Replace
from s3_server import s3_server

from moe_dist.config import ConfigError, load_mapping, model_url
from moe_dist.models.huggingface import to_huggingface
from moe_dist.parallel.mesh import Mesh
from moe_dist.pretrained.loading import load_pretrained
from moe_dist.train.build import build_model

CONFIG = MODELS["qwen"]
WEIGHTS = random_weights(CONFIG)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    pytest.importorskip("moto.server", reason="the S3 server of these tests is moto's")
    pytest.importorskip("s3fs", reason="s3:// needs the package s3fs")
    with s3_server() as url:
        yield url


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder there, with files besides that are no model's."""
    if request.param == "s3":
        request.getfixturevalue("server")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "hf", CONFIG, WEIGHTS, 2)
    (folder / "modeling_own.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    place = f"{request.param}://bucket/{tmp_path.name}"
    fsspec.core.url_to_fs(place)[0].put(f"{folder}/", f"bucket/{tmp_path.name}/", recursive=True)
    return place


def loaded(place: str) -> tuple[str, dict[str, torch.Tensor], list[str]]:
    said: list[str] = []
    config = load_mapping({"model": {"from_pretrained": place}}, notice=said.append)
    model = build_model(config, Mesh.single())
    load_pretrained(model, config.model, Mesh.single())
    assert config.model.from_pretrained is not None
    return config.model.from_pretrained, to_huggingface(model, config.model), said


def test_fetched_once_and_a_new_version_goes_elsewhere(url: str, tmp_path: Path) -> None:
    place, weights, said = loaded(url)
    assert all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)
    names = {path.name for path in Path(place).iterdir()}
    assert names == {
        "config.json",
        "model.safetensors.index.json",
        *(f"model-0000{n}-of-00002.safetensors" for n in (1, 2)),
    }
    assert any("fetching 4 files" in line for line in said)
    again, _, said = loaded(url)
    assert (again, [line for line in said if "fetching" in line]) == (place, [])
    changed = random_weights(CONFIG)
    changed["lm_head.weight"] = changed["lm_head.weight"] * 2
    folder = write_folder(tmp_path / "new", CONFIG, changed, 2)
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.put(f"{folder}/", f"{root}/", recursive=True)
    other, weights, _ = loaded(url)
    assert other != place
    assert torch.equal(weights["lm_head.weight"], changed["lm_head.weight"])
    assert torch.equal(loaded(place)[1]["lm_head.weight"], WEIGHTS["lm_head.weight"])


def test_a_download_goes_on_where_it_broke_off(url: str, monkeypatch: pytest.MonkeyPatch, replace: Replace) -> None:
    monkeypatch.setattr(model_url, "CHUNK", 1000)
    filesystem = fsspec.core.url_to_fs(url)[0]
    cat, asked = filesystem.cat_file, list[tuple[str, int]]()

    def breaks(path: str, start: int | None = None, end: int | None = None, **rest: Any) -> bytes:
        asked.append((path.rpartition("/")[2], start or 0))
        if len(asked) == 8:
            raise OSError("connection reset")
        return cat(path, start=start, end=end, **rest)

    replace(filesystem, "cat_file", breaks)
    with pytest.raises(ConfigError, match=r"from_pretrained='.*': cannot be read: connection reset"):
        loaded(url)
    place, weights, _ = loaded(url)
    assert all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)
    assert asked[8] == asked[7]
    assert len(set(asked)) == len(asked) - 1
    assert not list(Path(place).glob("*.part"))


@pytest.mark.parametrize(
    ("place", "seen"),
    [
        ("memory://bucket/nothing", "cannot be read"),
        ("nowhere://bucket/model", "Protocol not known: nowhere"),
        ("file:///nowhere/model", "no such file"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    place: str, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ConfigError) as caught:
        load_mapping({"model": {"from_pretrained": place}}, notice=lambda text: None)
    assert seen in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_url_is_the_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", CONFIG, WEIGHTS)
    assert loaded(f"file://{folder}")[0] == str(folder)
