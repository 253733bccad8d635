"""Weights held still in a model that is trained."""

from __future__ import annotations

from torch import nn

from moe_dist.config.trained_weights import TrainedWeights


def freeze_weights(model: nn.Module, trained: TrainedWeights) -> dict[str, frozenset[int]]:
    """Freeze the weights of `model`, a whole one or a rank's part, that are not trained.

    Returns, by name of each parameter that is trained in part, the global ids of the experts that are. It has a
    gradient on every rank, also where no expert of these lies: all ranks of `ep` must run the same backward pass. So
    has a parameter of one expert of a person's own class, which has none of these ids, beside one that is trained.
    """
    in_part: dict[str, frozenset[int]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = trained.part(name)
        if isinstance(part, frozenset):
            in_part[name] = part
        elif not part and any(map(trained.part, trained.experts_of_module(name))):
            in_part[name] = frozenset()
        else:
            parameter.requires_grad_(part)
    return in_part
