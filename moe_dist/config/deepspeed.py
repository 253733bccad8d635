"""What `parallel.engine: deepspeed` takes, and its keys in DeepSpeed's own spelling.

A person's own DeepSpeed file may tune buckets and logging (`FREE`), may repeat what our keys say, and may hold what
changes nothing (of ZeRO 3, of loss scaling, of sections that are switched off). The rest is refused at once,
by key. Called by `checks`; imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moe_dist.config.sections.all import Sections

BUCKET_ELEMENTS = 8 * 2**20
"""Default of DeepSpeed's buckets here: 32 MB. Its own, 2 GB, is allocated whole, whatever the model."""

FREE = {
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.use_multi_rank_bucket_allreduce",
    "zero_optimization.overlap_comm",
    "zero_optimization.offload_optimizer.pin_memory",
    "comms_logger.enabled",
    "comms_logger.verbose",
    "comms_logger.prof_all",
    "comms_logger.debug",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
}
"""Keys of a DeepSpeed file that are handed on as they are."""

NOT_OFFERED = {
    "train_batch_size": "it follows from train.per_device_train_batch_size and gradient_accumulation_steps",
    "scheduler": "optimizer.lr_scheduler_type and its keys decide",
    "compression_training": "it is not offered",
    "zero_optimization.offload_param": "DeepSpeed offloads parameters with ZeRO 3 only, which is not offered",
    "zero_optimization.offload_optimizer.nvme_path": "DeepSpeed uses NVMe with ZeRO 3 only, which is not offered",
    "checkpoint": "the checkpoint section decides",
    "activation_checkpointing": "train.gradient_checkpointing decides",
    "tensorboard": "monitor.tensorboard decides",
    "expert_parallel": "parallel.ep_size decides",
}
"""Reasons, where a person would look for the key; every other unknown key is refused without one."""

_WITHOUT_EFFECT = {
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "optimizer.params.torch_adam",
    "scheduler.params.warmup_type",
    *(
        f"zero_optimization.{key}"
        for key in (
            "gather_16bit_weights_on_model_save",
            "load_from_fp32_weights",
            "max_live_parameters",
            "max_reuse_distance",
            "memory_efficient_linear",
            "model_persistence_threshold",
            "param_persistence_threshold",
            "prefetch_bucket_size",
            "sub_group_size",
        )
    ),
    *(f"zero_optimization.{section}.pin_memory" for section in ("offload_param",)),
    *(
        f"zero_optimization.{section}.{key}"
        for section in ("offload_param", "offload_optimizer")
        for key in (
            "buffer_count",
            "buffer_size",
            "fast_init",
            "max_in_cpu",
            "pipeline_read",
            "pipeline_write",
            "ratio",
        )
    ),
    *(
        f"fp16.{key}"
        for key in (
            "auto_cast",
            "consecutive_hysteresis",
            "hysteresis",
            "initial_scale_power",
            "loss_scale",
            "loss_scale_window",
            "min_loss_scale",
        )
    ),
}
"""Keys that change nothing here, at any value: of ZeRO 3, of loss scaling, or decided in the one way there is."""
_STAGE_3 = "zero_optimization.stage3_"

_AS_IT_IS: dict[str, Any] = {
    "amp.enabled": False,
    "data_types.grad_accum_dtype": "fp32",
    "dataloader_drop_last": False,
    "disable_allgather": False,
    "optimizer.params.adam_w_mode": True,
    "optimizer.params.amsgrad": False,
    "optimizer.params.bias_correction": True,
    "sparse_gradients": False,
    "zero_optimization.allgather_partitions": True,
    "zero_optimization.cpu_offload": False,
    "zero_optimization.cpu_offload_params": False,
    "zero_optimization.cpu_offload_use_pin_memory": False,
    "zero_optimization.elastic_checkpoint": False,
    "zero_optimization.ignore_unused_parameters": True,
    "zero_optimization.legacy_stage1": False,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.offload_param.device": "none",
    "zero_optimization.round_robin_gradients": False,
    "zero_optimization.use_all_reduce_for_fetch_params": False,
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.zero_quantized_gradients": False,
    "zero_optimization.zero_quantized_weights": False,
    **{
        f"activation_checkpointing.{key}": False
        for key in (
            "contiguous_memory_optimization",
            "cpu_checkpointing",
            "partition_activations",
            "profile",
            "synchronize_checkpoint_boundary",
        )
    },
}
"""Keys that may say what is so anyway."""

_SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_OPTIMIZERS = {"adamw_torch_fused": ("AdamW", "Adam"), "adamw_torch": ("AdamW", "Adam"), "sgd": ("SGD",)}


