"""A model's first weights from a Hugging Face folder: every rank reads the slices that it holds, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.config import ModelConfig
from moe_dist.config.families import families
from moe_dist.models.experts import Experts
from moe_dist.models.quantized import QuantizedWeight, quantized_weights
from moe_dist.models.tensor_names import Names, Part, untied_head
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.pretrained.provenance import changed, provenance, revision_of, sha256_of
from moe_dist.pretrained.source import WHOLE, Contents, Held, SliceReader, in_one_line, pieces, read_folder, readable

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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

    A selection bias that the family has no place for stays as it is. A collective; raises ValueError on every rank,
    naming all tensors that are missing, unexpected, ill-shaped, of another type, or not finite anywhere; the model is
    then of no use.
    """
    assert config.from_pretrained is not None
    folder = Path(config.from_pretrained)
    revisions = {revision for revision in mesh.from_all(revision_of(folder)) if revision}
    if len(revisions) > 1:  # two hosts have asked the hub at different times
        raise ValueError(
            f"model.from_pretrained={folder}: ranks have several revisions ({', '.join(sorted(revisions))}); name one "
            "for all: org/name@revision"
        )
    contents = mesh.ask_rank_zero(lambda: read_folder(folder, config))
    names = Names(config, families()[contents.family])
    reader, problems = SliceReader(folder), []
    targets: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    targets |= {name: weight for name, _, weight in quantized_weights(model)}
    held = held_by(model)
    for entry, first, count, part in pieces(readable(contents, names), held):
        try:
            values = reader.read(entry, first, count)
        except Exception as error:  # of safetensors and of the system, for a file that has changed since
            problems.append(f"{entry.name}: cannot be read ({entry.file}): {error}")
            continue
        if not torch.isfinite(torch.stack(torch.aminmax(values))).all():
            problems.append(f"{entry.name}: a value that is not finite ({entry.file})")
        target, experts = targets[part.ours], held(part.ours) or WHOLE
        if isinstance(target, QuantizedWeight):
            target.write(part.to_ours(values), _offset(part, experts))
        else:
            _box(target.data, part, experts).copy_(part.to_ours(values))
    if not contents.problems and not problems:
        problems += [f"{name}: came only in part" for name, _, one in quantized_weights(model) if not one.is_filled]
    if config.tie_word_embeddings and HEAD in contents.tensors and not contents.problems and mesh.rank == 0:
        head, embedding = (contents.tensors[name] for name in (HEAD, EMBEDDING))
        if not torch.equal(*(reader.read(entry, 0, config.vocab_size) for entry in (head, embedding))):
            problems.append(untied_head())
    hashes = {} if contents.problems else _hashes(folder, contents, mesh)
    problems += changed(folder, hashes)
    found = sorted({line for lines in mesh.from_all(problems) for line in lines} | set(contents.problems))
    if found:
        raise ValueError(f"model.from_pretrained={folder}: {in_one_line(found)}")
    return Pretrained(folder, len(contents.tensors), mesh.from_all(reader.bytes_read), provenance(folder, hashes))


def held_by(model: Transformer) -> Held:
    """What a rank's part of the model holds."""
    stacks = {
        f"{prefix}.{name}": range(module.first_expert, module.first_expert + module.num_local)
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters()  # of adapters beside them, too
    }
    for name, module, _ in quantized_weights(model):
        if isinstance(module, Experts):
            stacks[name] = range(module.first_expert, module.first_expert + module.num_local)
    # Of tied embeddings only one; a selection bias is a buffer.
    names = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    names |= {name for name, _, _ in quantized_weights(model)}
    return lambda ours: stacks.get(ours, WHOLE) if ours in names else None


def _box(tensor: Tensor, part: Part, experts: range) -> Tensor:
    """Where in a rank's tensor a part of ours goes, as a view."""
    if experts == WHOLE:
        return tensor
    return tensor[tuple(slice(o, o + n) for o, n in zip(_offset(part, experts), part.size, strict=True))]


def _offset(part: Part, experts: range) -> tuple[int, ...]:
    return part.offset if experts == WHOLE else (part.offset[0] - experts.start, *part.offset[1:])


def _hashes(folder: Path, contents: Contents, mesh: Mesh) -> dict[str, str]:
    """SHA-256 of every file; each hashed by one rank. "" for one that cannot be read, which reading has named."""
    mine = sha256_of(folder, contents.files[mesh.rank :: mesh.layout.world_size])
    return {file: digest for some in mesh.from_all(mine) for file, digest in some.items()}
