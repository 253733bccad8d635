"""What the ways of tokens to experts on other ranks need: keys beside `parallel.dispatcher`, `expert_placement` and
`replicated_experts`.

Called by `checks`; imports no torch.
"""

from __future__ import annotations

from moe_dist.config.sections.all import Sections
from moe_dist.config.sections.lora import ALL_LINEAR, EXPERT_TARGETS
from moe_dist.config.sections.trained import WeightPattern


def check_dispatch(config: Sections) -> None:
    """Hosts, kernels, places, and experts that can move or be copied."""
    parallel = config.parallel
    if parallel.dispatcher == "hierarchical" and parallel.ranks_per_host is not None:
        there = parallel.ranks_per_host
        if there == 1 or parallel.ep_size <= there or parallel.ep_size % there:
            raise ValueError(
                f"parallel.dispatcher=hierarchical: parallel.ep_size={parallel.ep_size} is not several hosts of "
                f"several ranks (parallel.ranks_per_host={there}); allowed: dedup, or a multiple of 2 or more above it"
            )
    _check_deepep(config)
    _check_static(config)
    _check_placement(config)
    _check_copies(config)


def _check_deepep(config: Sections) -> None:
    """What the kernels of DeepEP can move."""
    model, train, said = config.model, config.train, f"parallel.dispatcher={config.parallel.dispatcher}"
    if config.parallel.dispatcher != "deepep" or config.parallel.ep_size == 1:
        return
    if not train.bf16 and not train.pure_bf16:
        raise ValueError(f"{said}: it moves bfloat16 alone; set train.bf16 or train.pure_bf16, or take auto")
    if train.bf16 and model.expert not in ("swiglu", "swiglu_clamped"):
        raise ValueError(
            f"{said}: it moves bfloat16 alone, and under train.bf16 model.expert={model.expert} computes in float32 or "
            "as it likes; take train.pure_bf16, or auto"
        )
    if model.hidden_size % 8:
        raise ValueError(f"{said}: model.hidden_size={model.hidden_size} must be a multiple of 8; or take auto")
    if train.deterministic:
        raise ValueError(
            f"{said}: nobody has shown that its sums have a fixed order, as train.deterministic=true wants"
        )
    if config.launch.device == "cpu":
        raise ValueError(f"{said}: launch.device=cpu; it moves rows between GPUs; take auto")


def _check_static(config: Sections) -> None:
    """Places whose number is known before any token has chosen."""
    parallel, said = config.parallel, f"parallel.dispatcher={config.parallel.dispatcher}"
    if parallel.dispatcher != "static":
        return
    if config.balance.capacity_factor is None:
        raise ValueError(f"{said}: experts have places by balance.capacity_factor; set it (1.25, say), or take auto")
    if parallel.dispatch_chunks > 1:
        raise ValueError(
            f"{said}: each of parallel.dispatch_chunks={parallel.dispatch_chunks} pieces would need all places; set "
            "it to 1, or take auto"
        )
    if parallel.expert_placement != "off":
        raise ValueError(
            f"{said}: ranks get as many rows wherever experts are; set parallel.expert_placement to off, or take auto"
        )


def _check_placement(config: Sections) -> None:
    """Experts that an engine lets go of one by one."""
    parallel, train = config.parallel, config.train
    if parallel.expert_placement == "off":
        return
    said = f"parallel.expert_placement={parallel.expert_placement}"
    if parallel.engine != "torch":
        raise ValueError(
            f"{said}: parallel.engine={parallel.engine} keeps the optimizer's state of experts where none can move "
            "by itself; take parallel.engine=torch, or off"
        )
    if config.lora.quantize is not None:
        raise ValueError(f"{said}: weights of lora.quantize={config.lora.quantize} stay where they are; set it to off")
    for key in ("freeze", "train_only"):
        for text in getattr(train, key):
            if WeightPattern.parse(text).experts is not None:
                raise ValueError(
                    f"{said}: with train.{key}={text} ranks would have different numbers of experts to train; set it "
                    "to off"
                )


def _check_copies(config: Sections) -> None:
    """Experts whose weights can be brought to other ranks, and schedules in which gradients of all come back."""
    model, parallel, lora = config.model, config.parallel, config.lora
    if not parallel.replicated_experts:
        return
    said = f"parallel.replicated_experts={parallel.replicated_experts}"
    if model.moe_layers and parallel.replicated_experts >= model.num_experts:
        raise ValueError(
            f"{said}: below model.num_experts={model.num_experts}; for all of them take parallel.ep_size=1"
        )
    if parallel.dispatcher == "static":
        raise ValueError(f"{said}: parallel.dispatcher=static gives every expert as many rows; take auto, or 0")
    if parallel.engine != "torch":
        raise ValueError(f"{said}: not with parallel.engine={parallel.engine}; take parallel.engine=torch, or 0")
    if model.expert != "swiglu":
        raise ValueError(f"{said}: model.expert={model.expert} computes with its own weights alone; take swiglu, or 0")
    if lora.r and (lora.target_modules == ALL_LINEAR or set(lora.target_modules) & set(EXPERT_TARGETS)):
        raise ValueError(
            f"{said}: adapters on experts (lora.target_modules={lora.target_modules}) stay with their owners; name "
            "modules without experts, or set it to 0"
        )
    if lora.quantize is not None:
        raise ValueError(f"{said}: weights of lora.quantize={lora.quantize} stay where they are; set it to 0")
    if parallel.pp_size > 1 and parallel.schedule in ("zero_bubble", "dualpipe_v"):
        raise ValueError(
            f"{said}: parallel.schedule={parallel.schedule} computes weight gradients apart, where ranks do not meet; "
            "take gpipe, 1f1b or interleaved_1f1b, or 0"
        )
