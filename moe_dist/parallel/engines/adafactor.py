"""`Adafactor` of `transformers`, the one that `TrainingArguments` means by this name: torch's own scales the rate by
the size of the weights. Seconds to import, since `transformers` imports whatever else it knows here."""

import logging

# Of what it imports warns of a product in 4 bits for CPUs, from another package, which is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from transformers.optimization import Adafactor  # noqa: E402

__all__ = ["Adafactor"]
