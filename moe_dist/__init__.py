"""moe-dist: train mixture-of-experts language models, the same on a laptop and on a GPU cluster."""

__version__ = "0.1.0"
