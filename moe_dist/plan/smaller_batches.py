"""Less room than a run file hopes for: smaller micro-batches that keep the training the same. No torch."""

from __future__ import annotations

from pydantic import ValidationError

from moe_dist.config import Config


def halved(config: Config) -> Config | None:
    """`config` with micro-batches of half the size or less, and as many more; None where none are smaller.

    Ranks take as many sequences a step as before, and as many are evaluated.
    """
    train = config.train
    size = train.per_device_train_batch_size
    for smaller in range(size // 2, 0, -1):
        each, left = divmod(size * train.gradient_accumulation_steps, smaller)
        if left:
            continue
        tree = config.model_dump()
        tree["train"] |= train.micro_batches(smaller, each)
        try:
            return Config.model_validate(tree)
        except ValidationError:
            continue  # a schedule, or a file of DeepSpeed's, that wants other numbers
    return None


def batches(config: Config, before: Config) -> str:
    """What has become of the micro-batches, in words."""
    now, then = (
        f"{one.train.gradient_accumulation_steps} x {one.train.per_device_train_batch_size}" for one in (config, before)
    )
    return f"micro-batches of {now} sequences on each replica instead of {then} (train.auto_find_batch_size)"
