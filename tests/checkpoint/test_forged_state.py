"""A `trainer_state.json` that somebody has written, with all hashes right: named, before anything is touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from safetensors.torch import load_file, save_file
from saved import rewrite_manifest, train, trained

from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.checkpoint.trainer_state import config_sha256


def put(checkpoint: Path, name: str, content: bytes, **more: Any) -> None:
    """A file, and a manifest that says it belongs there."""
    (checkpoint / name).write_bytes(content)

    def change(body: dict[str, Any]) -> None:
        body["files"][name] = {"bytes": len(content), "blake3": blake3(content).hexdigest()}
        body.update(more)

    rewrite_manifest(checkpoint, change)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    shutil.copytree(trained(), tmp_path / "run")
    for step in (2, 4):
        shutil.rmtree(tmp_path / f"run/checkpoint-{step}")
    return tmp_path / "run/checkpoint-6"


def set_in(*path: str, to: Any) -> Callable[[dict[str, Any]], Any]:
    def change(state: dict[str, Any]) -> Any:
        inner = state
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to
        return state

    return change


FORGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda state: [state], "the whole: Input should be"),
    "nothing": (lambda state: {}, "counters: Field required"),
    "no counters": (set_in("counters", to=None), "counters: "),
    "a step of text": (set_in("counters", "step", to="6"), r"counters\.step: "),
    "another step": (set_in("counters", "step", to=5), r"counters\.step is 5, the manifest's 6"),
    "less than no tokens": (set_in("counters", "tokens", to=-1), r"counters\.tokens: "),
    "a number without end": (set_in("counters", "tokens", to=10**400), r"counters\.tokens: "),
    "no time": (set_in("counters", "elapsed", to=float("nan")), r"counters\.elapsed: "),
    "a loss of text": (set_in("counters", "initial_loss", to=[]), r"counters\.initial_loss: "),
    "no stopping": (set_in("stopping", to=3), "stopping: "),
    "half a pace": (set_in("stopping", "first_pace", to=[1]), r"stopping\.first_pace: "),
    "no data": (set_in("data", to=[]), "data: "),
    "samples of text": (set_in("data", "samples_consumed", to="x"), r"data\.samples_consumed: "),
    "a seed of text": (set_in("data", "seed", to={}), r"data\.seed: "),
    "no stream": (set_in("data", "stream", to={"samples": 1}), r"data\.stream\.documents: "),
    "acting": (set_in("acting", to={"0": {"levels": "x"}}), r"acting\.0\.levels: "),
    "no config": (set_in("config", to=None), "config: "),
    "a config of text": (set_in("config", "model", to="x"), r"config\.model: "),
    "sizes of text": (set_in("config", "model", "hidden_size", to="x"), r"config\.model\.hidden_size: "),
}


@pytest.mark.parametrize(("change", "wrong"), FORGED.values(), ids=FORGED.keys())
def test_forged_state_is_named(
    checkpoint: Path, change: Callable[[dict[str, Any]], Any], wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor has been read. Seen to fail without the form: raw errors of eight kinds, some after the weights."""
    state = change(json.loads((checkpoint / "trainer_state.json").read_text()))
    config = state.get("config") if isinstance(state, dict) else None
    content = json.dumps(state).encode()
    put(checkpoint, "trainer_state.json", content, **({"config_sha256": config_sha256(config)} if config else {}))
    monkeypatch.setattr("moe_dist.checkpoint.state.read_into", lambda *arguments: pytest.fail("weights are read"))
    with pytest.raises(CheckpointError, match=rf"checkpoint-6/trainer_state\.json: {wrong}"):
        train(checkpoint.parent)
    assert checkpoint.is_dir()


def test_a_config_of_another_run_is_named(checkpoint: Path) -> None:
    """Seen to fail with `config_sha256` written and never compared."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["config"]["train"]["seed"] = 99
    put(checkpoint, "trainer_state.json", json.dumps(state).encode())
    with pytest.raises(CheckpointError, match=r"config is not the one that the manifest names \(config_sha256\)"):
        train(checkpoint.parent)


def test_keys_of_a_newer_version_are_no_forgery(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["more"], state["counters"]["more"], state["data"]["more"] = 1, 2, 3
    put(checkpoint, "trainer_state.json", json.dumps(state).encode())
    assert train(checkpoint.parent, max_steps=7).steps == 7


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(checkpoint: Path, value: float) -> None:
    """Seen to fail without the look at what was read: the loss is not a number from the first step on."""
    (file,) = checkpoint.glob("shard-*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("model.") and "w_down" in name)
    tensors[name].view(-1)[3] = value
    save_file(tensors, checkpoint.parent / "forged.safetensors")
    put(checkpoint, file.name, (checkpoint.parent / "forged.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\..*w_down.* holds a value that is not finite"):
        train(checkpoint.parent)


@pytest.fixture
def key(tmp_path: Path) -> str:
    (tmp_path / "key").write_text("11" * 32)
    return str(tmp_path / "key")


def test_signed_by_this_key_alone(tmp_path: Path, checkpoint: Path, key: str) -> None:
    """What is not signed, signed with another key, or changed since, is refused by name. Seen to fail with
    `check_signature` left out of `verify`."""
    with pytest.raises(CheckpointError, match=r"checkpoint-6: its manifest is not signed; checkpoint\.signing_key"):
        train(checkpoint.parent, signing_key=key)
    signed = tmp_path / "signed"
    train(signed, signing_key=key, max_steps=2)
    assert train(signed, signing_key=key, max_steps=3).steps == 3
    (tmp_path / "another").write_text("22" * 32)
    with pytest.raises(CheckpointError, match=r"checkpoint-3: signed with another key, \w{16}, and not with \w{16};"):
        train(signed, signing_key=str(tmp_path / "another"), max_steps=4)
    for step in (2, 3):
        state = (signed / f"checkpoint-{step}/trainer_state.json").read_bytes()
        put(signed / f"checkpoint-{step}", "trainer_state.json", state + b" ")
    with pytest.raises(CheckpointError, match="checkpoint-3: its manifest was changed after it was signed with"):
        train(signed, signing_key=key, max_steps=4)
    assert train(signed, max_steps=4).steps == 4, "without a key signatures are not looked at"
