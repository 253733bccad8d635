"""300 damaged folders, drawn at random over all families: none is trained from, and each says what is wrong."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import EVERY, random_weights, write_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_dist.config import load_mapping
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.pretrained.loading import load_pretrained

INDEX = "model.safetensors.index.json"
ROUNDS, EACH = 10, 30


def load(folder: Path) -> Transformer:
    config = load_mapping({"model": {"from_pretrained": str(folder)}}, notice=lambda text: None)
    model = Transformer(config.model)
    load_pretrained(model, config.model, Mesh.single())
    return model


def refusal(folder: Path) -> str | None:
    try:
        load(folder)
    except ValueError as error:
        return str(error)
    return None


class Damage:
    """Damages the folder it is made for; every kind returns what must be said, a name of a tensor or of a file."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.draw = folder, draw
        self.names: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        self.name = draw.choice(sorted(self.names))
        self.file = self.names[self.name]

    def tensor_missing(self) -> str:
        return self._edit(lambda tensors: tensors.pop(self.name))

    def tensor_renamed(self) -> str:
        def rename(tensors: dict[str, Tensor]) -> None:
            tensors[self.name.replace("weight", "wieght") + "s"] = tensors.pop(self.name)

        return self._edit(rename)

    def tensor_transposed(self) -> str:
        shapes = {name: tensor.shape for file in set(self.names.values()) for name, tensor in self._load(file).items()}
        uneven = [name for name, shape in shapes.items() if len(shape) > 1 and shape[-1] != shape[-2]]
        self.name = self.draw.choice(sorted(uneven))
        self.file = self.names[self.name]
        return self._edit(lambda tensors: tensors.update({self.name: tensors[self.name].transpose(-1, -2)}))

    def tensor_cut(self) -> str:
        return self._edit(lambda tensors: tensors.update({self.name: tensors[self.name][:-1]}))

    def tensor_of_another_type(self) -> str:
        kind = self.draw.choice([torch.int8, torch.float64, torch.int32, torch.bool])
        return self._edit(lambda tensors: tensors.update({self.name: tensors[self.name].to(kind)}))

    def value_not_finite(self) -> str:
        value = self.draw.choice([float("nan"), float("inf"), float("-inf")])

        def spoil(tensors: dict[str, Tensor]) -> None:
            flat = tensors[self.name].view(-1)
            flat[self.draw.randrange(len(flat))] = value

        return self._edit(spoil)

    def file_missing(self) -> str:
        (self.folder / self.file).unlink()
        return self.file

    def file_truncated(self) -> str:
        content = (self.folder / self.file).read_bytes()
        (self.folder / self.file).write_bytes(content[: self.draw.randrange(len(content))])
        return self.file

    def file_longer(self) -> str:
        with (self.folder / self.file).open("ab") as stream:
            stream.write(bytes(self.draw.randrange(1, 100)))
        return self.file

    def header_larger_than_file(self) -> str:
        content = (self.folder / self.file).read_bytes()
        length = len(content) + self.draw.randrange(10**9)
        (self.folder / self.file).write_bytes(struct.pack("<Q", length) + content[8:])
        return self.file

    def header_flipped(self) -> str:
        """A bit of the header; where that leaves it the same model, as between two spellings of a number, another."""
        whole = (self.folder / self.file).read_bytes()
        end = 8 + struct.unpack("<Q", whole[:8])[0]
        place = self.draw.randrange(end)
        flipped = bytes([whole[place] ^ 1 << self.draw.randrange(8)])
        (self.folder / self.file).write_bytes(whole[:place] + flipped + whole[place + 1 :])
        return ""  # the file, or the tensor whose name it was: both say where

    def index_elsewhere(self) -> str:
        others = sorted(set(self.names.values()) - {self.file})
        self._write_index(self.names | {self.name: self.draw.choice(others)})
        return self.name

    def index_outside(self) -> str:
        target = self.draw.choice(["../x.safetensors", "/etc/passwd", "x.bin", "a/b.safetensors"])
        self._write_index(self.names | {self.name: target})
        return target

    def index_without_it(self) -> str:
        self._write_index({name: file for name, file in self.names.items() if name != self.name})
        return self.name

    def index_damaged(self) -> str:
        text = (self.folder / INDEX).read_text()
        (self.folder / INDEX).write_text(text[: self.draw.randrange(len(text) - 1)])
        return INDEX

    def twice(self) -> str:
        others = sorted(set(self.names.values()) - {self.file})
        other = self.draw.choice(others)
        tensor = self._load(self.file)[self.name]
        save_file({**self._load(other), self.name: tensor}, self.folder / other)
        return self.name

    def link_out_of_the_folder(self) -> str:
        outside = self.folder.with_name(f"{self.folder.name}-{self.file}")
        (self.folder / self.file).rename(outside)
        (self.folder / self.file).symlink_to(outside)
        return self.file

    def value_flipped_in_the_hubs_cache(self) -> str:
        """There a file is called as its content is hashed."""
        cache = self.folder.with_name(f"{self.folder.name}-cache")
        blobs, snapshot = cache / "blobs", cache / "snapshots" / ("a" * 40)
        blobs.mkdir(parents=True)
        self.folder.rename(cache / "folder")
        snapshot.mkdir(parents=True)
        for file in (cache / "folder").iterdir():
            content = file.read_bytes()
            blob = blobs / hashlib.sha256(content).hexdigest()
            if file.name == self.file:
                place = self.draw.randrange(8 + struct.unpack("<Q", content[:8])[0], len(content))
                # The lowest bit of a mantissa: nothing else could see it.
                place -= place % 4
                content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            blob.write_bytes(content)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
        self.folder = snapshot
        return self.file

    def _load(self, file: str) -> dict[str, Tensor]:
        return load_file(self.folder / file)

    def _edit(self, edit: Callable[[dict[str, Tensor]], object]) -> str:
        tensors = self._load(self.file)
        edit(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.folder / self.file)
        return self.name

    def _write_index(self, names: dict[str, str]) -> None:
        (self.folder / INDEX).write_text(json.dumps({"weight_map": names}))


KINDS = [name for name in vars(Damage) if not name.startswith("_")]


@pytest.mark.parametrize("number", range(ROUNDS))
def test_damaged_folders(number: int, tmp_path: Path) -> None:
    """Planted: without the comparison of types, of shapes, of the index, without the look for what is not finite."""
    draw = random.Random(number)
    done: set[str] = set()
    for index in range(EACH):
        config = EVERY[draw.choice(sorted(EVERY))]
        folder = write_folder(tmp_path / str(index), config, random_weights(config, fused=draw.random() < 0.3), 3)
        kind = KINDS[(EACH * number + index) % len(KINDS)]
        damage = Damage(folder, draw)
        before = load_all(folder)
        said = getattr(damage, kind)()
        done.add(kind)
        answer = refusal(damage.folder)
        if answer is not None:
            assert said in answer, f"{kind}: {answer}"
            assert str(damage.folder) in answer
        else:
            # A bit of the header may be in a place that says nothing.
            assert kind == "header_flipped", kind
            assert load_all(folder).keys() == before.keys()
            assert all(torch.equal(load_all(folder)[name], before[name]) for name in before)
        shutil.rmtree(damage.folder)
    assert len(done) > len(KINDS) * 0.8


def load_all(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
