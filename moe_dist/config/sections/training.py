"""How it is trained: steps, optimizer, balance of the experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from moe_dist.config.paths import Folder, PathText
from moe_dist.config.sections.base import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    OwnClass,
    Positive,
    PositiveFloat,
    Probability,
    Section,
)
from moe_dist.config.sections.trained import MEASURED, WeightPattern, entries


def check_train(train: TrainConfig) -> TrainConfig:
    """One precision, and something that ends the run."""
    if train.bf16 and train.pure_bf16:
        raise ValueError("pure_bf16=true: choose one of bf16 (autocast) and pure_bf16")
    if train.torch_compile and train.gradient_checkpointing != "none":
        raise ValueError(
            "torch_compile=true: nothing is compiled where activations are recomputed; set "
            f"gradient_checkpointing=none (it is {train.gradient_checkpointing}), or torch_compile=false"
        )
    if train.max_steps == 0:
        raise ValueError("max_steps=0: a positive number, or -1 for num_train_epochs")
    if train.max_steps < 0 and train.num_train_epochs is None and train.max_time is None:
        raise ValueError("num_train_epochs=null: nothing ends the run; set it, max_steps or max_time")
    return train


def check_optimizer(optimizer: OptimizerConfig) -> OptimizerConfig:
    """A schedule that goes down."""
    if optimizer.min_learning_rate > optimizer.learning_rate:
        raise ValueError(
            f"min_learning_rate={optimizer.min_learning_rate}: at most learning_rate={optimizer.learning_rate}"
        )
    return optimizer


def check_balance(balance: BalanceConfig) -> BalanceConfig:
    """A bias that is used where it moves; automatic actions that have something to raise, and room to."""
    if balance.bias_update_rate and balance.use_selection_bias is False:
        raise ValueError(
            f"use_selection_bias=false: bias_update_rate={balance.bias_update_rate:g} would move a bias that nothing "
            "uses; set it to 0, or use_selection_bias=auto"
        )
    if balance.act == "off":
        return balance
    if not balance.bias_update_rate and (not balance.aux_loss_coef or balance.freeze_router):
        raise ValueError(
            f"act={balance.act}: nothing to raise; set bias_update_rate (1e-3)"
            + ("" if balance.freeze_router else ", or router_aux_loss_coef (0.01)")
        )
    for key, bound, value in (
        ("act_max_bias_update_rate", balance.act_max_bias_update_rate, balance.bias_update_rate),
        ("act_max_aux_loss_coef", balance.act_max_aux_loss_coef, balance.aux_loss_coef),
    ):
        if value > bound:
            start = key.replace("act_max_", "").replace("aux", "router_aux")
            raise ValueError(f"{key}={bound:g}: at least {start}={value:g}, from which it is raised")
    return balance


class TrainConfig(Section):
    """The loop. Names are those of `TrainingArguments`."""

    output_dir: Folder = Path("outputs/run")
    """Run folder: config.yaml, metrics.jsonl, train.log, logs/, tb/, checkpoint-<step>/."""
    seed: NonNegative = 42
    """Seed of weights, data order, dropout and sampling."""
    per_device_train_batch_size: Positive = 8
    """Sequences in one micro-batch of one rank."""
    per_device_eval_batch_size: Positive | None = None
    """Sequences in one evaluation batch of one rank; default: as in training."""
    auto_find_batch_size: bool = False
    """Out of memory in a step: `moe-dist train` starts all ranks again, from the newest checkpoint, with micro-batches
    of half the size and so many more of them that the global batch stays. Not under other launchers."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches per rank in one optimizer step."""
    max_steps: int = Field(default=-1, ge=-1)
    """Optimizer steps; -1: as num_train_epochs says."""
    num_train_epochs: PositiveFloat | None = 1.0
    """Passes over the data when max_steps is -1; null: max_time alone ends the run."""
    max_time: PositiveFloat | None = None
    """Seconds of training after which the run ends cleanly, whatever the steps; the schedule follows."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0: measure only."""
    bf16: bool = False
    """Compute in bfloat16 (autocast), weights in float32; the router always computes in float32."""
    pure_bf16: bool = False
    """Weights and gradients in bfloat16, float32 master weights in the optimizer."""
    fp16: Literal[False] = False
    """Not offered: half precision needs loss scaling; use bf16."""
    label_smoothing_factor: Fraction = 0.0
    """Mass spread over the vocabulary in the loss."""
    loss_chunk_tokens: NonNegative | Literal["auto"] = "auto"
    """Tokens whose logits the loss holds at once: memory does not grow with tokens x vocab_size; auto: 256 (on a
    GPU 1,024), more where they fit 64 MiB; 0: all of a micro-batch."""
    expert_chunk_factor: NonNegativeFloat = 2.0
    """Rows that the experts of a rank compute at once at most, over its even share of a micro-batch's. A rank whose
    experts are chosen more computes theirs in chunks of a quarter as many, and their activations again in backward:
    memory grows by the rows alone; 0: all at once, on every rank."""
    kernels: Literal["torch", "triton"] = "torch"
    """What moves rows to experts and back and computes their gated unit: PyTorch, or fused Triton kernels for GPUs,
    which are tested in Triton's interpreter and have not been measured on a GPU (docs/performance.md)."""
    expert_precision: Literal["compute", "fp8"] = "compute"
    """Products of rows with weights of experts: in the precision of training, or with both rounded to float8 by row. An
    experiment: by a kernel on GPUs of SM 90 in bfloat16, not measured; elsewhere emulated, slower
    (docs/performance.md)."""
    freeze: list[str] = []
    """Weights that stay as they are: parts of names, with * and ? (`router`, `embed_tokens`, `layers.0.attention`,
    `*norm`), single experts (`experts:3,7`) or layers (`layers:0-9`). Of adapters with lora.r."""
    train_only: list[str] = []
    """The only weights that are trained, named likewise, without those of `freeze`; `experts:esft`: of each layer those
    that the training data's tokens go to. Empty: all."""
    esft_threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """`experts:esft` takes the most wanted experts of a layer until they have this share of `esft_score`."""
    esft_score: Literal["token", "gate"] = "token"
    """What is counted for an expert: tokens that have it among their top-k, or its weights for them."""
    esft_samples: Positive = 128
    """Training samples that the affinity of experts is measured on, the first in their order."""
    gradient_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in backward: whole blocks, or attention only. Routing is never recomputed."""
    torch_compile: bool = False
    """Compile the dense part of every block."""
    deterministic: bool = False
    """Only deterministic kernels: two runs are bitwise equal."""
    eval_steps: NonNegative = 0
    """Evaluate every this many steps; 0: only at the end."""
    eval_batches: Positive | None = None
    """Evaluate on at most this many batches, all ranks together; default: the whole validation set."""
    eval_tasks: list[PathText] = []
    """Tasks with right answers at each evaluation, as `moe-dist evaluate --tasks` has them."""
    early_stopping_patience: NonNegative = 0
    """Stop after this many evaluations without improvement; 0: never."""
    early_stopping_threshold: NonNegativeFloat = 0.0
    """Improvement smaller than this does not count."""
    divergence_loss: PositiveFloat | None = None
    """Stop when the training loss is above this ..."""
    divergence_epochs: NonNegativeFloat = 0.0
    """... after this many epochs."""
    callbacks: list[OwnClass] = []
    """Classes of your own that get the events of training, as `package.module:Class`; see docs/extending.md."""
    on_callback_error: Literal["raise", "warn"] = "raise"
    """One of them raises: end the run and name it, or say so and go on."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A NaN or infinite loss or gradient: stop before the optimizer step, or skip the step and count it."""
    max_nonfinite_steps: Positive = 10
    """With `skip`, stop after this many skipped steps in a row."""
    sample_tokens: NonNegative = 0
    """Generate this many tokens before and after training, for the eye."""
    sample_prompt: str = "def "
    """Start of the generated text; empty: the start of a document."""

    @field_validator("output_dir", mode="before")
    @classmethod
    def _a_folder_has_a_name(cls, value: Any) -> Any:
        if isinstance(value, (str, Path)) and not str(value).strip():
            raise ValueError("a folder; '.' is this one")
        return value

    @field_validator("freeze", "train_only", mode="before")
    @classmethod
    def _one_entry_each(cls, value: Any) -> Any:
        return entries(value)

    @field_validator("freeze", "train_only")
    @classmethod
    def _patterns(cls, value: list[str]) -> list[str]:
        return [WeightPattern.parse(text).text for text in value]

    @field_validator("freeze")
    @classmethod
    def _nothing_measured(cls, value: list[str]) -> list[str]:
        if f"experts:{MEASURED}" in value:
            raise ValueError(f"experts:{MEASURED} chooses what is trained; it belongs to train_only")
        return value

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _accept_true_and_false(cls, value: Any) -> Any:
        return {True: "full", False: "none"}.get(value, value) if isinstance(value, bool) else value

    _one_precision_and_an_end = model_validator(mode="after")(check_train)

    def micro_batches(self, size: int, count: int) -> dict[str, int]:
        """Keys of this section for `count` micro-batches of `size` sequences, which leave what is evaluated as it is.

        `eval_batches` counts in sizes of training where evaluation has none of its own.
        """
        keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
        if self.eval_batches is None or self.per_device_eval_batch_size is not None:
            return keys
        samples = self.eval_batches * self.per_device_train_batch_size
        each = max(number for number in range(1, size + 1) if samples % number == 0)
        return keys | {"eval_batches": samples // each} | ({} if each == size else {"per_device_eval_batch_size": each})


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule."""

    optim: Literal["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"] = "adamw_torch_fused"
    """Optimizer, by its `TrainingArguments` name: the same algorithm with the same defaults."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    min_learning_rate: NonNegativeFloat = 0.0
    """Floor the schedule decays to."""
    lr_scheduler_type: Literal["constant", "linear", "cosine", "cosine_with_restarts"] = "cosine"
    """Shape after warm-up."""
    num_cycles: Positive = 1
    """Restarts of cosine_with_restarts."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up, however long they take."""
    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Warm-up as a share of the run, of its steps or of max_time, whichever is further; warmup_steps wins when both are
    set."""
    weight_decay: NonNegativeFloat = 0.01
    """Decay of matrices, decoupled from the gradient (with sgd: added to it); norms and biases are never decayed."""
    adam_beta1: Probability = 0.9
    """AdamW: decay of the first moment."""
    adam_beta2: Probability = 0.999
    """AdamW: decay of the second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW: epsilon."""
    momentum: Probability = 0.0
    """SGD: momentum; 0 as `TrainingArguments` has it."""

    _floor_below_peak = model_validator(mode="after")(check_optimizer)


class BalanceConfig(Section):
    """Keeping every expert busy."""

    use_auxiliary_loss: bool = True
    """Switch for the load-balancing loss."""
    router_aux_loss_coef: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss of each layer (1.0 = balanced), summed over layers."""
    aux_loss_scope: Literal["micro_batch", "sequence", "global_batch"] = "micro_batch"
    """Tokens over which load is counted: each micro-batch, each sequence, or the whole global batch."""
    router_z_loss_coef: NonNegativeFloat = 0.0
    """Weight of the squared log-sum-exp of router logits, mean over tokens, summed over layers."""
    bias_update_rate: NonNegativeFloat = 0.0
    """Auxiliary-loss-free balancing: step of the selection bias per optimizer step; 0: the bias stays as it is."""
    use_selection_bias: Literal["auto", True, False] = "auto"
    """Choose experts by score plus selection bias; `auto`: where it moves or is not zero; false: by score alone."""
    capacity_factor: PositiveFloat | None = None
    """Places per expert and micro-batch = factor x fair share, in order; null: drop no token."""
    freeze_router: bool = False
    """Router weights are not trained."""
    expert_dropout: Probability = 0.0
    """Probability that a token's contribution from one expert is dropped in training."""
    router_jitter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Multiply router inputs by uniform noise in [1 - jitter, 1 + jitter] in training."""

    router_temperature: PositiveFloat = 1.0
    """Divide router logits by this: above 1 the choice is softer, below 1 sharper; not in training alone."""
    router_temperature_steps: NonNegative = 0
    """Optimizer steps in which router_temperature moves to 1, linearly; 0: it stays as it is."""
    fallback_expert: NonNegative | None = None
    """A token whose router logits are NaN or infinite goes to this expert alone, and is counted; null: its output is
    NaN, and train.on_nonfinite decides."""
    act: Literal["off", "log", "on"] = "off"
    """Experts stay dead, a layer collapsed or unbalanced: double its bias_update_rate, then its router_aux_loss_coef,
    step by step, and take it back when it is well; `log`: only say so."""
    act_max_bias_update_rate: PositiveFloat = 1e-2
    """`act` raises bias_update_rate to this at most."""
    act_max_aux_loss_coef: PositiveFloat = 0.1
    """`act` raises router_aux_loss_coef to this at most."""
    act_cooldown: Positive = 5
    """Logging intervals between two changes of a layer, and without trouble before one is taken back."""

    @field_validator("act", mode="before")
    @classmethod
    def _accept_true_and_false(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # YAML's on and off

    _something_to_act_with = model_validator(mode="after")(check_balance)

    def temperature_at(self, step: int) -> float:
        """What router logits are divided by after `step` steps: `router_temperature`, moving linearly to 1."""
        if not self.router_temperature_steps:
            return self.router_temperature
        left = max(0.0, 1.0 - step / self.router_temperature_steps)
        return 1.0 + left * (self.router_temperature - 1.0)

    @property
    def aux_loss_coef(self) -> float:
        return self.router_aux_loss_coef if self.use_auxiliary_loss else 0.0

    @property
    def use_bias(self) -> bool | None:
        """Whether the selection bias is used; None: if it is not zero."""
        if self.use_selection_bias == "auto":
            return True if self.bias_update_rate else None
        return self.use_selection_bias
