"""Keys and sections of other trainers for what there is not here: what there is instead, and which need nothing."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from moe_dist.config.wording import show

_ADAPTERS = (
    "lora.r above 0 trains adapters beside a frozen model, train.freeze and train.train_only choose weights "
    "(docs/finetuning.md)"
)
_TRACKERS = "monitor.tensorboard, monitor.prometheus.port and metrics.jsonl, which is always written"
_SHARES = "parallel.ep_size, parallel.pp_size and parallel.zero_stage share out a model"
_STEPS = "train.eval_steps, checkpoint.save_steps and monitor.logging_steps; 0: never"
_PRECISION = "train.bf16 computes in bfloat16, train.pure_bf16 keeps the weights in it too"
_MASKS = "data.format: of conversations only what the assistant says is learned, by the tokenizer's template"
# Whole names, in lower case: a key, or a section.
_INSTEAD = {
    r"report_to|(use_)?(wandb|mlflow|comet|comet_ml|neptune|swanlab|trackio|clearml|aim)(_.*)?": _TRACKERS,
    r"peft(_.*)?|use_(peft|lora)|adapter|finetuning_type|freeze_(?!router).*": _ADAPTERS,
    r"load_in_[48]bit|quantization(_.*)?|bnb(_.*)?|qlora(_.*)?": (
        "lora.quantize=nf4 or int8 holds the frozen weights beside adapters in 4 or 8 bits (docs/finetuning.md)"
    ),
    r"fp8(_.*)?|amp(_.*)?|fp16_.*|half_precision_backend": _PRECISION,
    r"(push_to_)?hub(_.*)?": "moe-dist export RUN --push ORG/NAME uploads a model, or adapters, once it is proven",
    r"fsdp(_.*)?": "parallel.zero_stage shards by FSDP2, over parallel.shard_size ranks",
    r"deepspeed": "parallel.engine=deepspeed, with parallel.deepspeed_config",
    r"tp|tp_(size|degree)|tensor_(model_)?parallel(_.*)?": _SHARES,
    r"cp|cp_(size|degree)|(context|sequence)_parallel(_.*)?|ulysses(_.*)?|ring_attn(_.*)?": (
        "every rank holds whole sequences of data.max_seq_length; train.gradient_checkpointing makes room for them"
    ),
    r"gradient_accumulation_steps_auto": (
        "train.gradient_accumulation_steps, the same in every step: the loss is a mean over the tokens of the global "
        "batch, however long its samples are, and a schedule counts steps of one size"
    ),
    r"neftune(_.*)?": "model.attention_dropout and balance.expert_dropout",
    r"dpo_.*|(ppo|grpo|kto|orpo|rlhf|reward|rm)(_.*)?|rl": (
        "data.format=preference and section dpo learn which of two answers is better (docs/finetuning.md)"
    ),
    r"chat_template|train_on_(inputs|prompt)|(completion|assistant)_only_loss|mask_(prompt|history)": _MASKS,
    r"(sample_|eval_sample_|eval_|neat_)packing|pad_to_sequence_len|group_by_length": (
        "data.packing, in which documents see each other only with data.document_mask=false"
    ),
    r"(use_)?flash_attn(_.*)?|(use_)?flash_attention(_.*)?|(xformers|sdp)_attention": (
        "model.attn_implementation=sdpa picks a fused kernel itself"
    ),
    r"(use_)?(liger|unsloth)(_.*)?|torch_compile_(backend|mode)": "train.torch_compile",
    r"(eval|evaluation|save|logging)_strategy": _STEPS,
    r"datasets?|dataset_(name|path|dir)|train_file|train_files": "data.source, with data.path or data.name",
    r"tokenizer_(name|path|type)(_or_path)?": "data.tokenizer",
    r"data_seed": "train.seed, for the weights and the order of the data",
    r"ignore_data_skip": "a run always goes on at its position in the data",
    r"include_(tokens_per_second|num_input_tokens_seen)": "both are always recorded",
}


class _NeedsNothing(NamedTuple):
    """`values`: of the key, all else is refused. `words`: why nothing needs to be done."""

    values: tuple[Any, ...]
    words: str


_RECORDED = _NeedsNothing((True,), "expert utilisation is always recorded")
_NOT_DONE = _NeedsNothing((False,), "it is not done")
_NEEDS_NOTHING = {
    "monitor_expert_usage": _RECORDED,
    "log_expert_metrics": _RECORDED,
    "gradient_accumulation_steps_auto": _NOT_DONE,
    "push_to_hub": _NOT_DONE,
    "load_in_4bit": _NOT_DONE,
    "load_in_8bit": _NOT_DONE,
    "lora.bias": _NeedsNothing(("none",), "adapters have no biases"),
    "task_type": _NeedsNothing(("CAUSAL_LM",), "the next token is learned"),
}
"""By key, or by section and key where the key alone could mean something else."""
GENERATION = {
    "max_new_tokens": "max-tokens",
    "max_tokens": "max-tokens",
    "temperature": "temperature",
    "do_sample": "temperature",
    "top_k": "top-k",
    "top_p": "top-p",
    "min_p": "min-p",
    "repetition_penalty": "repetition-penalty",
    "num_beams": "num-beams",
    "length_penalty": "length-penalty",
    "expert_cache_size_gb": "expert-cache-gb",
    "cache_policy": "cache-policy",
}
"""Keys of a section `inference`, and the options of `moe-dist generate` that do the same."""


def needs_nothing(spelling: str, value: Any) -> str | None:
    """What to say of a key that is read and changes no training; None where it is none of these.

    Raises ValueError, saying what is allowed, for a value that would change something.
    """
    section, _, leaf = spelling.rpartition(".")
    flat = not section and leaf != "top_k"  # which alone is of the router
    if (section == "inference" or flat) and leaf in GENERATION:
        option = f"--{GENERATION[leaf]}"
        if leaf == "do_sample":
            draws = f"draws with {option} above 0" if value else f"takes the likeliest token without {option}"
            return f"{spelling}={show(value)} is not of training: moe-dist generate {draws}"
        return f"{spelling}={show(value)} is not of training: moe-dist generate {option} {show(value)}"
    if (known := _NEEDS_NOTHING.get(spelling, _NEEDS_NOTHING.get(leaf))) is None:
        return None
    if any(value is one or (isinstance(one, str) and value == one) for one in known.values):
        return f"{spelling}={show(value)} is not needed: {known.words}"
    if instead_of(leaf):
        return None  # the error of a key that is not offered says more
    raise ValueError(f"only {', '.join(map(show, known.values))}; {known.words}")


def instead_of(name: str) -> str | None:
    """What there is instead of a key or section that other trainers have; None when it is not known."""
    return next((words for form, words in _INSTEAD.items() if re.fullmatch(form, name.lower())), None)
