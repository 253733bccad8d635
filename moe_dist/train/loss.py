"""The loss. One rule for scale: a sum over tokens here, divided once by the valid tokens of the global batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moe_dist.models.precision import full

IGNORE = -100
"""Label of a position that has no target."""


def cross_entropy_sum(logits_BSV: Tensor, labels_BS: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum over valid tokens of the cross-entropy in nats, 0-dim float32; labels of -100 do not count."""
    return F.cross_entropy(
        full(logits_BSV.flatten(0, 1)),
        labels_BS.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
