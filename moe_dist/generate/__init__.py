"""Text from a model: a cache of keys and values in blocks, sampling and beams, batches that requests join and leave."""
