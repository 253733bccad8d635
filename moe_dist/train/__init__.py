"""Build the parts, run the step, run the loop.

`MoETrainer` is the way in from Python; it is resolved when first used, since it loads torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.train.trainer import MoETrainer, TrainingResult

__all__ = ["MoETrainer", "TrainingResult"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from moe_dist.train import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
