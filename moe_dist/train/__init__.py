"""Build the parts, run the step, run the loop.

`MoETrainer` is the way in from Python; names are resolved when first used, since they load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.train.callbacks import Callback, Request, RunState
    from moe_dist.train.trainer import MoETrainer, TrainingResult

__all__ = ["Callback", "MoETrainer", "Request", "RunState", "TrainingResult"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from moe_dist.train import callbacks, trainer

        return getattr(trainer if hasattr(trainer, name) else callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
