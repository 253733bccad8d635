"""What ways of reaching experts cannot go with, each refused in one line: called by `checks`, in whose words."""

from __future__ import annotations

from moe_dist.config.sections.all import Sections
from moe_dist.config.sections.lora import ALL_LINEAR, EXPERT_TARGETS
from moe_dist.config.sections.trained import WeightPattern


def check_deepep(config: Sections) -> None:
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


def check_placement(config: Sections) -> None:
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


def check_copies(config: Sections) -> None:
    """Experts whose weights can be brought to other ranks, and schedules in which gradients of all come back."""
    model, parallel, lora = config.model, config.parallel, config.lora
    if not parallel.replicated_experts:
        return
    said = f"parallel.replicated_experts={parallel.replicated_experts}"
    if model.moe_layers and parallel.replicated_experts >= model.num_experts:
        raise ValueError(
            f"{said}: below model.num_experts={model.num_experts}; for all of them take parallel.ep_size=1"
        )
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