def check_deepspeed(config: Sections) -> None:
    """What DeepSpeed cannot do, or could not be shown to do exactly; and a DeepSpeed file that says otherwise."""
    parallel = config.parallel
    if parallel.engine != "deepspeed":
        if parallel.deepspeed_config is not None:
            raise ValueError("parallel.deepspeed_config: only with parallel.engine=deepspeed")
        if parallel.offload_optimizer != "none":
            raise ValueError(
                f"parallel.offload_optimizer={parallel.offload_optimizer}: only with parallel.engine=deepspeed; "
                "parallel.cpu_offload is the key of parallel.engine=torch"
            )
        return
    if parallel.zero_stage not in (1, 2):
        why = "its ZeRO 3 takes no experts and cannot sum gradients" if parallel.zero_stage else "0 would shard nothing"
        raise ValueError(f"parallel.zero_stage={parallel.zero_stage}: 1 or 2 with parallel.engine=deepspeed ({why})")
    if parallel.pp_size > 1:
        raise ValueError(f"parallel.pp_size={parallel.pp_size}: only 1 with parallel.engine=deepspeed")
    if parallel.shard_size is not None:
        raise ValueError(f"parallel.shard_size={parallel.shard_size}: null with parallel.engine=deepspeed")
    if parallel.cpu_offload:
        raise ValueError("parallel.cpu_offload=true: with parallel.engine=deepspeed the key is offload_optimizer")
    if parallel.reduce_dtype != "float32":
        raise ValueError(f"parallel.reduce_dtype={parallel.reduce_dtype}: float32 with parallel.engine=deepspeed")
    if config.train.pure_bf16:
        raise ValueError("train.pure_bf16=true: not with parallel.engine=deepspeed; allowed: train.bf16")
    if config.train.torch_compile:
        raise ValueError("train.torch_compile=true: not with parallel.engine=deepspeed; allowed: false")
    if parallel.zero_stage == 2 and config.model.moe_layers and config.model.expert not in ("swiglu", "swiglu_loop"):
        raise ValueError(
            f"parallel.zero_stage=2: reduces gradients as they come, and those of model.expert={config.model.expert} "
            "may come in another order on every rank; allowed with parallel.engine=deepspeed: 1"
        )
    _check_file(parallel.deepspeed_config, config)


