"""Direct preference optimization: which of two answers is better."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moe_dist.config.sections.base import PositiveFloat, Section


class DpoConfig(Section):
    """Direct preference optimization (DPO, https://arxiv.org/abs/2305.18290), with data.format=preference: chosen
    answers become more probable and rejected ones less, measured against a reference that stays."""

    beta: PositiveFloat = 0.1
    """An answer's reward is beta times its log-probability less that under the reference: smaller goes further."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of the pairs that are taken to be the wrong way round, as label noise has it (conservative DPO)."""
    loss_type: Literal["sigmoid"] = "sigmoid"
    """-log sigmoid(reward of chosen - reward of rejected), mean over pairs."""
    reference: Literal["auto", "base", "start"] = "auto"
    """`base`: the model without its adapters, one more forward pass in every step; `start`: the weights that training
    starts with, whose log-probabilities of all pairs are computed once and kept in output_dir; `auto`: base with new
    adapters, else start."""
