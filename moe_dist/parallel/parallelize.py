"""Apply parallelism to a model from outside. The order of the steps is the documentation."""

from __future__ import annotations

import math
from typing import Any

import torch

from moe_dist.config import Config, ConfigError
from moe_dist.config.trained_weights import TrainedWeights
from moe_dist.models.experts import Experts
from moe_dist.models.kernel_choice import require_kernels
from moe_dist.models.moe import LocalDispatcher
from moe_dist.models.quantized import quantize_frozen
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.dispatch_choice import chosen_dispatcher
from moe_dist.parallel.dispatchers import build_dispatcher
from moe_dist.parallel.expert_copies import ExpertCopies
from moe_dist.parallel.mesh import Mesh


def build_part(config: Config, mesh: Mesh, clock: Clock | None = None) -> Transformer:
    """This rank's part of the model, on the meta device: it has no weights yet."""
    with torch.device("meta"):
        if mesh.layout.pp_size > 1:
            from moe_dist.parallel.pipeline import PipelinedTransformer  # schedules take long to import

            model: Transformer = PipelinedTransformer(config, mesh)
        else:
            model = Transformer(config.model, config.balance)
        model.add_adapters(config.lora)
    parallelize(model, config, mesh, clock)
    if config.lora.quantize is not None:
        if config.model.from_pretrained is None:
            raise ConfigError(
                f"lora.quantize={config.lora.quantize}: weights are quantized as they are read; needs "
                "model.from_pretrained"
            )
        quantize_frozen(model, config.lora.quantize, mesh.device)
    model.freeze(TrainedWeights.of(config))
    return model


def parallelize(model: Transformer, config: Config, mesh: Mesh, clock: Clock | None = None) -> None:
    """Make `model` (best on the meta device) this rank's part of the model, in place.

    1. Experts over `ep`: keep this rank's block of every layer's, and reach the others by `parallel.dispatcher`, or by
       copies of hot ones; how many rows they compute at once, by which kernels and in which precision.
    2. Recomputation of activations.
    3. Compilation of the dense parts.
    """
    ep_group, train = mesh.group("ep"), config.train
    require_kernels(train.kernels, mesh.device.type)
    even_share = train.per_device_train_batch_size * config.data.max_seq_length * config.model.num_experts_per_tok
    static = config.parallel.dispatcher == "static"
    for moe in model.moe_layers():
        if isinstance(moe.experts, Experts):
            moe.experts.chunk_rows = math.ceil(train.expert_chunk_factor * even_share)
            moe.experts.kernels, moe.experts.precision = train.kernels, train.expert_precision
        if ep_group is None:
            moe.reach_experts_by(LocalDispatcher(moe.num_experts, train.kernels, static=static))
        else:
            local = mesh.layout.experts_of(mesh.ep_rank, moe.num_experts)
            moe.experts.shard(local.start, len(local))
            name, _ = chosen_dispatcher(config, None if mesh.hosts is None else mesh.hosts.within.size())
            casts = isinstance(moe.experts, Experts) and moe.experts.casts_rows
            moe.dispatch_chunks = config.parallel.dispatch_chunks
            choices: dict[str, Any] = {"casts": casts, "kernels": train.kernels}
            moe.reach_experts_by(
                build_dispatcher(name, ep_group, moe.num_experts, moe.layer, clock, mesh.hosts, **choices)
            )
            if config.parallel.replicated_experts:
                where: dict[str, Any] = {"device": mesh.device, "kernels": train.kernels}
                moe.copies = ExpertCopies(ep_group, moe.num_experts, moe.layer, clock, **where)
    model.gradient_checkpointing_enable(train.gradient_checkpointing)
    if train.torch_compile:
        for block in model.blocks():
            block.compile_dense()
