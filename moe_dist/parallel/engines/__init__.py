"""How parameters, gradients and moments lie on ranks: replicated, sharded by FSDP, or as DeepSpeed has them."""
