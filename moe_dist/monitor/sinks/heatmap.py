"""The picture of expert load: one row per layer, one column per expert. L layers, E experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_dist.monitor.expert_stats import load_ratios
from moe_dist.monitor.records import LayerRecord

COLD, FAIR, HOT = (49, 92, 160), (244, 242, 236), (190, 74, 38)
"""Colours at load ratio 0, 1 and 2 or more: fixed, so that pictures of different steps compare."""

MAX_PIXELS = 1024
MAX_CELL = 16


def load_heatmap(layers: Sequence[LayerRecord]) -> npt.NDArray[np.uint8]:
    """Load ratios as an image (height, width, 3) uint8: layers top to bottom, experts left to right."""
    width = max(len(layer.tokens_per_expert) for layer in layers)
    ratios_LE = np.zeros((len(layers), width))
    for row, layer in enumerate(layers):
        ratios_LE[row, : len(layer.tokens_per_expert)] = load_ratios(layer)
    cell = max(1, min(MAX_CELL, MAX_PIXELS // width))
    return colour(ratios_LE).repeat(cell, axis=0).repeat(cell, axis=1)


def colour(ratios: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """(...) ratios -> (..., 3) uint8: blue below the fair share, near white at it, red above."""
    position = np.clip(ratios, 0.0, 2.0)
    channels = [np.interp(position, (0.0, 1.0, 2.0), values) for values in zip(COLD, FAIR, HOT, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
