"""What a key asks of special kernels, and what these cannot do. Called by `checks`; imports no torch."""

from __future__ import annotations

from moe_dist.config.sections.all import Sections
from moe_dist.config.sections.lora import ALL_LINEAR, EXPERT_TARGETS


def check_float8(config: Sections) -> None:
    """Experts whose products can be taken in float8: stacks that are trained whole, by torch's own unit."""
    model, lora, said = config.model, config.lora, f"train.expert_precision={config.train.expert_precision}"
    if config.train.expert_precision == "compute":
        return
    if not model.moe_layers:
        raise ValueError(f"{said}: the model has no expert layer; take compute")
    if model.expert != "swiglu":
        raise ValueError(
            f"{said}: model.expert={model.expert} multiplies rows by weights in its own way; take swiglu, or compute"
        )
    if lora.quantize is not None:
        raise ValueError(f"{said}: weights of lora.quantize={lora.quantize} are in few bits already; take compute")
    has_experts = lora.target_modules == ALL_LINEAR or any(word in EXPERT_TARGETS for word in lora.target_modules)
    if lora.r and has_experts:
        raise ValueError(
            f"{said}: lora.target_modules={lora.target_modules} has adapters beside experts, whose products are those "
            "of training; take compute, or name modules without experts"
        )
    if config.train.deterministic:
        raise ValueError(
            f"{said}: rounds more than training does, and nobody has shown that its kernel sums in a fixed order, as "
            "train.deterministic=true wants; take compute"
        )
