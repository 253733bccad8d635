"""Where and how it runs: layout, checkpoints, what is watched, ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from moe_dist.config.paths import Folder, PathText, expand
from moe_dist.config.sections.base import (
    Choice,
    NonNegative,
    OwnClass,
    Positive,
    PositiveFloat,
    Section,
)

DispatcherName = Annotated[
    str, AfterValidator(Choice("auto", "all_to_all", "dedup", "hierarchical", "deepep", "static", "all_gather"))
]
EngineName = Annotated[str, AfterValidator(Choice("torch", "deepspeed"))]


def read_deepspeed_config(raw: Any) -> Any:
    """`parallel` as written, with the path of a DeepSpeed file replaced by what the file holds."""
    path = raw.get("deepspeed_config") if isinstance(raw, Mapping) else None
    if not isinstance(path, (str, os.PathLike)):
        return raw
    try:
        file = Path(expand(os.fspath(path)))
        content = json.loads(file.read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"deepspeed_config={path}: cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed_config={path}: not a JSON file ({error})") from None
    except ValueError as error:
        raise ValueError(f"deepspeed_config={path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"deepspeed_config={path}: a JSON object, as DeepSpeed takes it")
    return {**raw, "deepspeed_config": content}


def check_checkpoint(checkpoint: CheckpointConfig) -> CheckpointConfig:
    """The best of what."""
    if checkpoint.load_best_model_at_end and checkpoint.metric_for_best_model is None:
        raise ValueError("load_best_model_at_end=true: say by what, metric_for_best_model=eval_loss")
    return checkpoint


def check_prometheus(prometheus: PrometheusConfig) -> PrometheusConfig:
    """A certificate and its key."""
    if (prometheus.tls_certificate is None) != (prometheus.tls_key is None):
        there, missing = ("tls_key", "tls_certificate") if prometheus.tls_key else ("tls_certificate", "tls_key")
        raise ValueError(f"{there}={getattr(prometheus, there)}: https needs {missing} beside it")
    return prometheus


class ParallelConfig(Section):
    """How ranks share the work: world = pp_size x edp x ep_size, and dp = edp x ep_size."""

    layout: Literal["given", "auto"] = "given"
    """given: as the keys below say; auto: what `moe-dist plan` ranks first for so many ranks of this machine, or of
    launch.cluster, with as many sequences in a step as the run file has: ep_size, pp_size, schedule, stages,
    zero_stage, shard_size, recomputation, micro-batch, accumulation. Resumes keep it on as many ranks."""
    planned_ranks: Positive | None = None
    """Ranks for which layout=auto has chosen the keys below: a run writes it, nobody else."""
    ep_size: Positive = 1
    """Expert parallelism: ranks over which the experts of a layer are spread."""
    dispatcher: DispatcherName = "auto"
    """How tokens reach experts on other ranks (ep_size above 1): all_to_all (a row for each expert of a token), dedup
    (one for each rank that has any of them), hierarchical (one for each host, and inside it one for each rank), auto
    (the one of these that sends fewest rows, where it saves a tenth of them, between hosts a quarter), deepep (dedup by
    the kernels of that package, on GPUs, in bfloat16; not measured), static (a row for each place that
    balance.capacity_factor gives an expert, taken or not: in training no layer waits for the device, with ep_size 1
    neither), all_gather (the specification of all, slow), or
    `package.module:Class` of your own (docs/extending.md)."""
    dispatch_chunks: Positive = 1
    """Pieces in which a micro-batch's tokens travel in training: experts compute one piece while the next comes and the
    one before goes home, forward and backward. It pays where the link is slow beside the experts (docs/parallelism.md);
    each piece computes all gradients of the experts' weights anew."""
    ranks_per_host: Positive | None = None
    """Neighbouring ranks that share a host, for `hierarchical`; default: as many as were started here."""
    expert_placement: Literal["off", "balanced"] = "off"
    """balanced: experts change ranks inside their expert group while the run goes on, so that every rank gets about as
    many rows (ep_size above 1, docs/parallelism.md); off: they stay in the order of their ids."""
    placement_interval: Positive = 100
    """Steps from one decision of expert_placement to the next: what a move spares in them must be worth its bytes; and
    from one choice of replicated_experts to the next."""
    replicated_experts: NonNegative = 0
    """So many experts of each layer, those that got most tokens, are computed by every rank of their expert group for
    its own tokens (ep_size above 1): weights travel to tokens, and gradients back (docs/parallelism.md); 0: none."""
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
    overlap_grad_reduce: bool = True
    """Sum gradients over replicas while the last backward pass computes others; false: after it (zero_stage 0; above it
    they always travel during backward). Pipelines with several stages on a rank sum them at their end."""
    bucket_cap_mb: PositiveFloat = 4.0
    """Gradients travel in pieces of about this size (zero_stage 0)."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of gradients on their way between replicas, and of their sums there; bfloat16 halves what travels, and keeps 8
    bits of each number (docs/parallelism.md)."""
    embedding_grad_reduce: Literal["auto", "rows", "whole"] = "auto"
    """What travels of the token embedding's gradient (zero_stage 0): whole: all of it; rows: those of the tokens that a
    rank has seen in the step; auto: rows where these are less, decided in every step."""
    cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in host memory (CUDA, zero_stage 3)."""
    elastic: bool = False
    """On another number of ranks than before, or than the layout fits: choose one that keeps the global batch."""
    engine: EngineName = "torch"
    """What shards and updates: `torch` (FSDP2 from zero_stage 1), `deepspeed` (the package, zero_stage 1 or 2, see
    docs/deepspeed.md), or `package.module:Class` of your own (docs/extending.md)."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """DeepSpeed: keep float32 weights and optimizer state in host memory."""
    deepspeed_config: PathText | dict[str, Any] | None = None
    """DeepSpeed: a JSON file of your own, or its content; what contradicts our keys is refused."""

    _read_deepspeed_file = model_validator(mode="before")(read_deepspeed_config)

    @field_validator("expert_placement", mode="before")
    @classmethod
    def _accept_false(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML's off

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
    position in the data, with moments that start afresh. For the first start of a job, as `resume`."""
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
    sinks: list[OwnClass] = []
    """Sinks of your own, beside those above and below, as `package.module:Class`; see docs/extending.md."""
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
    cluster: PathText | None = None
    """What the run is meant for: h100, h200, b200, a100, l40s, cpu, or a cluster file (docs/planning.md). `check` holds
    it against that, and parallel.layout=auto chooses for it; default: this machine."""
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
