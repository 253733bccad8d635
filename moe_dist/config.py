"""One typed tree: the YAML file.

Every key a person can write is a field here, with its meaning beside it. Model keys are those of Hugging
Face's Qwen3-MoE `config.json`; training keys are those of `TrainingArguments`. Reading files, inheritance,
overrides, aliases and the wording of errors live in `config_loading/`. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moe_dist.config_checks import (
    FILE_SOURCES,
    check_balance,
    check_checkpoint,
    check_data,
    check_model,
    check_optimizer,
    check_prometheus,
    check_sections,
    check_train,
    file_source,
)
from moe_dist.config_deepspeed import read_deepspeed_config
from moe_dist.config_paths import Folder, PathText

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """A section of the tree: unknown keys are errors, docstrings are the reference manual."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_assignment=True,
        validate_default=True,
        allow_inf_nan=False,
    )


class ModelConfig(Section):
    """The transformer. Keys and defaults follow Hugging Face's Qwen3-MoE."""

    vocab_size: Positive = 272
    """Rows of the embedding; at least the tokenizer's size."""
    hidden_size: Positive = 512
    """Width D of the residual stream."""
    num_hidden_layers: Positive = 8
    """Number of blocks."""
    num_attention_heads: Positive = 8
    """Query heads."""
    num_key_value_heads: Positive | None = None
    """Key and value heads (grouped-query attention); default: as many as query heads."""
    head_dim: Positive | None = None
    """Width of one head; default: hidden_size / num_attention_heads."""
    intermediate_size: Positive = 1536
    """Width of the SwiGLU in layers without experts."""
    moe_intermediate_size: Positive = 512
    """Width F of the SwiGLU of one expert."""
    num_experts: NonNegative = 16
    """Experts E in each mixture-of-experts layer; 0 makes every layer dense."""
    num_experts_per_tok: Positive = 2
    """Experts K each token goes to (top-k)."""
    norm_topk_prob: bool = True
    """Divide the K chosen weights by their sum."""
    decoder_sparse_step: Positive = 1
    """Layer i has experts when (i + 1) is a multiple of this."""
    mlp_only_layers: list[NonNegative] = []
    """Layers that stay dense whatever decoder_sparse_step says."""
    shared_expert_intermediate_size: NonNegative = 0
    """Width of an expert every token passes through; 0 for none."""
    max_position_embeddings: Positive = 4096
    """Longest sequence the positions are made for."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Epsilon of every RMSNorm."""
    qk_norm: bool = True
    """RMSNorm on each query and key head (Qwen3: yes, Mixtral: no)."""
    attention_bias: bool = False
    """Bias in the q, k, v and output projections (as in Hugging Face's Qwen3-MoE)."""
    attention_dropout: Probability = 0.0
    """Dropout on attention weights in training."""
    tie_word_embeddings: bool = False
    """Output head shares the embedding's weights."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of initial weights."""
    hidden_act: Literal["silu"] = "silu"
    """Activation of the gated units; SwiGLU only."""
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    """Router scores: softmax over all experts, or a sigmoid per expert (DeepSeek-V3)."""
    n_group: Positive = 1
    """Groups of experts for group-limited routing; 1 for none."""
    topk_group: Positive = 1
    """Groups a token may use, of n_group."""
    routed_scaling_factor: PositiveFloat = 1.0
    """Factor on the routing weights after renormalising."""
    router: str = "topk"
    """Router class: a registered name, or `package.module:Class` of your own."""
    expert: str = "swiglu"
    """Expert class: a registered name, or `package.module:Class` of your own."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel: PyTorch's fused one, or plain matmuls (the specification)."""

    _fits_together = model_validator(mode="after")(check_model)

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def has_experts(self, layer: int) -> bool:
        """Whether block `layer` (from 0) is a mixture-of-experts block."""
        return (
            self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def moe_layers(self) -> list[int]:
        """Global numbers of the mixture-of-experts blocks."""
        return [layer for layer in range(self.num_hidden_layers) if self.has_experts(layer)]


class DataConfig(Section):
    """Text to tokens to batches."""

    source: Literal["stdlib", "text", "jsonl", "parquet", "huggingface", "memory"] = "stdlib"
    """`stdlib` is the source of Python's own standard library: real text present on every machine; `memory`: what a
    program gives to `MoETrainer.train`."""
    path: PathText | list[PathText] | dict[str, PathText | list[PathText]] | None = None
    """File, folder pattern or list of them, for text, jsonl and parquet. Named, as in {code: a/*.py, prose: b/*.txt},
    routing is counted for each name."""
    validation_path: PathText | list[PathText] | None = None
    """Separate held-out files; without it documents are split by validation_split. They are of the same kind as path;
    beside other sources .jsonl and .parquet are known by their names, and the rest is text."""
    name: PathText | None = None
    """Dataset name for `huggingface`."""
    config_name: str | None = None
    """Configuration of that dataset, where it has several."""
    split: str = "train"
    """Split of the Hugging Face dataset."""
    text_field: str = "text"
    """Column that holds the text."""
    ignored_columns: list[str] = []
    """Columns of instruction data (instruction, messages, ...) that are left out on purpose: every token of text_field
    is then learned, and nothing of these."""
    streaming: bool = False
    """Read a Hugging Face dataset as a stream, without an index: needs max_steps or max_time, and has no held-out part
    but validation_path."""
    tokenizer: PathText = "bytes"
    """`bytes`, or the folder or name of any `transformers` tokenizer."""
    max_seq_length: Positive = 256
    """Tokens S in one training sample."""
    validation_split: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of documents held out for validation; not of a stream."""
    document_mask: bool = True
    """Attention and positions restart at document boundaries inside a packed sample."""
    shuffle: bool = True
    """Shuffle samples, anew in each epoch."""
    on_error: Literal["skip", "fail"] = "skip"
    """An unreadable or non-UTF-8 document: name, count and skip it, or stop."""
    on_change: Literal["stop", "warn"] = "stop"
    """A run goes on and its training data is not what it was: stop and name the files, or say so and go on, after as
    large a part of the epoch. Of a stream nobody can tell."""
    limit: Positive | None = None
    """Read at most this many documents."""
    dataloader_num_workers: NonNegative = 0
    """Batches prepared ahead by this many workers."""
    dataloader_pin_memory: bool = False
    """Page-locked host memory for batches (CUDA)."""

    _source_has_what_it_needs = model_validator(mode="after")(check_data)

    @property
    def validation_source(self) -> str:
        """What the files of validation_path are."""
        return self.source if self.source in FILE_SOURCES else file_source(self.validation_path)


class ParallelConfig(Section):
    """How ranks share the work: world = pp_size x edp x ep_size, and dp = edp x ep_size."""

    ep_size: Positive = 1
    """Expert parallelism: ranks over which the experts of a layer are spread."""
    pp_size: Positive = 1
    """Pipeline parallelism: ranks over which the layers are spread, in stages of consecutive layers."""
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "dualpipe_v"] = "1f1b"
    """Order in which a pipeline's ranks run micro-batches forward and backward (pp_size above 1)."""
    stages: list[Positive] | None = None
    """Number of layers of each stage, from the first to the last; default: balanced by arithmetic, then by size."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """0: every replica holds everything; 1: optimizer state is sharded over replicas; 2: gradients; 3: parameters."""
    shard_size: Positive | None = None
    """Shard inside groups of this many replicas and replicate across them (hybrid sharding); default: all replicas."""
    cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in host memory (CUDA, zero_stage 3)."""
    elastic: bool = False
    """On another number of ranks than before, or than the layout fits: choose one that keeps the global batch."""
    engine: Literal["torch", "deepspeed"] = "torch"
    """What shards: PyTorch's FSDP2, or the DeepSpeed package (zero_stage 1 or 2); see docs/deepspeed.md."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """DeepSpeed: keep float32 weights and optimizer state in host memory."""
    deepspeed_config: PathText | dict[str, Any] | None = None
    """DeepSpeed: a JSON file of your own, or its content; what contradicts our keys is refused."""

    _read_deepspeed_file = model_validator(mode="before")(read_deepspeed_config)

    @property
    def stages_per_rank(self) -> int:
        """Stages on each rank: one, or two or more where the schedule wants several short ones."""
        if self.pp_size == 1 or self.schedule in ("gpipe", "1f1b"):
            return 1
        if self.schedule == "interleaved_1f1b" and self.stages is not None:
            return max(2, len(self.stages) // self.pp_size)
        return 2

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pp_size * self.stages_per_rank


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
    early_stopping_patience: NonNegative = 0
    """Stop after this many evaluations without improvement; 0: never."""
    early_stopping_threshold: NonNegativeFloat = 0.0
    """Improvement smaller than this does not count."""
    divergence_loss: PositiveFloat | None = None
    """Stop when the training loss is above this ..."""
    divergence_epochs: NonNegativeFloat = 0.0
    """... after this many epochs."""
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

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _accept_true_and_false(cls, value: Any) -> Any:
        return {True: "full", False: "none"}.get(value, value) if isinstance(value, bool) else value

    _one_precision_and_an_end = model_validator(mode="after")(check_train)


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

    @property
    def aux_loss_coef(self) -> float:
        return self.router_aux_loss_coef if self.use_auxiliary_loss else 0.0

    @property
    def use_bias(self) -> bool | None:
        """Whether the selection bias is used; None: if it is not zero."""
        if self.use_selection_bias == "auto":
            return True if self.bias_update_rate else None
        return self.use_selection_bias


class CheckpointConfig(Section):
    """State to disk."""

    save_steps: NonNegative = 0
    """Save every this many steps; 0: only at the end."""
    save_at_end: bool = True
    """Save the last step."""
    save_total_limit: Positive | None = None
    """Keep at most this many checkpoints: the newest, or with metric_for_best_model the best (and the newest)."""
    keep_every: NonNegative = 0
    """Besides, keep steps that are multiples of this; 0: none."""
    metric_for_best_model: Literal["eval_loss"] | None = None
    """What makes a checkpoint good; default: its age."""
    greater_is_better: bool = False
    """Whether more of that metric is better."""
    load_best_model_at_end: bool = False
    """End with the weights of the best checkpoint."""
    folder: PathText | None = None
    """Where checkpoints go: a folder or a URL such as s3://bucket/run; default: output_dir."""
    background: bool = True
    """Write while training goes on; false: training waits until a checkpoint is committed."""
    when_busy: Literal["wait", "skip"] = "wait"
    """A save is due and the one before is still being written: wait for it, or leave this one out."""
    on_failure: Literal["continue", "stop"] = "continue"
    """A save that fails: warn and try again at the next one, or stop. The last one must succeed either way."""
    encryption_key: PathText | list[PathText] | None = None
    """Seal checkpoints (AES-256-GCM) with 32 bytes from a file or `env:NAME`; of a list the first seals, all open."""
    signing_key: PathText | None = None
    """Sign manifests (Ed25519) with 32 bytes from a file or `env:NAME`; go on from checkpoints alone that it signed."""
    resume: PathText = "auto"
    """`auto`: the newest checkpoint that verifies, if any; `never`: start afresh; a step, or a checkpoint's path."""
    load_optimizer: bool = True
    """Take the optimizer's moments from the checkpoint, too; false: go on from its weights, router bias, counters and
    place in the data, with moments that start afresh. For the first start of a job, as `resume`."""
    allow_config_change: bool = False
    """Go on although keys differ from the checkpoint's that change what is computed."""

    _best_has_a_metric = model_validator(mode="after")(check_checkpoint)

    @field_validator("resume", mode="before")
    @classmethod
    def _a_step_is_a_number(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @property
    def encryption_keys(self) -> list[str]:
        """Sources of keys, the sealing one first."""
        keys = self.encryption_key
        return [] if keys is None else [keys] if isinstance(keys, str) else keys


class PrometheusConfig(Section):
    """Metrics for a Prometheus server."""

    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Serve /metrics on this port, or the next free one; 0: any free port; null: no server."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every network of the machine."""
    bearer_token: PathText | None = None
    """Who asks for /metrics must send this token: a file that holds it, or `env:NAME`; null: anybody may ask."""
    tls_certificate: Folder | None = None
    """Serve by https: PEM file of the certificate, with those above it; needs tls_key."""
    tls_key: Folder | None = None
    """PEM file of its private key."""
    per_expert: Literal["full", "layer", "top"] = "full"
    """Series per expert: every expert, none (layers only), or the hottest and coldest four of each layer."""
    pushgateway: str | None = None
    """URL of a Pushgateway that gets the metrics at every logging interval and at the end."""

    _tls_is_whole = model_validator(mode="after")(check_prometheus)


class MonitorConfig(Section):
    """Facts to people."""

    logging_steps: Positive = 10
    """Steps between logged lines; facts cost one reduction per interval."""
    detail_steps: Positive | None = None
    """Steps between two lines with every expert and every rank; null: every line at first, ever fewer as a run with
    many experts goes on (docs/metrics.md)."""
    tensorboard: bool = True
    """Write TensorBoard events to tb/."""
    progress: Literal["auto", "live", "plain", "none"] = "auto"
    """Console: a live line on a terminal, plain lines elsewhere, or nothing."""
    peak_flops: PositiveFloat | None = None
    """Floating-point operations per second of one device, for the MFU: 989e12 for an H100 in bfloat16; null: that
    of the device where it is known, else no MFU."""
    stall_timeout: PositiveFloat = 60.0
    """Seconds in which no rank has moved after which a run counts as hung: it is said whom the others wait for, and all
    ranks end; from the first step on. What may be slow is given longer, a cut link less (docs/running.md)."""
    prometheus: PrometheusConfig = Field(default_factory=PrometheusConfig)
    """Metrics for a Prometheus server."""


class LaunchConfig(Section):
    """How ranks are started."""

    nproc_per_node: Positive = 1
    """Ranks started on this machine by `moe-dist train`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes CUDA where there is one."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Collective library; auto: gloo for CPU, NCCL for CUDA."""
    timeout: PositiveFloat = 120.0
    """Seconds after which a collective that does not finish is an error."""
    max_restarts: NonNegative = 3
    """A rank is lost: start again from the newest checkpoint, this often in a row without getting further (if
    checkpoint.save_steps is set)."""
    grace_period: PositiveFloat = 30.0
    """Seconds the ranks have, once asked to stop, to finish their step and save it."""
    num_threads: NonNegative = 0
    """CPU threads per rank; 0: cores divided by ranks."""
    master_port: NonNegative = 0
    """Port of the rendezvous on this machine; 0: a free one."""


class Config(Section):
    """A run: everything `moe-dist train` needs to know."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    balance: BalanceConfig = Field(default_factory=BalanceConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)

    _sections_fit_together = model_validator(mode="after")(check_sections)

    if not TYPE_CHECKING:  # a misspelt section is an error of types all the same

        def __getattr__(self, name: str) -> Any:
            """A key without its section, or by the name another trainer has for it: `config.batch_size`."""
            if name.startswith("_"):
                return super().__getattr__(name)  # pydantic's own
            from moe_dist.config_loading.attributes import read

            return read(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """`config.batch_size = 16` as `train.per_device_train_batch_size: 16` in a file: checked, with the rest."""
        if name.startswith("_") or name in type(self).model_fields:
            super().__setattr__(name, value)
            return
        from moe_dist.config_loading.attributes import write

        write(self, name, value)

    def global_batch_size(self, world_size: int) -> int:
        """Sequences in one optimizer step on `world_size` ranks."""
        dp_size = world_size // self.parallel.pp_size
        return self.train.per_device_train_batch_size * self.train.gradient_accumulation_steps * dp_size

    @property
    def num_evaluated(self) -> int | None:
        """Samples of an evaluation at most, over all ranks; None: the whole validation set."""
        train = self.train
        size = train.per_device_eval_batch_size or train.per_device_train_batch_size
        return None if train.eval_batches is None else train.eval_batches * size
