"""A model's first weights from a Hugging Face folder: every rank reads the slices that it holds, and nothing else."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.config import ModelConfig
from moe_dist.config.huggingface import architecture_differences, model_of, pretrained_config
from moe_dist.models.experts import Experts
from moe_dist.models.huggingface import Part, untied_head
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.pretrained.source import DTYPES, Contents, Entry, SliceReader, read_contents

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_NAMED = 20


@dataclass(frozen=True)
class Pretrained:
    """What was read. `bytes_read`: by every rank; `provenance`: folder, revision and SHA-256 of the files."""

    folder: Path
    num_tensors: int
    bytes_read: list[int]
    provenance: dict[str, Any]

    def __str__(self) -> str:
        least, most = min(self.bytes_read) / 1e6, max(self.bytes_read) / 1e6
        each = f"{most:,.1f} MB" if least == most else f"{least:,.1f} to {most:,.1f} MB"
        files = sum(name.endswith(".safetensors") for name in self.provenance["files"])
        where = f"{files} file{'s' if files > 1 else ''} of {self.folder}"
        return f"starts from {where}: {self.num_tensors} tensors, {each} read by each rank"


@torch.no_grad()
def load_pretrained(model: Transformer, config: ModelConfig, mesh: Mesh) -> Pretrained:
    """Set every weight of `model`, a rank's part that is whole, not sharded yet, from `config.from_pretrained`.

    Selection biases stay as they are. A collective; raises ValueError on every rank, naming all tensors that are
    missing, unexpected, ill-shaped, of another type, or not finite anywhere; the model is then of no use.
    """
    assert config.from_pretrained is not None
    folder = Path(config.from_pretrained)
    contents = mesh.ask_rank_zero(lambda: _contents(folder, config))
    reader, problems = SliceReader(folder), []
    for target, entry, first, part in _slices(model, contents, config):
        try:
            values = reader.read(entry, first, part.shape[0])
        except Exception as error:  # of safetensors and of the system, for a file that has changed since
            problems.append(f"{entry.name}: cannot be read ({entry.file}): {error}")
            continue
        if not torch.isfinite(torch.stack(torch.aminmax(values))).all():
            problems.append(f"{entry.name}: a value that is not finite ({entry.file})")
        target.copy_(part.to_ours(values))
    if config.tie_word_embeddings and HEAD in contents.tensors and not contents.problems and mesh.rank == 0:
        head, embedding = (contents.tensors[name] for name in (HEAD, EMBEDDING))
        if not torch.equal(*(reader.read(entry, 0, config.vocab_size) for entry in (head, embedding))):
            problems.append(untied_head())
    found = sorted({line for lines in mesh.from_all(problems) for line in lines} | set(contents.problems))
    if found:
        more = f"; and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
        raise ValueError(f"model.from_pretrained={folder}: {'; '.join(found[:MAX_NAMED])}{more}")
    read = mesh.from_all(reader.bytes_read)
    return Pretrained(folder, len(contents.tensors), read, _provenance(folder, contents, mesh))


def _contents(folder: Path, config: ModelConfig) -> Contents:
    """Raises ValueError when the folder's model is another, or has no weights that can be read."""
    said = f"model.from_pretrained={folder}"
    wrong = architecture_differences(config, model_of(pretrained_config(folder, said)))
    if wrong:
        raise ValueError(f"{said}: the run's model is another: {', '.join(wrong)}")
    return read_contents(folder, config)


def _slices(model: Transformer, contents: Contents, config: ModelConfig) -> Iterator[tuple[Tensor, Entry, int, Part]]:
    """(where it goes, tensor of the folder, its first row to be read, what these rows are) for all this rank holds.

    In the order of files, so that each is opened once. What the folder has not, or has in another shape, is left out.
    """
    targets = dict(model.named_parameters())  # of tied embeddings only once
    held = {
        f"{prefix}.{name}": (module.first_expert, module.num_local)
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters(recurse=False)
    }
    wanted = contents.parts(config)
    for name in sorted(wanted, key=lambda name: getattr(contents.tensors.get(name), "file", "")):
        part, entry = wanted[name], contents.tensors.get(name)
        if part.ours not in targets or entry is None or tuple(entry.shape) != part.shape or entry.dtype not in DTYPES:
            continue
        target = targets[part.ours].data
        if part.ours not in held:
            yield target, entry, 0, part
        elif (cut := part.of_experts(*held[part.ours])) is not None:
            mine, first = cut
            start = (mine.offset[0] - held[part.ours][0], *mine.offset[1:])
            box = target[tuple(slice(o, o + n) for o, n in zip(start, mine.size, strict=True))]
            yield box, entry, first if len(mine.shape) == len(mine.size) else 0, mine


def _provenance(folder: Path, contents: Contents, mesh: Mesh) -> dict[str, Any]:
    """Folder, revision where the hub's cache names it, and the hash of every file; each hashed by one rank."""
    files = sorted({entry.file for entry in contents.tensors.values()} | {"config.json"})
    mine = {}
    for file in files[mesh.rank :: mesh.layout.world_size]:
        with (folder / file).open("rb") as stream:
            mine[file] = hashlib.file_digest(stream, "sha256").hexdigest()
    hashes: dict[str, str] = {}
    for some in mesh.from_all(mine):
        hashes |= some
    revision = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", str(folder))
    return {"folder": str(folder), "revision": revision[1] if revision else None, "files": hashes}
