"""Plain checkpoints: model, optimizer and counters of one step in a folder, written by every rank, loadable at any
expert-parallel size.

A folder is written under a temporary name and renamed when all ranks are done; what has its final name is complete.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.models.transformer import Transformer
from moe_dist.parallel.logical import is_stacked_expert, like_parameter
from moe_dist.parallel.mesh import Mesh

logger = logging.getLogger("moe_dist")
STATE_FILE = "trainer_state.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")

NamedState = Iterable[tuple[str, str, list[Tensor], bool]]
"""(parameter name, key, tensors, whether they are one per expert) as `Optimizer.named_state` yields them."""


class LogicalState:
    """Tensors by logical name for writing or reading in place, with the copies that reading must put back."""

    def __init__(self, model: Transformer, optimizer_state: NamedState, mesh: Mesh) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.put_back: list[tuple[list[Tensor], Tensor]] = []
        parameters = dict(model.named_parameters())
        for name, tensor in model.state_dict().items():
            self._add(f"model.{name}", tensor, parameters.get(name), name, model, mesh)
        for name, key, tensors, split in optimizer_state:
            tensor = tensors[0]
            if split:
                tensor = torch.stack(tensors)
                self.put_back.append((tensors, tensor))
            self._add(f"optimizer.{name}.{key}", tensor, parameters[name], name, model, mesh)

    def _add(
        self, key: str, tensor: Tensor, parameter: Tensor | None, name: str, model: Transformer, mesh: Mesh
    ) -> None:
        if parameter is not None and tensor.ndim:
            tensor = like_parameter(tensor, parameter, is_stacked_expert(name, model), mesh)
        self.tensors[key] = tensor

    def finish_reading(self) -> None:
        for tensors, whole in self.put_back:
            for tensor, value in zip(tensors, whole.unbind(0), strict=True):
                tensor.copy_(value)


class PlainCheckpoints:
    """Saves, finds, loads and prunes `checkpoint-<step>` folders in a run folder."""

    def __init__(self, output_dir: Path, mesh: Mesh, save_total_limit: int | None = None) -> None:
        self.output_dir, self.mesh, self.limit = output_dir, mesh, save_total_limit

    def save(self, step: int, state: LogicalState, counters: dict[str, Any]) -> Path:
        """Write one step (collective). Returns its folder."""
        import torch.distributed.checkpoint as dcp

        final, temporary = self.output_dir / f"checkpoint-{step}", self.output_dir / f".checkpoint-{step}.tmp"
        if self.mesh.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.mesh.barrier()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: we know
            dcp.save(state.tensors, checkpoint_id=str(temporary), no_dist=self.mesh.sparse is None)
        if self.mesh.rank == 0:
            (temporary / STATE_FILE).write_text(json.dumps({"step": step, **counters}, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            self._prune()
        self.mesh.barrier()
        return final

    def load(self, folder: Path, state: LogicalState, model: dict[str, Any]) -> dict[str, Any]:
        """Read a step into `state`'s tensors in place (collective). Returns the counters it was saved with.

        `model`: the model section of this run. Raises ValueError naming the first key that differs.
        """
        import torch.distributed.checkpoint as dcp

        counters = read_counters(folder)
        for key, value in model.items():
            if counters["model"].get(key, value) != value:
                raise ValueError(
                    f"model.{key}={value}: {folder} was saved with {counters['model'][key]}; set it back, or "
                    "checkpoint.resume=never to start afresh"
                )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state.tensors, checkpoint_id=str(folder), no_dist=self.mesh.sparse is None)
        state.finish_reading()
        return counters

    def complete(self) -> list[Path]:
        """Folders of complete steps, oldest first."""
        return list_checkpoints(self.output_dir)

    def _prune(self) -> None:
        if self.limit is not None:
            for folder in self.complete()[: -self.limit]:
                shutil.rmtree(folder)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete `checkpoint-<step>` folders of a run folder, oldest first."""
    found = [
        (int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _FOLDER.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


def read_counters(folder: Path) -> dict[str, Any]:
    """The counters of a checkpoint. Raises ValueError naming the folder when it is none."""
    file = folder / STATE_FILE
    if not file.is_file():
        near = ", ".join(path.name for path in list_checkpoints(folder.parent)) or "none"
        raise ValueError(f"checkpoint.resume={folder}: no complete checkpoint there (complete ones beside it: {near})")
    return json.loads(file.read_text())
