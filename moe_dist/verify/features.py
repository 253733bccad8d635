"""What a training can be made of, apart from its layout: every value of every feature, by a word. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_dist.config import ConfigError

Settings = Mapping[str, Any]
"""Values by `section.key`; `batch.` keys are of the micro-batches themselves (`Batches`)."""

_EXAMPLES = "moe_dist.verify.examples:"
PLAIN: Settings = {
    "balance.use_auxiliary_loss": True,
    "balance.router_aux_loss_coef": 0.05,
    "balance.router_z_loss_coef": 0.0,
    "balance.aux_loss_scope": "micro_batch",
    "balance.bias_update_rate": 0.0,
    "balance.capacity_factor": None,
    "balance.freeze_router": False,
    "balance.expert_dropout": 0.0,
    "balance.router_jitter": 0.0,
    "balance.router_temperature": 1.0,
    "balance.router_temperature_steps": 0,
    "balance.fallback_expert": None,
    "model.attention_bias": False,
    "model.qkv_bias": False,
    "model.clip_qkv": None,
    "model.attention_sinks": False,
    "model.kv_lora_rank": None,
    "model.sliding_window": None,
    "model.rope_scaling": None,
    "model.partial_rotary_factor": 1.0,
    "model.hidden_act": "silu",
    "model.attention_dropout": 0.0,
    "model.qk_norm": True,
    "model.qk_norm_per_head": True,
    "model.tie_word_embeddings": False,
    "model.shared_expert_intermediate_size": 0,
    "model.shared_expert_gate": False,
    "model.router_bias": False,
    "model.scoring_func": "softmax",
    "model.norm_topk_prob": True,
    "model.num_experts_per_tok": 2,
    "model.n_group": 1,
    "model.topk_group": 1,
    "model.routed_scaling_factor": 1.0,
    "model.router": "topk",
    "model.expert": "swiglu",
    "model.mlp_only_layers": [],
    "lora.r": 0,
    "lora.alpha": 16.0,
    "lora.dropout": 0.0,
    "lora.init": "kaiming",
    "lora.rslora": False,
    "lora.use_dora": False,
    "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "data.format": "auto",
    "dpo.beta": 0.1,
    "dpo.label_smoothing": 0.0,
    "dpo.reference": "auto",
    "parallel.dispatcher": "all_to_all",
    "parallel.dispatch_chunks": 1,
    "parallel.ranks_per_host": None,
    "parallel.expert_placement": "off",
    "parallel.replicated_experts": 0,
    "data.document_mask": True,
    "train.freeze": [],
    "train.train_only": [],
    "train.label_smoothing_factor": 0.0,
    "train.loss_chunk_tokens": "auto",
    "train.expert_chunk_factor": 2.0,
    "train.expert_precision": "compute",
    "train.max_grad_norm": 0.5,
    "train.bf16": False,
    "train.pure_bf16": False,
    "train.torch_compile": False,
    "optimizer.optim": "adamw_torch_fused",
    "optimizer.weight_decay": 0.1,
    "optimizer.lr_scheduler_type": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.warmup_ratio": 0.0,
    "optimizer.min_learning_rate": 0.0,
}
"""The first value of every feature."""

_ADAPTERS: dict[str, Any] = {"lora.r": 4, "lora.alpha": 8.0, "lora.init": "random"}
"""With values in B from the start: as zeros they would leave A without a gradient."""
FEATURES: dict[str, dict[str, Settings]] = {
    "scope of the auxiliary loss": {
        "sequence_scope": {"balance.aux_loss_scope": "sequence"},
        "global_scope": {"balance.aux_loss_scope": "global_batch"},
    },
    "auxiliary loss": {"no_aux_loss": {"balance.router_aux_loss_coef": 0.0}},
    "z-loss": {"z_loss": {"balance.router_z_loss_coef": 0.01}},
    "selection bias": {"bias": {"balance.bias_update_rate": 0.01}},
    "capacity": {"capacity": {"balance.capacity_factor": 0.8}},
    "expert dropout": {"expert_dropout": {"balance.expert_dropout": 0.1}},
    "router jitter": {"jitter": {"balance.router_jitter": 0.1}},
    "router temperature": {
        "temperature": {"balance.router_temperature": 0.5},
        "annealing": {"balance.router_temperature": 2.0, "balance.router_temperature_steps": 2},
    },
    "frozen router": {"frozen_router": {"balance.freeze_router": True}},
    "scores": {
        "sigmoid": {"model.scoring_func": "sigmoid", "model.routed_scaling_factor": 2.5},
        "groups": {"model.n_group": 4, "model.topk_group": 2},
    },
    "top-k weights": {"raw_weights": {"model.norm_topk_prob": False}},
    "top-k": {"top1": {"model.num_experts_per_tok": 1, "model.norm_topk_prob": False}},
    "router": {
        "own_router": {"model.router": f"{_EXAMPLES}TemperedRouter"},
        "fallback": {"model.router": f"{_EXAMPLES}FailingRouter", "balance.fallback_expert": 1},
        "expert_choice": {"model.router": "expert_choice"},
    },
    "experts": {
        "loop_experts": {"model.expert": "swiglu_loop"},
        "own_experts": {"model.expert": f"{_EXAMPLES}TwoLinears"},
        "noisy_experts": {"model.expert": f"{_EXAMPLES}NoisyExpert"},
        "biased_experts": {"model.expert": f"{_EXAMPLES}BiasedExperts"},
        "clamped_experts": {"model.expert": "swiglu_clamped"},
    },
    "activation": {"gelu": {"model.hidden_act": "gelu_tanh"}},
    "bias of the router": {"router_bias": {"model.router_bias": True}},
    "dense layers": {"dense_layer": {"model.mlp_only_layers": [1]}},
    "depth": {"deep": {"model.num_hidden_layers": 10}},
    "shared expert": {
        "shared_expert": {"model.shared_expert_intermediate_size": 16},
        "gated_shared_expert": {"model.shared_expert_intermediate_size": 16, "model.shared_expert_gate": True},
    },
    "attention dropout": {"attention_dropout": {"model.attention_dropout": 0.1}},
    "attention bias": {
        "attention_bias": {"model.attention_bias": True},
        "qkv_bias": {"model.qkv_bias": True},
    },
    "norms of queries and keys": {
        "no_qk_norm": {"model.qk_norm": False},
        "norm_over_heads": {"model.qk_norm_per_head": False, "model.clip_qkv": 1.0},
    },
    "attention": {
        "sinks": {"model.attention_sinks": True},
        "latents": {
            "model.qk_norm": False,
            "model.num_key_value_heads": 4,
            "model.head_dim": None,
            "model.kv_lora_rank": 8,
            "model.q_lora_rank": 10,
            "model.v_head_dim": 6,
            "model.qk_nope_head_dim": 6,
            "model.qk_rope_head_dim": 4,
        },
    },
    "positions": {
        "window": {"model.sliding_window": 5},
        "yarn": {"model.rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
        "partial_rotary": {"model.partial_rotary_factor": 0.5},
    },
    "embeddings": {"tied": {"model.tie_word_embeddings": True}},
    "document mask": {"no_document_mask": {"data.document_mask": False}},
    "trained weights": {
        "some_experts": {"train.freeze": ["experts:0,2-5"]},
        "frozen_parts": {"train.freeze": ["embed_tokens", "*norm*"]},
    },
    "adapters": {
        "lora": _ADAPTERS | {"lora.target_modules": "all-linear", "lora.dropout": 0.1},
        "lora_attention": _ADAPTERS | {"lora.target_modules": ["o_proj"], "lora.rslora": True},
        "dora": _ADAPTERS | {"lora.target_modules": ["o_proj", "lm_head"], "lora.use_dora": True},
    },
    "preferences": {
        "dpo": {
            "data.format": "preference",
            "data.source": "memory",
            "dpo.beta": 0.05,  # with more, tokens that bfloat16 sends elsewhere would move the loss
            "dpo.label_smoothing": 0.1,
            "batch.pairs": True,
        },
    },
    "dispatcher": {
        "all_gather": {"parallel.dispatcher": "all_gather"},
        "dedup": {"parallel.dispatcher": "dedup"},
        "hierarchical": {"parallel.dispatcher": "hierarchical", "parallel.ranks_per_host": 2},
        "static": {"parallel.dispatcher": "static", "balance.capacity_factor": 0.8},  # that of `capacity`
    },
    "pieces": {"pieces": {"parallel.dispatch_chunks": 3}},
    "expert placement": {"moved_experts": {"parallel.expert_placement": "balanced"}},
    "copies of experts": {"hot_experts": {"parallel.replicated_experts": 2}},
    "reduction": {
        "late_reduction": {"parallel.overlap_grad_reduce": False},
        "half_reduction": {"parallel.reduce_dtype": "bfloat16"},
        "rows_reduction": {"parallel.embedding_grad_reduce": "rows"},
    },
    "micro-batches": {"even_batches": {"batch.even": True}},
    "domains": {"domains": {"batch.num_domains": 2}},
    "label smoothing": {"label_smoothing": {"train.label_smoothing_factor": 0.1}},
    "chunks of the loss": {
        "chunked_loss": {"train.loss_chunk_tokens": 7},
        "full_logits": {"train.loss_chunk_tokens": 0},
    },
    "chunks of rows": {"chunked_rows": {"train.expert_chunk_factor": 0.24}},
    "precision of experts": {"fp8_experts": {"train.expert_precision": "fp8"}},
    "clipping": {"no_clipping": {"train.max_grad_norm": 0.0}, "rare_clipping": {"train.max_grad_norm": 1000.0}},
    "optimizer": {
        "adamw": {"optimizer.optim": "adamw_torch"},
        "sgd": {"optimizer.optim": "sgd", "optimizer.momentum": 0.9},
        "adafactor": {"optimizer.optim": "adafactor"},
    },
    "weight decay": {"no_decay": {"optimizer.weight_decay": 0.0}},
    "schedule of the rate": {
        "cosine": {"optimizer.lr_scheduler_type": "cosine", "optimizer.warmup_steps": 1},
        "linear": {"optimizer.lr_scheduler_type": "linear", "optimizer.warmup_ratio": 0.4},
    },
    "stages": {"uneven_stages": {"parallel.stages": "uneven"}},
    "precision": {"bf16": {"train.bf16": True}, "pure_bf16": {"train.pure_bf16": True}},
    "compilation": {"compiled": {"train.torch_compile": True}},
}
"""Values of each feature other than the plain one."""

_FEATURE_OF = {word: feature for feature, values in FEATURES.items() for word in values}
ONCE = {"compiled"}
"""Costs many seconds: wanted once, not with every other value."""
COSTS = {"deep": 4, "own_experts": 3, "noisy_experts": 2, "compiled": 8}
"""How much longer a case takes: taken where more of what is wanted comes with it."""
LOW_PRECISION = {"bf16", "pure_bf16", "half_reduction"}
ADAPTERS = {*FEATURES["adapters"]}
PREFERENCES = {*FEATURES["preferences"]}


@dataclass(frozen=True)
class Batches:
    """How the micro-batches of a trial are made. `even`: all labels, one document, no padding. `pairs`: preferences."""

    even: bool = False
    num_domains: int = 0
    pairs: bool = False


Choice = frozenset[str]
"""Words of the features that have not their plain value."""


def choice(words: Iterable[str]) -> Choice:
    """Raises ConfigError for a word that is none, or for two values of one feature."""
    taken: dict[str, str] = {}
    for word in words:
        feature = _FEATURE_OF.get(word)
        if feature is None:
            raise ConfigError(f"--layouts: +{word} is not a feature; allowed: {', '.join(_FEATURE_OF)}")
        if feature in taken:
            raise ConfigError(f"--layouts: +{taken[feature]}+{word} are two values of one feature ({feature})")
        taken[feature] = word
    return frozenset(taken.values())


def words_in_order(chosen: Choice) -> list[str]:
    return [word for word in _FEATURE_OF if word in chosen]


def setting_of(word: str) -> Settings:
    """What this value of a feature sets."""
    return FEATURES[_FEATURE_OF[word]][word]


def batches_of(chosen: Choice) -> Batches:
    """The micro-batches that these features describe."""
    settings = {key: value for word in chosen for key, value in setting_of(word).items()}
    return Batches(**{name: settings.get(f"batch.{name}", False) for name in ("even", "num_domains", "pairs")})
