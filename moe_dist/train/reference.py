"""Log-probabilities of all preference pairs under the weights that a run starts with.

They are measured once, and kept in the run folder with hashes of the weights and of the pairs that they are of. A run
that goes on has other weights, and must find them there.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe_dist.checkpoint.run_folder import REFERENCE
from moe_dist.checkpoint.storage.manifest import CheckpointError
from moe_dist.config import Config
from moe_dist.data.identity import identity
from moe_dist.data.loader import eval_batches
from moe_dist.data.packing import PreferenceDataset
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.engines.base import Engine
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.build import Datasets
from moe_dist.train.dpo import Dpo

LogProbs = dict[str, Tensor]
"""By part of the data, (P, 2) float64."""


def measure(dpo: Dpo, dataset: PreferenceDataset, config: Config, mesh: Mesh) -> Tensor:
    """(P, 2) of all pairs under the model as it is, the same on every rank (collective)."""
    size = config.train.per_device_eval_batch_size or config.train.per_device_train_batch_size
    found = torch.zeros(dataset.num_pairs, 2, dtype=torch.float64, device=mesh.device)
    for batch in eval_batches(dataset, size, mesh.layout.dp_size, mesh.dp_rank):
        pairs = dpo.measured(batch.to(mesh.device, non_blocking=True)).pairs
        assert pairs is not None
        assert pairs.reference is not None
        found[pairs.numbers] = pairs.reference  # zeros where the last stage is elsewhere
    return mesh.sum_over("world", found).cpu()


class StartReference:
    """Log-probabilities under the start, of the training and the validation pairs."""

    def __init__(self, config: Config, mesh: Mesh, datasets: Datasets) -> None:
        self.config, self.mesh = config, mesh
        self.parts = {"train": datasets.train, "validation": datasets.validation}
        self._found: LogProbs = {}
        self._hashes: dict[str, str] = {}
        self._is_new = False
        self.weights: str | None = None
        """Hash of the weights that it is of; None before `prepare`."""

    @property
    def path(self) -> Path:
        return self.config.train.output_dir / REFERENCE

    def prepare(
        self, dpo: Dpo, model: Transformer, engine: Engine, start: str | None, message: Callable[[str], None]
    ) -> None:
        """Give the datasets their reference (collective): what lies in the run folder if it is of these weights and
        pairs, else what is measured now. `start`: hash of the weights of step 0, of a run that goes on.

        Raises CheckpointError on every rank where a run that goes on does not find it.
        """
        self.weights = start or self._hash(model, engine)
        datasets = {name: one for name, one in self.parts.items() if isinstance(one, PreferenceDataset)}
        hashes = {name: str(identity(one, ())["tokens"]) for name, one in datasets.items()}
        found, reason = self.mesh.ask_rank_zero(lambda: self._read(hashes))
        if found is None and start is not None:
            raise CheckpointError(
                f"dpo.reference=start: {reason}, and the weights have moved on since; bring {self.path} and its data "
                "back, or start afresh with checkpoint.resume=never"
            )
        if found is None:
            began = time.perf_counter()
            found = {name: measure(dpo, one, self.config, self.mesh) for name, one in datasets.items()}
            self._is_new = True
            number, seconds = sum(map(len, found.values())), time.perf_counter() - began
            message(f"reference: log-probabilities of {number:,} pairs under the start, measured in {seconds:.1f} s")
        else:
            message(f"reference: log-probabilities of {sum(map(len, found.values())):,} pairs of {self.path}")
        self._found, self._hashes = found, hashes
        for name, one in datasets.items():
            one.reference = found[name].numpy()

    def _hash(self, model: Transformer, engine: Engine) -> str:
        """Of the weights, and of what else decides what they say."""
        config = self.config
        how = {
            "model": config.model.model_dump(mode="json", exclude={"from_pretrained"}),
            "temperature": config.balance.router_temperature,
            "bias": config.balance.use_bias,
            "precision": [config.train.bf16, config.train.pure_bf16],
        }
        from moe_dist.parallel.engines.weights_hash import weights_hash  # brings torch's sharding, for a second

        weights = weights_hash(model, engine, model.stacked_names(), model.masters, self.mesh)
        return hashlib.sha256(f"{weights}|{json.dumps(how, sort_keys=True)}".encode()).hexdigest()

    def _read(self, hashes: dict[str, str]) -> tuple[LogProbs | None, str]:
        """What lies in the run folder, or why it is not what is wanted (rank 0)."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), "pt") as file:
                noted = file.metadata() or {}
                if noted.get("weights") != self.weights:
                    return None, f"{self.path} is of other weights"
                if other := [name for name, value in hashes.items() if noted.get(name) != value]:
                    return None, f"{self.path} is of other pairs ({', '.join(other)})"
                return {name: file.get_tensor(name) for name in hashes}, ""
        except FileNotFoundError:
            return None, f"{self.path} is not there"
        except (OSError, SafetensorError) as error:
            return None, f"{self.path} cannot be read ({error})"

    def keep(self) -> None:
        """Write it into the run folder, on rank 0: what is new, or has been set aside with an earlier run."""
        if self.mesh.rank != 0 or (not self._is_new and self.path.exists()):
            return
        from safetensors.torch import save_file

        aside = self.path.with_name(f"{self.path.name}.part")
        save_file(self._found, aside, {"weights": str(self.weights), **self._hashes})
        os.replace(aside, self.path)
