"""Keys and sections of other trainers for what there is not here yet, and what there is instead."""

from __future__ import annotations

import re

_ADAPTERS = (
    "lora.r above 0 trains adapters beside a frozen model (docs/finetuning.md); balance.freeze_router keeps a router"
)
_TRACKERS = "monitor.tensorboard, monitor.prometheus.port and metrics.jsonl, which is always written"
_SHARES = "parallel.ep_size, parallel.pp_size and parallel.zero_stage share out a model"
_STEPS = "train.eval_steps, checkpoint.save_steps and monitor.logging_steps; 0: never"
_PRECISION = "train.bf16 computes in bfloat16, train.pure_bf16 keeps the weights in it too"
_MASKS = "data.format: of conversations only what the assistant says is learned, by the tokenizer's template"
# Whole names, in lower case: a key, or a section.
_INSTEAD = {
    r"report_to|(use_)?(wandb|mlflow|comet|comet_ml|neptune|swanlab|trackio|clearml|aim)(_.*)?": _TRACKERS,
    r"qlora(_.*)?|peft(_.*)?|use_(peft|dora|lora)|adapter|finetuning_type|freeze_(?!router).*": _ADAPTERS,
    r"load_in_[48]bit|quantization(_.*)?|bnb(_.*)?|fp8(_.*)?|amp(_.*)?|fp16_.*|half_precision_backend": _PRECISION,
    r"(push_to_)?hub(_.*)?|push_to_hub": "checkpoint.folder takes a folder or a URL such as s3://bucket/run",
    r"fsdp(_.*)?": "parallel.zero_stage shards by FSDP2, over parallel.shard_size ranks",
    r"deepspeed": "parallel.engine=deepspeed, with parallel.deepspeed_config",
    r"tp|tp_(size|degree)|tensor_(model_)?parallel(_.*)?": _SHARES,
    r"cp|cp_(size|degree)|(context|sequence)_parallel(_.*)?|ulysses(_.*)?|ring_attn(_.*)?": (
        "every rank holds whole sequences of data.max_seq_length; train.gradient_checkpointing makes room for them"
    ),
    r"auto_find_batch_size": "moe-dist check shows the bytes of each rank; set train.per_device_train_batch_size",
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
    r"model_name(_or_path)?|base_model|pretrained_model_name_or_path": (
        "model.from_pretrained takes architecture and weights of a folder; model.from the architecture alone"
    ),
    r"datasets?|dataset_(name|path|dir)|train_file|train_files": "data.source, with data.path or data.name",
    r"tokenizer_(name|path|type)(_or_path)?": "data.tokenizer",
    r"data_seed": "train.seed, for the weights and the order of the data",
    r"ignore_data_skip": "a run always goes on at its place in the data",
    r"include_(tokens_per_second|num_input_tokens_seen)": "both are always recorded",
}


def instead_of(name: str) -> str | None:
    """What there is instead of a key or section that other trainers have; None when it is not known."""
    return next((words for form, words in _INSTEAD.items() if re.fullmatch(form, name.lower())), None)
