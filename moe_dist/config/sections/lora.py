"""Low-rank adapters: a few new weights beside a model's own, which stay as they are."""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import field_validator, model_validator

from moe_dist.config.paths import PathText
from moe_dist.config.sections.base import NonNegative, PositiveFloat, Probability, Section
from moe_dist.config.sections.model import EXPERT_CHOICE

ALL_LINEAR = "all-linear"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
EXPERT_TARGETS = ("experts", "experts.gate_up_proj", "experts.down_proj")
BUILT_IN_ROUTERS, BUILT_IN_EXPERTS = ("topk", EXPERT_CHOICE), ("swiglu", "swiglu_loop", "swiglu_clamped")
"""Values of `model.router` and `model.expert` whose weights adapters know."""
TARGETS = (
    *ATTENTION,
    *("gate_proj", "up_proj", "down_proj", "shared_expert_gate", "gate"),
    *(*EXPERT_TARGETS, "lm_head"),
)
"""Words of `lora.target_modules`, those of Hugging Face's modules; `gate` is the router, `experts` all routed ones."""
_OTHER_WORDS = {"router": "gate", "mlp.gate": "gate", "kv_a_proj": "kv_a_proj_with_mqa"}
_OF_EXPERTS = ("w1", "w2", "w3", "gate_up_proj", "block_sparse_moe", "mlp.experts.gate_up_proj")


def check_lora(lora: LoraConfig) -> LoraConfig:
    """Something to adapt, and a rank to do it with where an adapter is read."""
    if lora.r and not lora.target_modules:
        raise ValueError("target_modules=[]: nothing would be trained; name some, such as [q_proj, k_proj, v_proj]")
    if lora.from_adapter is not None and not lora.r:
        raise ValueError(
            f"from_adapter={lora.from_adapter}: needs r, alpha and target_modules as that adapter has them"
        )
    if lora.use_dora and not lora.r:
        raise ValueError("use_dora=true: r=0 trains no adapters; set r, or use_dora=false")
    if lora.quantize is not None and (not lora.r or lora.use_dora):
        why = "lengths of rows would be those of rounded weights; set use_dora=false"
        if not lora.r:
            why = "r=0 trains all weights, and only frozen ones can be in few bits; set r, or quantize=null"
        raise ValueError(f"quantize={lora.quantize}: {why}")
    if lora.merge_and_save and not lora.r:
        raise ValueError(
            "merge_and_save=true: r=0 trains no adapters, and every checkpoint is a whole model, for moe-dist export; "
            "set r, or merge_and_save=false"
        )
    return lora


class LoraConfig(Section):
    """Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): the model is frozen, and beside a weight W two narrow
    matrices are trained: y = W x + scale * B A x. Only with `r` above 0."""

    r: NonNegative = 0
    """Rank of the adapters; 0: none, all weights are trained."""
    alpha: PositiveFloat = 16.0
    """The adapters' part is multiplied by alpha / r."""
    dropout: Probability = 0.0
    """Dropout on what goes into the adapters, in training."""
    target_modules: Literal["all-linear"] | list[str] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    """What is adapted, in PEFT's words: q_proj, k_proj, v_proj, o_proj; gate_proj, up_proj, down_proj (dense layers and
    shared experts); gate (the router); experts (or experts.gate_up_proj, experts.down_proj); lm_head; or `all-linear`:
    all of these but lm_head."""
    rslora: bool = False
    """Multiply by alpha / sqrt(r) instead (https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    """Train the length of every row of the adapted weights, too (DoRA, https://arxiv.org/abs/2402.09353): of linear
    maps, not of experts and routers."""
    quantize: Literal["nf4", "int8"] | None = None
    """Hold the frozen linear maps and experts in 4 (`nf4`) or 8 bits (`int8`), as they are read from
    model.from_pretrained; null: as train.pure_bf16 says. Needs the extra `quantize`."""
    init: Literal["kaiming", "gaussian", "random"] = "kaiming"
    """First values of A, uniform or normal, with zeros in B, so that the model starts as it was; `random`: B too."""
    from_adapter: PathText | None = None
    """Folder of a PEFT adapter that training starts from; null: new ones."""
    merge_and_save: bool = False
    """After training, write the model with its adapters added, too: `merged-<step>` in the run folder, as
    `moe-dist export --merge` writes it, of the best checkpoint with load_best_model_at_end."""

    @field_validator("target_modules")
    @classmethod
    def _words_of_modules(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str):
            return value
        words = []
        for given in value:
            word = _OTHER_WORDS.get(given, given)
            if word in _OF_EXPERTS:
                raise ValueError(f"{given} is a matrix of every expert: say experts, which adapts all of theirs")
            if word not in TARGETS:
                near = difflib.get_close_matches(word, TARGETS, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"{given}: {hint}one of {', '.join(TARGETS)}")
            words.append(word)
        return list(dict.fromkeys(words))

    _something_to_adapt = model_validator(mode="after")(check_lora)

    @property
    def scale(self) -> float:
        """What the adapters' part is multiplied by."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)
