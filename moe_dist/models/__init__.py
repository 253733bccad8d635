"""A transformer that could run alone: imports torch, never torch.distributed."""
