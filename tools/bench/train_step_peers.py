"""The other trainers of `train_step.py`: the same decoder, made to learn in the way of each.

`ddp` and `transformers_ep` are `transformers`, `deepspeed` and `autoep` its model under DeepSpeed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {"16 experts top-2": (16, 2, 1024), "64 experts top-8": (64, 8, 256)}
"""Experts, how many of them a token has, their width."""
SIZES = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 64}
SIZES |= {"num_key_value_heads": 4}
LENGTH, SEQUENCES, RATE = 512, 2, 1e-4
Step = Callable[[Any], float]
"""Token ids (sequences, length) to the loss, after one update."""


def model_keys(shape: str) -> dict[str, int]:
    experts, top_k, width = SHAPES[shape]
    return SIZES | {"num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width}


def config_of(shape: str, bf16: bool, late: bool) -> Any:
    from moe_dist.config import load_mapping

    return load_mapping(
        {
            "model": model_keys(shape),
            "data": {"max_seq_length": LENGTH},
            "parallel": {"ep_size": 2, "overlap_grad_reduce": not late},
            "balance": {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "bias_update_rate": 0.0},
            "train": {"bf16": bf16},
        }
    )


def of_transformers(shape: str) -> Any:
    """Its model with the weights that ours begins with."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe_dist.models.huggingface import to_huggingface
    from moe_dist.parallel.mesh import Mesh
    from moe_dist.train.build import build_model

    config = config_of(shape, bf16=False, late=False)
    theirs = Qwen3MoeConfig(
        **model_keys(shape),
        max_position_embeddings=config.model.max_position_embeddings,
        rope_theta=config.model.rope_theta,
        rms_norm_eps=config.model.rms_norm_eps,
        norm_topk_prob=config.model.norm_topk_prob,
        tie_word_embeddings=config.model.tie_word_embeddings,
        experts_implementation="grouped_mm",
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = Qwen3MoeForCausalLM(theirs)
    weights = to_huggingface(build_model(config, Mesh.single()), config.model, fused=True)
    model.load_state_dict(weights)
    return model


def loss_of(model: Any, ids: Any, bf16: bool) -> Any:
    import torch
    import torch.nn.functional as F

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def ddp(shape: str, bf16: bool) -> Step:
    import torch

    model = torch.nn.parallel.DistributedDataParallel(of_transformers(shape), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step(ids: torch.Tensor) -> float:
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model, ids, bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def deepspeed(shape: str, bf16: bool) -> Step:
    import deepspeed as package
    import torch
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

    experts, top_k, width = SHAPES[shape]
    model = of_transformers(shape)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            expert = Qwen3MoeMLP(model.config, intermediate_size=width)
            self.moe = MoE(SIZES["hidden_size"], expert, experts, ep_size=2, k=top_k, capacity_factor=1.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.moe(x)[0]

    for layer in model.model.layers:
        layer.mlp = Layer()
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    settings = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
    }
    engine, *_ = package.initialize(model=model, optimizer=optimizer, config=settings)
    return engine_step(engine, bf16)


def transformers_ep(shape: str, bf16: bool) -> Step:
    """Its own expert parallelism, which comes with FSDP2 for all else."""
    import torch
    from torch.distributed.tensor import DTensor
    from transformers import Qwen3MoeForCausalLM
    from transformers.distributed import DistributedConfig

    spread = DistributedConfig(fsdp_size=2, ep_size=2, ep_implementation="all_to_all")
    how: dict[str, Any] = {
        "distributed_config": spread,
        "experts_implementation": "grouped_mm",
        "attn_implementation": "sdpa",
    }
    folder = Path(tempfile.gettempdir()) / f"train-step-{os.environ['MASTER_PORT']}"  # the same on both
    of_transformers(shape).save_pretrained(folder)  # among several ranks the first alone writes
    torch.distributed.barrier()
    model = Qwen3MoeForCausalLM.from_pretrained(folder, **how).train()
    torch.distributed.barrier()
    shutil.rmtree(folder, ignore_errors=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step(ids: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = loss_of(model, ids, bf16)
        loss.backward()
        squares = torch.zeros(())
        for parameter in model.parameters():  # torch's own clipping refuses gradients of two meshes
            grad = parameter.grad
            squares += (grad.to_local() if isinstance(grad, DTensor) else grad).square().sum()
        torch.distributed.all_reduce(squares)
        scale = float((1.0 / (squares.sqrt() + 1e-6)).clamp(max=1.0))
        for parameter in model.parameters():
            grad = parameter.grad
            (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(scale)
        optimizer.step()
        return float(loss.detach())

    return step


def autoep(shape: str, bf16: bool) -> Step:
    """DeepSpeed's expert parallelism of models of `transformers`."""
    import deepspeed as package
    import torch
    from transformers.utils import output_capturing

    def get(self: dict[str, Any], key: Any, *default: Any) -> Any:
        found = dict.get(self, key if isinstance(key, str) else str(key.__class__), *default)
        return found if default else found or {}

    # DeepSpeed 0.19.8 asks this dict for a name and a default, which transformers 5.24 does not take.
    output_capturing._CanRecordRegistry.get = get
    model = of_transformers(shape)
    settings = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
        "expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "qwen3_moe"},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    engine, *_ = package.initialize(model=model, optimizer=optimizer, config=settings)
    return engine_step(engine, bf16)


def engine_step(engine: Any, bf16: bool) -> Step:
    def step(ids: Any) -> float:
        loss = loss_of(engine, ids, bf16)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


PEERS: dict[str, Callable[[str, bool], Step]] = {
    "ddp": ddp,
    "transformers_ep": transformers_ep,
    "deepspeed": deepspeed,
    "autoep": autoep,
}
