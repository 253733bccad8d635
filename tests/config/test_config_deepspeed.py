"""`parallel.engine: deepspeed` in a configuration: what is refused, in one line, and what DeepSpeed is handed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_files import complaint, load

from moe_dist.config import Config
from moe_dist.config.deepspeed import deepspeed_settings

ON = "parallel.engine=deepspeed"
STAGE = "parallel.zero_stage=2"

# An override beside the engine and stage 2, and what the error must hold.
REFUSED = """
parallel.zero_stage=0  =>  parallel.zero_stage=0: 1 or 2 with parallel.engine=deepspeed
parallel.zero_stage=3  =>  parallel.zero_stage=3: 1 or 2 with parallel.engine=deepspeed
parallel.shard_size=2  =>  parallel.shard_size=2: null with
parallel.cpu_offload=true  =>  parallel.cpu_offload=true: with parallel.engine=deepspeed the key is offload_optimizer
parallel.reduce_dtype=bfloat16  =>  parallel.reduce_dtype=bfloat16: float32 with parallel.engine=deepspeed
parallel.offload_optimizer=nvme  =>  parallel.offload_optimizer='nvme': one of none, cpu
train.pure_bf16=true  =>  train.pure_bf16=true: not with  &  train.bf16
train.torch_compile=true  =>  train.torch_compile=true: not with
model.expert=mine:Expert  =>  parallel.zero_stage=2: reduces gradients as they come  &  deepspeed: 1
optimizer.optim=adafactor  =>  optimizer.optim=adafactor
parallel.engine=horovod  =>  parallel.engine='horovod': one of torch, deepspeed
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_what_deepspeed_cannot_do_is_refused(tmp_path: Path, line: str) -> None:
    override, pieces = line.split("  =>  ")
    message = complaint(tmp_path, "model: {}", (ON, STAGE, override))
    assert all(piece in message for piece in pieces.split("  &  ")), message


@pytest.mark.parametrize("override", ["parallel.deepspeed_config={}", "parallel.offload_optimizer=cpu"])
def test_its_keys_alone_are_refused(tmp_path: Path, override: str) -> None:
    assert f"{override.partition('=')[0]}" in complaint(tmp_path, "model: {}", (override,))


# A DeepSpeed file, and what the error must hold after `parallel.deepspeed_config: `.
CONTRADICTIONS = """
{"train_micro_batch_size_per_gpu": 4}  =>  train_micro_batch_size_per_gpu=4: train.per_device_train_batch_size  &  : 8
{"gradient_accumulation_steps": 2}  =>  gradient_accumulation_steps=2  &  allowed: 1
{"train_batch_size": 64}  =>  train_batch_size=64: it follows from
{"gradient_clipping": 0.5}  =>  gradient_clipping=0.5: train.max_grad_norm decides; allowed: 1.0
{"zero_optimization": {"stage": 1}}  =>  zero_optimization.stage=1: parallel.zero_stage decides; allowed: 2
{"zero_optimization": {"stage": true}}  =>  zero_optimization.stage=true
{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}  =>  device="nvme"  &  ZeRO 3  &  allowed: "none"
{"zero_optimization": {"offload_param": {"device": "cpu"}}}  =>  offload_param.device="cpu"  &  ZeRO 3
{"zero_optimization": {"round_robin_gradients": true}}  =>  round_robin_gradients=true: nothing else is offered
{"zero_optimization": {"overlap_com": true}}  =>  zero_optimization.overlap_com=true: not taken over
{"activation_checkpointing": {"partition_activations": true}}  =>  train.gradient_checkpointing decides; allowed: false
{"amp": {"enabled": true}}  =>  amp.enabled=true: nothing else
{"zero_optimization": {"reduce_scatter": false}}  =>  reduce_scatter=false: experts need it
{"fp16": {"enabled": true}}  =>  fp16.enabled=true: train.fp16 decides; allowed: false
{"bf16": {"enabled": true}}  =>  bf16.enabled=true  &  train.bf16
{"gradient_allreduce_op": "mean"}  =>  gradient_allreduce_op="mean": every reduction of gradients is a sum
{"prescale_gradients": true}  =>  prescale_gradients=true: every reduction
{"communication_data_type": "bf16"}  =>  communication_data_type="bf16"  &  float32
{"optimizer": {"type": "Lamb"}}  =>  optimizer.type="Lamb": optimizer.optim=adamw_torch_fused decides; allowed: AdamW
{"optimizer": {"params": {"lr": 0.1}}}  =>  optimizer.params.lr=0.1: optimizer.learning_rate decides; allowed: 0.0003
{"optimizer": {"params": {"betas": [0.9, 0.95]}}}  =>  optimizer.params.betas=[0.9, 0.95]
{"optimizer": {"params": {"amsgrad": true}}}  =>  optimizer.params.amsgrad=true: nothing else is offered
{"scheduler": {"type": "WarmupLR"}}  =>  scheduler.type="WarmupLR": optimizer.lr_scheduler_type
{"tensorboard": {"enabled": true}}  =>  tensorboard.enabled=true: monitor.tensorboard decides
{"curriculum_learning": {"enabled": true}}  =>  curriculum_learning.enabled=true: not taken over; allowed
"""


