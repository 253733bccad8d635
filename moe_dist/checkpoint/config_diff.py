"""What is different between the configuration of a checkpoint and that of the run that goes on from it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

FREE = (
    "checkpoint.",
    "launch.",
    "model.from_pretrained",
    "monitor.",
    "parallel.",
    "data.dataloader",
    "data.on_change",
    "data.on_error",
    "data.path",
    "data.validation_path",
    "train.auto_find_batch_size",
    "train.callbacks",
    "train.deterministic",
    "train.divergence",
    "train.early_stopping",
    "train.eval_",
    "train.gradient_checkpointing",
    "train.kernels",
    "train.max_nonfinite_steps",
    "train.max_steps",
    "train.max_time",
    "train.num_train_epochs",
    "train.on_callback_error",
    "train.on_nonfinite",
    "train.output_dir",
    "train.per_device_eval_batch_size",
    "train.sample_",
    "train.torch_compile",
)
"""Keys that do not change what a step computes (but for rounding).

The end of a run may always be moved: a rate that falls towards it then falls towards the new one, and the change is
shown. Where the data lies may change; whether it is the same data is another question (`data.on_change`).
"""
_ADAMW = ("adamw_torch_fused", "adamw_torch")
ONLY_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    **{f"dpo.{key}": ("data.format", ("preference",)) for key in ("beta", "label_smoothing", "loss_type", "reference")},
    "optimizer.adam_beta1": ("optimizer.optim", _ADAMW),
    "optimizer.adam_beta2": ("optimizer.optim", _ADAMW),
    "optimizer.adam_epsilon": ("optimizer.optim", _ADAMW),
    "optimizer.momentum": ("optimizer.optim", ("sgd",)),
    "optimizer.num_cycles": ("optimizer.lr_scheduler_type", ("cosine_with_restarts",)),
}
"""Keys that nothing reads unless another key has one of these values: another default of theirs changes nothing."""
GLOBAL_BATCH = "global batch size"
_BATCH = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")


class Change(NamedTuple):
    """One key with another value. `free`: training goes on as it would have."""

    key: str
    before: Any
    now: Any
    free: bool

    def __str__(self) -> str:
        return f"{self.key}={_short(self.now)} (saved with {_short(self.before)})"


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], saved_dp: int, dp: int) -> list[Change]:
    """Keys of both trees with different values. `saved_dp`, `dp`: replicas then and now, for the global batch."""
    before, after = dict(_flat(saved)), dict(_flat(now))
    acts = after.get("balance.act") == "on"  # once per logging interval
    found = [
        Change(key, before[key], after[key], key.startswith(FREE) and not (acts and key == "monitor.logging_steps"))
        for key in after
        if key in before and key not in _BATCH and before[key] != after[key] and _is_read(key, after)
    ]
    size_before, size = _product(before, saved_dp), _product(after, dp)
    if size_before != size:
        found.append(Change(GLOBAL_BATCH, size_before, size, False))
    return found


def _is_read(key: str, tree: Mapping[str, Any]) -> bool:
    other, values = ONLY_WITH.get(key, (key, ()))
    return not values or tree.get(other) in values


def micro_batch_change(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What another size of the micro-batches does to a loss that is counted over each; None: nothing."""
    before, after = dict(_flat(saved)), dict(_flat(now))
    size, scope = _BATCH[0], "balance.aux_loss_scope"
    if before.get(size) == after[size]:
        return None
    if after.get("model.router") == "expert_choice":
        return (
            f"{size}={after[size]} (saved with {before.get(size)}) changes which tokens experts choose, which "
            "model.router=expert_choice decides for each micro-batch"
        )
    counts = after.get(scope) == "micro_batch" and after.get("balance.router_aux_loss_coef")
    if not counts:
        return None
    return (
        f"{size}={after[size]} (saved with {before.get(size)}) changes the load-balancing loss, which "
        f"{scope}=micro_batch counts over each micro-batch; sequence and global_batch do not depend on it"
    )


def global_batch(config: Mapping[str, Any], dp: int) -> int:
    """Samples in one step of a saved configuration on `dp` replicas."""
    return _product(dict(_flat(config)), dp)


def _product(tree: Mapping[str, Any], replicas: int) -> int:
    size = replicas
    for key in _BATCH:
        size *= tree.get(key, 1)
    return size


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
