"""Not enough memory: was it that, and what to change. Imports no torch."""

from __future__ import annotations

LESS = (
    "for less memory change, in this order, train.per_device_train_batch_size (down), train.gradient_checkpointing "
    "(full), parallel.zero_stage (up), parallel.ep_size (up), data.max_seq_length (down), parallel.cpu_offload (true)"
)
"""The keys, those first that cost the least; docs/running.md has a table."""
_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory")
"""In the words of CUDA, of PyTorch on CPU, and of the system."""


def advice(error: BaseException) -> str:
    """What to add to the error's own words; "" when memory was not what it lacked."""
    lacks = isinstance(error, MemoryError) or any(words in str(error).lower() for words in _WORDS)
    return f"; {LESS}" if lacks else ""