@pytest.mark.parametrize("line", CONTRADICTIONS.strip().splitlines())
def test_a_deepspeed_file_that_says_otherwise_is_refused(tmp_path: Path, line: str) -> None:
    content, pieces = line.split("  =>  ")
    (tmp_path / "ds.json").write_text(content)
    message = complaint(tmp_path, "model: {}", (ON, STAGE, f"parallel.deepspeed_config={tmp_path / 'ds.json'}"))
    assert message.startswith("parallel.deepspeed_config: ")
    assert all(piece in message for piece in pieces.split("  &  ")), message


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), ("{", "not a JSON file"), ("[]", "object")])
def test_a_bad_file_is_one_line(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    message = complaint(tmp_path, "model: {}", (ON, STAGE, f"parallel.deepspeed_config={tmp_path / 'ds.json'}"))
    assert message.startswith("parallel.deepspeed_config=")
    assert said in message


def test_a_file_that_agrees_is_merged(tmp_path: Path) -> None:
    """As Hugging Face users write them, with "auto"; the run keeps the content, not the path."""
    content = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 1000,
            "allgather_bucket_size": "auto",
            "overlap_comm": True,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.999], "eps": "auto"}},
        "fp16": {"enabled": False},
        "steps_per_print": 7,
    }
    (tmp_path / "ds.json").write_text(json.dumps(content))
    config, _ = load(tmp_path, "model: {}", (ON, STAGE, f"parallel.deepspeed_config={tmp_path / 'ds.json'}"))
    assert config.parallel.deepspeed_config == content
    assert Config.model_validate_json(config.model_dump_json()) == config
    settings = deepspeed_settings(config)
    assert settings["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 8388608,
        "overlap_comm": True,
        "offload_optimizer": {"device": "none"},
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "compute_grad_norm": False,
    }
    assert settings["gradient_allreduce_op"] == "sum"
    assert (settings["gradient_clipping"], settings["steps_per_print"]) == (0.0, 7)
    assert "optimizer" not in settings
    assert "train_batch_size" not in settings


ZERO_2 = """{
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
             "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                  "warmup_num_steps": "auto"}},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none", "pin_memory": true},
                          "allgather_partitions": true, "allgather_bucket_size": 2e8, "overlap_comm": true,
                          "reduce_scatter": true, "reduce_bucket_size": 2e8, "contiguous_gradients": true,
                          "round_robin_gradients": false},
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": false,
    "zero_allow_untested_optimizer": true}"""
ZERO_3 = """{
    "bf16": {"enabled": "auto"}, "fp16": {"enabled": false, "auto_cast": false},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none", "pin_memory": true},
                          "offload_param": {"device": "none", "pin_memory": true}, "overlap_comm": true,
                          "contiguous_gradients": true, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
                          "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
                          "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
                          "stage3_gather_16bit_weights_on_model_save": true},
    "activation_checkpointing": {"partition_activations": false, "number_checkpoints": null, "profile": false},
    "flops_profiler": {"enabled": false, "profile_step": 1}, "tensorboard": {"enabled": false, "output_path": "x"},
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": Infinity,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": false}"""


@pytest.mark.parametrize("content", [ZERO_2, ZERO_3])
def test_files_of_other_trainers_are_taken(tmp_path: Path, content: str) -> None:
    """As they stand in the documentation of well-known trainers, saved with a byte order mark. Seen red at scheduler,
    at zero_allow_untested_optimizer, at loss_scale, at stage3_..., and at the mark."""
    (tmp_path / "ds.json").write_text(content, "utf-8-sig")
    overrides = (ON, STAGE, f"parallel.deepspeed_config={tmp_path / 'ds.json'}", "lr_scheduler_type=constant")
    settings = deepspeed_settings(load(tmp_path, "model: {}", overrides)[0])
    assert settings["zero_optimization"]["overlap_comm"] is True
    assert set(settings) <= {
        *("bf16", "communication_data_type", "fp16", "gradient_accumulation_steps", "gradient_allreduce_op"),
        *("gradient_clipping", "gradient_predivide_factor", "prescale_gradients", "steps_per_print"),
        *("torch_autocast", "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "zero_allow_untested_optimizer"),
        *("zero_force_ds_cpu_optimizer", "zero_optimization"),
    }


def test_everything_that_contradicts_is_named_at_once(tmp_path: Path) -> None:
    """Seen red: the first only, and so a try for each."""
    content = {
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 3, "overlap_com": True},
        "train_batch_size": 64,
        "made_up": 1,
    }
    (tmp_path / "ds.json").write_text(json.dumps(content))
    message = complaint(tmp_path, "model: {}", (ON, STAGE, f"parallel.deepspeed_config={tmp_path / 'ds.json'}"))
    for piece in ("gradient_clipping=0.5", "stage=3", "overlap_com=true", "train_batch_size=64", "made_up=1"):
        assert piece in message
