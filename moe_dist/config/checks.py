"""What no field can say alone: combinations of keys that cannot work, each refused in one line.

`tree` calls these once every section is valid. A message begins with the key to change, as
`key=value: ` or `key: `: by it `reading` finds the file or override where that key was written.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe_dist.config.deepspeed import check_deepspeed
from moe_dist.config.expert_checks import check_copies, check_deepep, check_placement
from moe_dist.config.sections.all import Sections
from moe_dist.config.sections.lora import ALL_LINEAR, BUILT_IN_EXPERTS, BUILT_IN_ROUTERS, EXPERT_TARGETS, TARGETS
from moe_dist.config.sections.model import EXPERT_CHOICE, divisors
from moe_dist.config.sections.trained import MEASURED, WeightPattern
from moe_dist.config.trained_weights import TrainedWeights
from moe_dist.versions import too_old_to_split_backward


def check_sections(config: Sections) -> Sections:
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
    check_adapters(config)
    check_trained(config)
    check_preferences(config)
    if parallel.ep_size > 1 and model.num_experts % parallel.ep_size:
        raise ValueError(
            f"parallel.ep_size={parallel.ep_size}: must divide model.num_experts={model.num_experts} "
            f"(allowed: {divisors(model.num_experts)})"
        )
    if parallel.ep_size > 1 and not model.moe_layers:
        raise ValueError(f"parallel.ep_size={parallel.ep_size}: the model has no expert layer; allowed: 1")
    if parallel.dispatcher == "hierarchical" and parallel.ranks_per_host is not None:
        there = parallel.ranks_per_host
        if there == 1 or parallel.ep_size <= there or parallel.ep_size % there:
            raise ValueError(
                f"parallel.dispatcher=hierarchical: parallel.ep_size={parallel.ep_size} is not several hosts of "
                f"several ranks (parallel.ranks_per_host={there}); allowed: dedup, or a multiple of 2 or more above it"
            )
    check_deepep(config)
    check_placement(config)
    check_copies(config)
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


def check_routing(config: Sections) -> None:
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


def check_adapters(config: Sections) -> None:
    """A frozen model stays what it is: nothing else moves it."""
    lora, balance = config.lora, config.balance
    if not lora.r:
        return
    if balance.bias_update_rate:
        raise ValueError(
            f"balance.bias_update_rate={balance.bias_update_rate:g}: moves a selection bias of the model, which "
            f"lora.r={lora.r} freezes; set it to 0"
        )
    if lora.merge_and_save and not config.checkpoint.save_at_end:
        raise ValueError(
            "lora.merge_and_save=true: adds the adapters of a checkpoint; needs checkpoint.save_at_end=true"
        )
    words = [*TARGETS] if lora.target_modules == ALL_LINEAR else lora.target_modules
    if balance.freeze_router and "gate" in words:
        raise ValueError("balance.freeze_router=true: lora.target_modules has gate, the router; leave one of them out")
    if lora.use_dora:
        _check_dora(config, words)
    if lora.quantize is not None:
        _check_quantized(config)
    own = {"gate": ("router", BUILT_IN_ROUTERS)} | dict.fromkeys(EXPERT_TARGETS, ("expert", BUILT_IN_EXPERTS))
    for word, (key, known) in own.items():
        if config.model.moe_layers and word in words and getattr(config.model, key) not in known:
            raise ValueError(
                f"lora.target_modules={lora.target_modules}: model.{key}={getattr(config.model, key)} is a class of "
                f"its own, which adapters do not know; name modules without {word}"
            )
    if lora.target_modules == ["lm_head"] and config.parallel.pp_size > 1:
        raise ValueError(
            "lora.target_modules=[lm_head]: with parallel.pp_size="
            f"{config.parallel.pp_size} the first stages would have nothing to train; add q_proj, or take pp_size=1"
        )


def _check_dora(config: Sections, words: Sequence[str]) -> None:
    """Rows of linear maps alone have magnitudes."""
    refused = [word for word in words if config.model.moe_layers and word in ("gate", *EXPERT_TARGETS)]
    if refused:
        raise ValueError(
            f"lora.use_dora=true: lora.target_modules={config.lora.target_modules} has {refused[0]}, no linear map "
            "in transformers, and PEFT's format has magnitudes of these alone; name some, such as q_proj, or set "
            "use_dora=false"
        )


def _check_quantized(config: Sections) -> None:
    """Weights in few bits stay whole on their ranks, and are multiplied by code that knows them."""
    model, parallel, said = config.model, config.parallel, f"lora.quantize={config.lora.quantize}"
    if parallel.engine == "deepspeed" or parallel.zero_stage:
        raise ValueError(
            f"{said}: parallel.engine={parallel.engine}, zero_stage={parallel.zero_stage} cuts or casts weights, which "
            "codes of blocks do not allow; take engine=torch and zero_stage=0, and share experts out by ep_size"
        )
    if model.moe_layers and model.expert not in BUILT_IN_EXPERTS:
        raise ValueError(f"{said}: model.expert={model.expert} is a class of its own, which reads its weights itself")
    if config.train.torch_compile:
        raise ValueError(f"{said}: train.torch_compile=true cannot compile what makes weights whole; set it to false")


def check_trained(config: Sections) -> None:
    """Experts and layers that the model has, an engine that can hold some experts of a stack still, and nothing else
    that moves what is frozen. Whether names are those of weights is seen where these are known."""
    model, train = config.model, config.train
    for key in ("freeze", "train_only"):
        for text in getattr(train, key):
            pattern, name = WeightPattern.parse(text), f"train.{key}={text}"
            if pattern.experts is not None and not model.moe_layers:
                raise ValueError(f"{name}: the model has no expert layer")
            if pattern.experts == MEASURED and model.router == EXPERT_CHOICE:
                raise ValueError(f"{name}: with model.router={EXPERT_CHOICE} all experts get as many tokens; name some")
            for word, ids, count in (
                ("num_experts", pattern.experts, model.num_experts),
                ("num_hidden_layers", pattern.layers, model.num_hidden_layers),
            ):
                if ids is not None and ids != MEASURED and max(ids) >= count:
                    raise ValueError(f"{name}: {max(ids)} is not below model.{word}={count} (they count from 0)")
            engine = config.parallel.engine
            if pattern.experts is not None and engine != "torch":
                raise ValueError(
                    f"{name}: parallel.engine={engine} updates whole stacks of experts; take parallel.engine=torch, or "
                    "experts, which are all"
                )
    trained = TrainedWeights.of(config)
    if config.balance.bias_update_rate and not config.lora.r and (train.freeze or train.train_only):
        still = [n for n in model.moe_layers if not trained.part(f"layers.{n}.moe.router.weight")]
        if still:
            raise ValueError(
                f"balance.bias_update_rate={config.balance.bias_update_rate:g}: moves the selection bias of layer "
                f"{still[0]}, whose router is frozen by train.{'train_only' if train.train_only else 'freeze'}; set it "
                "to 0"
            )


def check_preferences(config: Sections) -> None:
    """One loss, and log-probabilities of an answer that depend on its own tokens alone, today as at the start."""
    if not config.learns_preferences:
        return
    data, train, balance = config.data, config.train, config.balance
    if config.dpo.reference == "base" and not config.lora.r:
        raise ValueError(
            "dpo.reference=base: that is the model without its adapters, and lora.r=0 trains none; allowed: auto, start"
        )
    if train.label_smoothing_factor:
        raise ValueError(
            f"train.label_smoothing_factor={train.label_smoothing_factor:g}: is of the loss on tokens, which "
            "data.format=preference has not; set dpo.label_smoothing"
        )
    if data.streaming:
        raise ValueError("data.streaming=true: not with data.format=preference; set it to false")
    if not data.document_mask:
        raise ValueError(
            "data.document_mask=false: answers of data.format=preference that share a sample would see each other; set "
            "it to true"
        )
    if config.model.router == EXPERT_CHOICE:
        raise ValueError(
            f"model.router={EXPERT_CHOICE}: what becomes of an answer depends on the others in its micro-batch, and it "
            "has no log-probability of its own; data.format=preference needs another router"
        )
    if balance.router_temperature_steps:
        raise ValueError(
            f"balance.router_temperature_steps={balance.router_temperature_steps}: the reference of "
            "data.format=preference has one temperature; set it to 0"
        )


def check_held_out(config: Sections) -> None:
    """Something to evaluate on where evaluations are asked for, and an end of a stream, whose length nobody knows."""
    data, train = config.data, config.train
    if (train.eval_steps or train.eval_tasks) and data.validation_path is None:
        key = f"train.eval_steps={train.eval_steps}: " if train.eval_steps else "train.eval_tasks: "
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


def check_pipeline(config: Sections) -> None:
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
            "the head on the last; set it to false, or take pp_size=1"
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
