"""The model that a run starts with: built, its first weights read, and held still what is not trained."""

from __future__ import annotations

from typing import Any, NamedTuple

from moe_dist.checkpoint.manager import Checkpoints
from moe_dist.checkpoint.storage import open_storage
from moe_dist.config import Config
from moe_dist.config.trained_weights import ChosenExperts, TrainedWeights
from moe_dist.models.adapter_shapes import sentence
from moe_dist.models.quantized import bytes_sentence
from moe_dist.models.trained_counts import trained_sentence
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.state_bytes import trained_by_pp_rank
from moe_dist.pretrained.adapters import load_adapter
from moe_dist.pretrained.loading import load_pretrained
from moe_dist.train.build import Datasets, build_model
from moe_dist.train.esft import experts_of_task
from moe_dist.train.first_step import FirstStep
from moe_dist.train.run_setup import RunStart


class StartingModel(NamedTuple):
    """This rank's part of the model, and where it comes from."""

    model: Transformer
    chosen: ChosenExperts | None
    """Experts that `experts:esft` stands for."""
    provenance: dict[str, Any] | None
    """What the weights of step 0 were read from; None where they were not read."""


def build_starting_model(
    config: Config,
    mesh: Mesh,
    clock: Clock,
    start: RunStart,
    datasets: Datasets,
    checkpoints: Checkpoints,
    given: Transformer | None,
    progress: FirstStep,
) -> StartingModel:
    """The model as it is before a checkpoint is read into it (collective); what is worth knowing is said by `progress`.

    `given`: as `build_model` has it. Raises ConfigError, and ValueError for weights that do not fit.
    """
    message = progress.say
    model = build_model(config, mesh, clock, given)
    if model.lora is not None:
        message(sentence(config.model, config.lora))
    provenance = None
    if given is None and _reads_pretrained(config, mesh, start):
        progress.at("reading the weights it starts from")
        pretrained = load_pretrained(model, config.model, mesh)
        provenance = pretrained.provenance
        message(str(pretrained))
        model.saves_adapters_alone = model.lora is not None
        if config.lora.quantize is not None:
            message(bytes_sentence(model))
    if config.lora.from_adapter is not None and _starts_afresh(config, mesh, start):
        load_adapter(model, config, mesh)
        message(f"adapters start from {config.lora.from_adapter}")

    trained, chosen = TrainedWeights.of(config), None
    if trained.are_measured:
        progress.at("measuring which experts the data's tokens go to")
        has_weights = given is not None or provenance is not None
        chosen = experts_of_task(config, mesh, model, datasets.train, checkpoints, start.resume, has_weights, message)
        trained = TrainedWeights.of(config, chosen)
        trained_by_pp_rank(config, chosen)
        model.freeze(trained)
    if not trained.are_all:
        message(trained_sentence(config, trained))
    return StartingModel(model, chosen, provenance)


def _reads_pretrained(config: Config, mesh: Mesh, start: RunStart) -> bool:
    """Whether weights are to be read from `model.from_pretrained`: not when the run goes on from a checkpoint, unless
    that has adapters alone."""
    return config.model.from_pretrained is not None and (bool(config.lora.r) or _starts_afresh(config, mesh, start))


def _starts_afresh(config: Config, mesh: Mesh, start: RunStart) -> bool:
    """Whether there is no checkpoint to go on from."""
    if start.resume == "auto":
        storage = open_storage(config.checkpoint.folder or config.train.output_dir)
        return mesh.ask_rank_zero(lambda: not storage.candidates())
    return start.resume == "never"
