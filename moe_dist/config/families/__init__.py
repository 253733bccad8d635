"""The Hugging Face architectures that this model can be. docs/families.md shows how to add one."""

from __future__ import annotations

from importlib.metadata import entry_points

from moe_dist.config.families.base import Family as Family
from moe_dist.config.families.deepseek_v3 import DEEPSEEK_V3
from moe_dist.config.families.glm4_moe import GLM4_MOE
from moe_dist.config.families.gpt_oss import GPT_OSS
from moe_dist.config.families.mixtral import LLAMA, MISTRAL, MIXTRAL
from moe_dist.config.families.olmoe import OLMOE
from moe_dist.config.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE

ENTRY_POINTS = "moe_dist.families"
"""Group of entry points: an installed package's `Family` is found by its model_type, as those of here."""
_OURS = (QWEN3_MOE, MIXTRAL, QWEN2_MOE, OLMOE, GLM4_MOE, DEEPSEEK_V3, GPT_OSS, QWEN3, LLAMA, MISTRAL, QWEN2)


def families() -> dict[str, Family]:
    """model_type -> family: those of here, then those of installed packages."""
    found = {family.model_type: family for family in _OURS}
    for point in entry_points(group=ENTRY_POINTS):
        family = point.load()
        found.setdefault(family.model_type, family)
    return found
