"""Every field of `transformers.TrainingArguments` has its effect, or is refused by its own name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from run_files import get
from test_python_api import MODEL, real_arguments

from moe_dist.config import FIELDS, ConfigError
from moe_dist.train import MoETrainer
from moe_dist.train.hf_arguments import NOT_FOR_US

NOT_GENERIC: dict[str, Any] = {
    "output_dir": "elsewhere",
    "max_steps": 7,
    "lr_scheduler_type": "cosine",
    "optim": "sgd",
    "warmup_steps": 5,
    "report_to": "tensorboard",
    "eval_strategy": "steps",
    "eval_steps": 20,
    "save_strategy": "no",
    "logging_strategy": "epoch",
    "hub_strategy": "end",
    "metric_for_best_model": "accuracy",
    "greater_is_better": True,
    "accelerator_config": {"split_batches": True},
    "ddp_backend": "mpi",
    "debug": "underflow_overflow",
    "fsdp": "full_shard",
    "tf32": False,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "max-autotune",
    "activation_checkpointing_kwargs": {"use_reentrant": True},
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "include_num_input_tokens_seen": "all",
    "include_for_metrics": ["inputs"],
    "label_names": ["labels"],
    "train_sampling_strategy": "sequential",
    "dataloader_multiprocessing_context": "fork",
    "resume_from_checkpoint": "500",
    "hub_token": "hf_secret",
    "deepspeed": {"zero_optimization": {"stage": 1}},
}
WITH: dict[str, Any] = {
    "load_best_model_at_end": {"eval_strategy": "steps", "eval_steps": 500},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
}
SET_AFTERWARDS = {"ddp_backend"}
"""transformers acts on it when the object is made, and finds no ranks here."""
ANOTHER_KEY = {
    "activation_checkpointing": ("train.gradient_checkpointing", "full"),
    "ddp_timeout": ("launch.timeout", 1801),
    "eval_strategy": ("train.eval_steps", 500),
    "fp16": ("train.bf16", True),
    "full_determinism": ("train.deterministic", True),
    "resume_from_checkpoint": ("checkpoint.resume", "500"),
    "gradient_checkpointing": ("train.gradient_checkpointing", "full"),
    "report_to": ("monitor.tensorboard", True),
    "save_strategy": ("checkpoint.save_steps", 0),
    "use_cpu": ("launch.device", "cpu"),
}
ALREADY_SO = {"logging_first_step", *NOT_FOR_US}


@pytest.mark.slow
def test_every_field_of_training_arguments(tmp_path: Path) -> None:
    """Each at a value nobody would have by default: it has its effect, or is refused by its own name.

    Seen to fail with torch_compile, refused for a backend nobody had written; with eval_steps beside the default
    strategy "no", dropped; with hub_token, shown in the error; and with ddp_backend="mpi" called launch.backend.
    """
    cls = real_arguments()
    flat = {key.partition(".")[2]: key for key in FIELDS}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    assert len(fields) > 80

    def config_of(**chosen: Any) -> Any:
        later = {name: chosen.pop(name) for name in SET_AFTERWARDS & chosen.keys()}
        given = cls(**{"output_dir": str(tmp_path), "use_cpu": True} | chosen)
        vars(given).update(later)
        return MoETrainer({"data": {"max_seq_length": 32}}, model_config=MODEL, training_config=given).config

    for name, field in fields.items():
        default = field.default if field.default is not dataclasses.MISSING else None
        if name in NOT_GENERIC:
            value = NOT_GENERIC[name]
        elif isinstance(default, bool) or "bool" in str(field.type):
            value = not default
        elif isinstance(default, int | float):
            value = default + 1 if default >= 1 or isinstance(default, int) else default + 0.125
        elif "int" in str(field.type):
            value = 3
        elif "float" in str(field.type):
            value = 0.5
        else:
            value = {"a": 1} if "dict" in str(field.type) else "something"
        refused = None
        try:
            config = config_of(**{name: value}, **WITH.get(name, {}))
        except ConfigError as error:
            refused = str(error)
        if refused is not None:
            assert re.search(rf"\b{name}\b", refused), f"{name}={value!r}: {refused}"
            assert "hf_secret" not in refused
        elif name not in ALREADY_SO:
            key, wanted = ANOTHER_KEY.get(name, (flat.get(name), value))
            assert key is not None, f"{name}={value!r} is ignored"
            assert get(config, key) == (Path(wanted) if name == "output_dir" else wanted), name
    compiled = config_of(torch_compile=True)
    assert compiled.train.torch_compile
    assert config_of(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
