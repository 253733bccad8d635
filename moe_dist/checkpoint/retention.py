"""Which checkpoints stay. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def to_remove(
    steps: Sequence[int],
    *,
    limit: int | None,
    keep_every: int = 0,
    metrics: Mapping[int, float] | None = None,
    greater_is_better: bool = False,
) -> list[int]:
    """Committed steps that may go, the oldest first; `steps` counts committed ones only.

    `limit` stay: the newest, or with `metrics` (step -> value) the best, those without a value last. Besides these
    the newest always stays, and so do multiples of `keep_every`. No limit: nothing goes.
    """
    if limit is None or not steps:
        return []
    ordered = sorted(steps)
    if metrics is None:
        kept = set(ordered[-limit:])
    else:
        sign = -1.0 if greater_is_better else 1.0
        by_value = sorted(ordered, key=lambda step: (step not in metrics, sign * metrics.get(step, 0.0), -step))
        kept = set(by_value[:limit])
    kept.add(ordered[-1])
    if keep_every:
        kept |= {step for step in ordered if step % keep_every == 0}
    return [step for step in ordered if step not in kept]
