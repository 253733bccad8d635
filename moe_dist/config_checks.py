"""What no field can say alone: combinations of keys that cannot work, each refused in one line.

`config.py` calls these once the fields of a section are valid. A message begins with the key to change, as
`key=value: ` or `key: `: by it `config_loading` finds the file or override where that key was written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_dist.config_deepspeed import check_deepspeed
from moe_dist.versions import too_old_to_split_backward

if TYPE_CHECKING:
    from moe_dist.config import (
        BalanceConfig,
        CheckpointConfig,
        Config,
        DataConfig,
        ModelConfig,
        OptimizerConfig,
        PrometheusConfig,
        TrainConfig,
    )


EXPERT_CHOICE = "expert_choice"
"""Value of model.router: experts choose tokens."""
FILE_SOURCES = ("text", "jsonl", "parquet")
MAX_DOMAINS = 16
"""Named sources of data whose routing is counted apart."""


def _divisors(number: int) -> str:
    """For error messages; bounded, so that a mistyped huge number is answered at once."""
    return ", ".join(str(n) for n in range(1, min(number, 4096) + 1) if number % n == 0)


def check_model(model: ModelConfig) -> ModelConfig:
    """Routing, attention heads and layer numbers that one transformer can have."""
    if model.router == EXPERT_CHOICE and (model.n_group > 1 or model.scoring_func != "softmax"):
        other = f"n_group={model.n_group}" if model.n_group > 1 else f"scoring_func={model.scoring_func}"
        raise ValueError(
            f"router={EXPERT_CHOICE}: experts choose by softmax scores, among all tokens; not with {other}"
        )
    if model.num_experts:
        if model.num_experts_per_tok > model.num_experts:
            raise ValueError(
                f"num_experts_per_tok={model.num_experts_per_tok}: at most num_experts={model.num_experts}"
            )
        if model.num_experts_per_tok == 1 and model.norm_topk_prob and model.router == "topk":
            raise ValueError(
                "norm_topk_prob=true: with num_experts_per_tok=1 the renormalised weight is always 1 and "
                "the router never learns; set norm_topk_prob=false or num_experts_per_tok>=2"
            )
        if model.num_experts % model.n_group:
            raise ValueError(f"n_group={model.n_group}: must divide num_experts={model.num_experts}")
        if model.topk_group > model.n_group:
            raise ValueError(f"topk_group={model.topk_group}: at most n_group={model.n_group}")
        reachable = model.topk_group * (model.num_experts // model.n_group)
        if model.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok={model.num_experts_per_tok}: topk_group={model.topk_group} of "
                f"n_group={model.n_group} leaves {reachable} experts to choose from"
            )
    heads, kv_heads = model.num_attention_heads, model.kv_heads
    if heads % kv_heads:
        raise ValueError(
            f"num_key_value_heads={kv_heads}: must divide num_attention_heads={heads} (allowed: {_divisors(heads)})"
        )
    if model.head_dim is None and model.hidden_size % heads:
        raise ValueError(f"hidden_size={model.hidden_size}: not divisible by num_attention_heads={heads}; set head_dim")
    if model.head_size % 2:
        raise ValueError(f"head_dim={model.head_size}: must be even (rotary embedding)")
    for layer in model.mlp_only_layers:
        if layer >= model.num_hidden_layers:
            raise ValueError(
                f"mlp_only_layers={model.mlp_only_layers}: layer {layer} is past num_hidden_layers="
                f"{model.num_hidden_layers} (layers count from 0)"
            )
    return model


def file_source(path: object) -> str:
    """The source that reads such files, by the names of the first."""
    while isinstance(path, (list, dict)):
        path = next(iter(path.values() if isinstance(path, dict) else path), "")
    name = str(path).removesuffix(".gz")
    return next((kind for kind in ("jsonl", "parquet") if name.endswith(f".{kind}")), "text")


def _texts(path: Any) -> list[str]:
    """Every pattern in a value of `data.path`."""
    if isinstance(path, dict):
        return [text for item in path.values() for text in _texts(item)]
    return [] if path is None else [str(path)] if isinstance(path, str) else [str(item) for item in path]


def check_data(data: DataConfig) -> DataConfig:
    """A source with what it reads from, and nothing that it would not read."""
    if data.source in FILE_SOURCES and not data.path:
        raise ValueError(f"path=null: source={data.source} needs data.path (a file or a pattern)")
    if data.path and data.source not in FILE_SOURCES:
        raise ValueError(
            f"path={data.path}: source={data.source} reads no files; set data.source={file_source(data.path)} "
            f"(one of {', '.join(FILE_SOURCES)}), or data.path=null"
        )
    for key in ("path", "validation_path"):
        if url := next((text for text in _texts(getattr(data, key)) if "://" in text), None):
            raise ValueError(
                f"{key}={url}: files are read from this machine's folders; copy or mount it here, or give a dataset by "
                "data.source=huggingface data.name=..."
            )
    if isinstance(data.path, dict) and len(data.path) > MAX_DOMAINS:
        raise ValueError(
            f"path: {len(data.path)} names; routing is counted for each, at most {MAX_DOMAINS} (a name may have a list)"
        )
    if data.source == "huggingface" and not data.name:
        raise ValueError("name=null: source=huggingface needs data.name")
    for key in ("name", "config_name"):
        value = getattr(data, key)
        if value and data.source != "huggingface":
            raise ValueError(
                f"{key}={value}: source={data.source} has none; set data.source=huggingface, or data.{key}=null"
            )
    if data.streaming and data.source not in ("huggingface", "memory"):
        raise ValueError(f"streaming=true: only for source=huggingface, not {data.source}")
    return data


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


def check_checkpoint(checkpoint: CheckpointConfig) -> CheckpointConfig:
    """The best of what."""
    if checkpoint.load_best_model_at_end and checkpoint.metric_for_best_model is None:
        raise ValueError("load_best_model_at_end=true: say by what, metric_for_best_model=eval_loss")
    return checkpoint


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


def check_optimizer(optimizer: OptimizerConfig) -> OptimizerConfig:
    """A schedule that goes down."""
    if optimizer.min_learning_rate > optimizer.learning_rate:
        raise ValueError(
            f"min_learning_rate={optimizer.min_learning_rate}: at most learning_rate={optimizer.learning_rate}"
        )
    return optimizer


def check_sections(config: Config) -> Config:
    """Sections that contradict each other."""
    model, parallel, checkpoint = config.model, config.parallel, config.checkpoint
    if checkpoint.metric_for_best_model is not None:
        save, evaluate = checkpoint.save_steps, config.train.eval_steps
        if not save or not evaluate or save % evaluate:
            raise ValueError(
                f"checkpoint.metric_for_best_model={checkpoint.metric_for_best_model}: needs train.eval_steps="
                f"{evaluate} above 0 and checkpoint.save_steps={save} to be a multiple of it"
            )
    check_routing(config)
    if parallel.ep_size > 1 and model.num_experts % parallel.ep_size:
        raise ValueError(
            f"parallel.ep_size={parallel.ep_size}: must divide model.num_experts={model.num_experts} "
            f"(allowed: {_divisors(model.num_experts)})"
        )
    if parallel.ep_size > 1 and not model.moe_layers:
        raise ValueError(f"parallel.ep_size={parallel.ep_size}: the model has no expert layer; allowed: 1")
    check_deepspeed(config)
    if parallel.shard_size is not None:
        size, ep_size = parallel.shard_size, parallel.ep_size
        if not parallel.zero_stage:
            raise ValueError(
                f"parallel.shard_size={size}: nothing is sharded with parallel.zero_stage=0; allowed: 1, 2, 3"
            )
        if size % ep_size and ep_size % size:
            raise ValueError(f"parallel.shard_size={size}: a multiple or a divisor of parallel.ep_size={ep_size}")
    if parallel.cpu_offload and (parallel.zero_stage != 3 or config.launch.device == "cpu"):
        raise ValueError("parallel.cpu_offload=true: needs parallel.zero_stage=3 and a CUDA device")
    if parallel.zero_stage and config.optimizer.optim == "adafactor":
        raise ValueError(
            f"optimizer.optim=adafactor: its row and column means need whole matrices, which parallel.zero_stage="
            f"{parallel.zero_stage} cuts; allowed: adamw_torch_fused, adamw_torch, sgd, or parallel.zero_stage=0"
        )
    check_pipeline(config)
    if config.data.max_seq_length > model.max_position_embeddings:
        raise ValueError(
            f"data.max_seq_length={config.data.max_seq_length}: at most "
            f"model.max_position_embeddings={model.max_position_embeddings}"
        )
    if config.launch.backend == "nccl" and config.launch.device == "cpu":
        raise ValueError("launch.backend=nccl: NCCL needs launch.device=cuda; use gloo on CPU")
    if config.train.early_stopping_patience and not config.train.eval_steps:
        raise ValueError("train.early_stopping_patience: needs train.eval_steps > 0")
    check_held_out(config)
    return config


def check_routing(config: Config) -> None:
    """Options of routing that the router and the experts can have."""
    model, balance = config.model, config.balance
    if balance.fallback_expert is not None and balance.fallback_expert >= max(1, model.num_experts):
        raise ValueError(
            f"balance.fallback_expert={balance.fallback_expert}: below model.num_experts={model.num_experts} "
            "(experts count from 0)"
        )
    if model.router == EXPERT_CHOICE:
        for key in ("bias_update_rate", "capacity_factor", "fallback_expert"):
            if getattr(balance, key) not in (None, 0.0):
                raise ValueError(
                    f"balance.{key}={getattr(balance, key)}: with model.router={EXPERT_CHOICE} every expert takes as "
                    "many tokens as it has places, the best first; leave it out, or take model.router=topk"
                )


def check_held_out(config: Config) -> None:
    """Something to evaluate on where evaluations are asked for, and an end of a stream, whose length nobody knows."""
    data, train = config.data, config.train
    if train.eval_steps and data.validation_path is None:
        key = f"train.eval_steps={train.eval_steps}: "
        if data.streaming:
            raise ValueError(f"{key}nothing is held out of a stream (data.streaming=true); set data.validation_path")
        if not data.validation_split:
            raise ValueError(
                f"{key}nothing is held out; set data.validation_path or data.validation_split=0.05, or eval_steps=0"
            )
    if data.streaming and train.max_steps < 0 and train.max_time is None:
        raise ValueError(
            f"train.max_steps={train.max_steps}: data.streaming=true has no length for num_train_epochs="
            f"{train.num_train_epochs} to end the run or shape the schedule by; set train.max_steps or train.max_time"
        )


def check_prometheus(prometheus: PrometheusConfig) -> PrometheusConfig:
    """A certificate and its key."""
    if (prometheus.tls_certificate is None) != (prometheus.tls_key is None):
        there, missing = ("tls_key", "tls_certificate") if prometheus.tls_key else ("tls_certificate", "tls_key")
        raise ValueError(f"{there}={getattr(prometheus, there)}: https needs {missing} beside it")
    return prometheus


def check_pipeline(config: Config) -> None:
    """Stages that the layers fill, micro-batches that the schedule can run, and options it computes rightly."""
    model, parallel, train = config.model, config.parallel, config.train
    pp_size, schedule, stages = parallel.pp_size, parallel.schedule, parallel.stages
    if pp_size == 1:
        if stages is not None:
            raise ValueError(f"parallel.stages={stages}: needs parallel.pp_size above 1")
        return
    num_layers, num_stages = model.num_hidden_layers, parallel.num_stages
    if stages is not None and len(stages) != num_stages:
        several = "; or 3, 4, ... times pp_size" if schedule == "interleaved_1f1b" else ""
        raise ValueError(
            f"parallel.stages={stages}: {len(stages)} stages, parallel.schedule={schedule} on parallel.pp_size="
            f"{pp_size} ranks has {num_stages}{several}"
        )
    if stages is not None and sum(stages) != num_layers:
        raise ValueError(f"parallel.stages={stages}: {sum(stages)} layers, model.num_hidden_layers={num_layers}")
    if num_stages > num_layers:
        raise ValueError(
            f"parallel.pp_size={pp_size}: parallel.schedule={schedule} has {num_stages} stages of at least one layer, "
            f"model.num_hidden_layers={num_layers}"
        )
    if model.tie_word_embeddings:
        raise ValueError(
            f"model.tie_word_embeddings=true: with parallel.pp_size={pp_size} the embedding is on the first stage and "
            "the head on the last; set it to false"
        )
    _check_micro_batches(pp_size, schedule, num_stages, train.gradient_accumulation_steps)
    splits_backward = schedule in ("zero_bubble", "dualpipe_v")
    if splits_backward and (torch := too_old_to_split_backward()):
        raise ValueError(
            f"parallel.schedule={schedule}: PyTorch {torch} cannot run it; allowed: gpipe, 1f1b, interleaved_1f1b, or "
            "PyTorch 2.13 or newer"
        )
    if splits_backward and train.pure_bf16:
        raise ValueError(
            f"train.pure_bf16=true: parallel.schedule={schedule} computes weight gradients apart, where they are not "
            "summed in float32; use train.bf16, or gpipe, 1f1b, interleaved_1f1b"
        )
    if train.torch_compile:
        raise ValueError(f"train.torch_compile=true: not with parallel.pp_size={pp_size}")
    if parallel.shard_size is not None:
        raise ValueError(f"parallel.shard_size={parallel.shard_size}: not with parallel.pp_size={pp_size}")
    if parallel.cpu_offload:
        raise ValueError(f"parallel.cpu_offload=true: not with parallel.pp_size={pp_size}")
    if parallel.zero_stage == 2:
        raise ValueError(
            f"parallel.zero_stage=2: with parallel.pp_size={pp_size} gradients are reduced after the last micro-batch, "
            "which is stage 1; allowed: 0, 1, 3"
        )
    if parallel.zero_stage == 3 and splits_backward:
        raise ValueError(
            f"parallel.zero_stage=3: parallel.schedule={schedule} needs whole parameters between a stage's forward and "
            "backward; allowed: 0, 1, or gpipe, 1f1b, interleaved_1f1b"
        )


def _check_micro_batches(pp_size: int, schedule: str, num_stages: int, count: int) -> None:
    key = f"train.gradient_accumulation_steps={count}: parallel.schedule={schedule} on parallel.pp_size={pp_size} ranks"
    least = {"gpipe": 1, "zero_bubble": 2 * pp_size - 1, "dualpipe_v": num_stages}.get(schedule, pp_size)
    if count < least:
        raise ValueError(f"{key} needs at least {least} micro-batches")
    if schedule == "interleaved_1f1b" and count % pp_size:
        raise ValueError(f"{key} needs a multiple of {pp_size} micro-batches")