def deepspeed_settings(config: Sections) -> dict[str, Any]:
    """The configuration DeepSpeed is started with: `FREE` keys of the person's file under the keys we decide."""
    settings: dict[str, Any] = {}
    stage_keys = {"reduce_bucket_size": BUCKET_ELEMENTS, "allgather_bucket_size": BUCKET_ELEMENTS}
    mine = {f"zero_optimization.{key}": value for key, value in stage_keys.items()}
    free = {k: v for k, v in _leaves(config.parallel.deepspeed_config) if k in FREE and v != "auto"}
    decided = {key: value for key, (value, _) in _decided(config).items()}
    # We measure and clip ourselves: all ranks must have seen the norm before anyone updates.
    decided |= {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    # DeepSpeed cannot leave its own norm out when it offloads.
    decided["zero_optimization.compute_grad_norm"] = config.parallel.offload_optimizer != "none"
    for key, value in (mine | {"steps_per_print": None} | free | decided).items():
        *path, leaf = key.split(".")
        section = settings
        for part in path:
            section = section.setdefault(part, {})
        section[leaf] = value
    return settings


def _decided(config: Sections) -> dict[str, tuple[Any, str]]:
    """DeepSpeed's keys that keys of ours decide: the value, and why."""
    train, parallel = config.train, config.parallel
    summed = "every reduction of gradients is a sum"
    return {
        "train_micro_batch_size_per_gpu": (train.per_device_train_batch_size, _decides("per_device_train_batch_size")),
        "gradient_accumulation_steps": (train.gradient_accumulation_steps, _decides("gradient_accumulation_steps")),
        "gradient_clipping": (train.max_grad_norm, _decides("max_grad_norm")),
        "zero_optimization.stage": (int(parallel.zero_stage), "parallel.zero_stage decides"),
        "zero_optimization.offload_optimizer.device": (
            parallel.offload_optimizer,
            "parallel.offload_optimizer decides, and NVMe needs ZeRO 3",
        ),
        "zero_optimization.contiguous_gradients": (True, "experts need it"),
        "zero_optimization.reduce_scatter": (True, "experts need it"),
        "fp16.enabled": (False, _decides("fp16")),
        "bf16.enabled": (False, "it would hold weights in bfloat16; train.bf16 computes in it"),
        "torch_autocast.enabled": (False, _decides("bf16")),
        "gradient_allreduce_op": ("sum", summed),
        "prescale_gradients": (False, summed),
        "gradient_predivide_factor": (1.0, summed),
        "communication_data_type": ("fp32", "gradients are reduced in float32"),
    }


def _decides(key: str) -> str:
    return f"train.{key} decides"


def _optimizer_keys(config: Sections) -> dict[str, tuple[Any, str]]:
    """The part of DeepSpeed's `optimizer` that may be repeated; our optimizer is handed to DeepSpeed as an object."""
    optimizer = config.optimizer
    keys: dict[str, tuple[Any, str]] = {
        "lr": (optimizer.learning_rate, "optimizer.learning_rate decides"),
        "weight_decay": (optimizer.weight_decay, "optimizer.weight_decay decides"),
    }
    if optimizer.optim == "sgd":
        keys["momentum"] = (optimizer.momentum, "optimizer.momentum decides")
    else:
        keys["betas"] = ([optimizer.adam_beta1, optimizer.adam_beta2], "optimizer.adam_beta1 and adam_beta2 decide")
        keys["eps"] = (optimizer.adam_epsilon, "optimizer.adam_epsilon decides")
    return {f"optimizer.params.{key}": value for key, value in keys.items()}


def _scheduler_keys(config: Sections) -> dict[str, tuple[Any, str]]:
    """The part of DeepSpeed's `scheduler` that may be repeated; the learning rate is set by ours."""
    optimizer = config.optimizer
    keys = {
        "warmup_max_lr": (optimizer.learning_rate, "optimizer.learning_rate decides"),
        "warmup_min_lr": (0, "warm-up begins at 0"),
        "warmup_num_steps": (optimizer.warmup_steps, "optimizer.warmup_steps decides"),
        "total_num_steps": (config.train.max_steps, "train.max_steps decides"),
    }
    return {f"scheduler.params.{key}": value for key, value in keys.items()}


def _check_file(content: Any, config: Sections) -> None:
    """Raises ValueError with everything in a DeepSpeed file that says otherwise than our keys, or asks for more."""
    decided = _decided(config) | _optimizer_keys(config) | _scheduler_keys(config)
    unknown, wrong = [], []
    switched_off = tuple(
        f"{name}."
        for name, section in (content or {}).items()
        if isinstance(section, Mapping) and section.get("enabled") in (False, "auto") and name not in ("fp16", "bf16")
    )
    for key, value in _leaves(content):
        if value is None or key.startswith((*switched_off, _STAGE_3)) or key in FREE or key in _WITHOUT_EFFECT:
            continue
        where = f"{key}={json.dumps(value)}"
        known = key in decided or key in _AS_IT_IS or key in ("train_batch_size", "optimizer.type", "scheduler.type")
        if value == "auto" and known:
            continue
        if key == "optimizer.type":
            names: tuple[str, ...] = _OPTIMIZERS[config.optimizer.optim]
            if value not in names:
                wrong.append(f"{where}: optimizer.optim={config.optimizer.optim} decides; allowed: {names[0]}")
        elif key == "scheduler.type":
            shape = config.optimizer.lr_scheduler_type
            if _SCHEDULERS.get(value) != shape:
                names = tuple(name for name, ours in _SCHEDULERS.items() if ours == shape)
                wrong.append(
                    f"{where}: optimizer.lr_scheduler_type={shape} decides; "
                    + (f"allowed: {names[0]}" if names else "leave scheduler out")
                )
        elif key in decided or key in _AS_IT_IS:
            wanted, reason = decided.get(key, (_AS_IT_IS.get(key), _reason(key) or "nothing else is offered"))
            if isinstance(value, bool) != isinstance(wanted, bool) or value != wanted:
                wrong.append(f"{where}: {reason}; allowed: {json.dumps(wanted)}")
        elif reason := _reason(key):
            wrong.append(f"{where}: {reason}; leave it out")
        else:
            unknown.append(where)
    if unknown:
        wrong.append(f"{', '.join(unknown)}: not taken over; allowed beside what our keys decide: {_sections(FREE)}")
    if wrong:
        raise ValueError(f"parallel.deepspeed_config: {'; '.join(wrong)}")


def _reason(key: str) -> str:
    return next((why for prefix, why in NOT_OFFERED.items() if key == prefix or key.startswith(f"{prefix}.")), "")


def _sections(keys: Iterable[str]) -> str:
    """Keys by their sections: `comms_logger.*, steps_per_print`."""
    return ", ".join(sorted({f"{key.split('.')[0]}.*" if key.startswith("comms_logger") else key for key in keys}))


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of a mapping as `section.key`, with their values; a path has been replaced by a mapping before."""
    for key, value in (tree or {}).items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif not isinstance(value, Mapping):
            yield f"{prefix}{key}", value
