"""Known bugs of parallel trainers, by name: what each needs to act. Planted by `injected_bugs/`. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_dist.verify.features import ADAPTERS, FEATURES, LOW_PRECISION, PREFERENCES, Choice, setting_of
from moe_dist.verify.layouts import Case

Where = Callable[[Case], bool]


@dataclass(frozen=True)
class Bug:
    """Acts in a case that has all features of `words` and none of `without`, in a layout that `where` accepts.

    `settings`: options beside those of `words` without which it would do nothing. `life`: it acts only in what happens
    between the steps of a run, so only lives can show it; `event`: that it needs there.
    """

    words: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    where: Where = lambda layout: True
    settings: Mapping[str, Any] = field(default_factory=dict)
    life: bool = False
    event: str = "train"

    @property
    def options(self) -> dict[str, Any]:
        """What is switched on in every case when a person plants it; not a precision, which cases are judged by."""
        words = [word for word in self.words if word not in LOW_PRECISION]
        return {key: value for word in words for key, value in setting_of(word).items()} | dict(self.settings)

    def acts_in(self, layouts: Sequence[Case], features: Choice, events: Sequence[str] = ()) -> bool:
        """Whether it would act in such a case. `events`: those of a life; none in a few steps of training."""
        return (
            self.life == bool(events)
            and (not self.life or self.event in events)
            and features >= set(self.words)
            and not features & set(self.without)
            # Beside adapters most weights are frozen, and what is wrong with their gradients is not there.
            and (bool(ADAPTERS & set(self.words)) or not features & ADAPTERS)
            and (bool(PREFERENCES & set(self.words)) or not features & PREFERENCES)  # another loss
            and any(map(self.where, layouts))
        )


def _ep(layout: Case) -> bool:
    return layout.ep_size > 1


def _pipeline(layout: Case) -> bool:
    return layout.pp_size > 1


def _whole(layout: Case) -> bool:
    """Nothing sharded."""
    return layout.zero_stage == 0


def _fsdp(layout: Case) -> bool:
    return layout.engine == "torch" and layout.zero_stage > 0


def _deepspeed(layout: Case) -> bool:
    return layout.engine == "deepspeed"


def _accumulated(layout: Case) -> bool:
    return layout.accumulation > layout.pp_size


def _recomputed(layout: Case) -> bool:
    return layout.recompute != "none"


def _not_hybrid(layout: Case) -> bool:
    return layout.shard_size is None


def _replicas(layout: Case) -> bool:
    """Several of them, on few ranks."""
    return layout.pp_size <= 2


def _few_experts(layout: Case) -> bool:
    """Experts over `ep`, and every one on several replicas too, on four ranks."""
    return layout.ep_size * layout.pp_size == 2


def _both(*conditions: Where) -> Where:
    return lambda layout: all(condition(layout) for condition in conditions)


_AUXILIARY = {"balance.use_auxiliary_loss": True, "balance.router_aux_loss_coef": 0.01}
_NOT_CLIPPED = ("no_clipping", "rare_clipping")
_NO_STACK = ("own_experts", "noisy_experts")
_NO_MOMENTS = ("sgd", "adafactor")
_OTHER_NOISE = ("jitter", "expert_dropout", "noisy_experts")

_OF_LAYOUTS: dict[str, Bug] = {
    "expert_gradient_times_ep": Bug(where=_both(_ep, _whole)),
    "expert_gradient_averaged_over_edp": Bug(where=_both(_few_experts, _whole)),
    "expert_gradient_averaged_over_active_replicas": Bug(where=_both(_whole, lambda layout: layout.pp_size == 1)),
    "gradients_sent_before_the_last_micro_batch": Bug(
        without=("late_reduction",),
        where=_both(_whole, lambda layout: layout.pp_size == 1 and layout.accumulation > 1 and layout.ep_size > 1),
    ),
    "buckets_sent_without_their_last_gradient": Bug(
        without=("late_reduction",),
        where=_both(_whole, lambda layout: layout.pp_size == 1 and layout.ep_size > 1),
    ),
    "loss_by_local_tokens": Bug(without=("even_batches",), where=_replicas),
    "auxiliary_loss_by_local_tokens": Bug(settings=_AUXILIARY, without=("no_aux_loss",), where=_replicas),
    "auxiliary_loss_times_micro_batches": Bug(settings=_AUXILIARY, without=("no_aux_loss",)),
    "norm_without_experts": Bug(where=_whole),
    "norm_counts_replicas": Bug(where=_both(_whole, _replicas)),
    "norm_of_own_experts": Bug(where=_ep),
    "replica_misses_the_last_update": Bug(where=lambda layout: layout.engine == "torch"),
    "fsdp_averages": Bug(where=_fsdp),
    "fsdp_averages_experts": Bug(where=_both(_fsdp, lambda layout: layout.ep_size == 1)),
    "router_cut_from_loss": Bug(without=("frozen_router", "top1")),
    "auxiliary_loss_cut": Bug(settings=_AUXILIARY, without=("no_aux_loss",)),
    "auxiliary_loss_cut_with_capacity": Bug(("capacity",), ("no_aux_loss",), settings=_AUXILIARY),
    "global_load_is_local": Bug(
        ("global_scope",), ("no_aux_loss",), lambda layout: layout.accumulation == 1, settings=_AUXILIARY
    ),
    "load_of_the_whole_batch_unknown": Bug(
        ("global_scope",), ("no_aux_loss",), lambda layout: layout.accumulation > 1, settings=_AUXILIARY
    ),
    "bias_from_counts_after_drop": Bug(("bias",)),
    "bias_from_local_counts": Bug(("bias",), where=_replicas),
    "seeds_by_local_expert": Bug(),
    "capacity_of_the_whole_group": Bug(("capacity",), ("static",), _ep),
    "gradients_scaled_by_the_schedule": Bug(where=_pipeline),
    "auxiliary_loss_scaled_by_the_schedule": Bug(settings=_AUXILIARY, without=("no_aux_loss",), where=_pipeline),
    "gradients_of_a_stage_sent_early": Bug(
        without=("late_reduction",),
        where=_both(_whole, lambda layout: layout.pp_size == 2 and layout.schedule in ("gpipe", "1f1b")),
    ),
    "gradients_of_a_stage_reduced_twice": Bug(where=_both(_whole, lambda layout: layout.pp_size == 2)),
    "norm_of_the_last_stage": Bug(where=_pipeline),
    "loss_of_one_stage": Bug(where=_pipeline),
    "seeds_by_local_layer": Bug(),
    "noise_by_rank": Bug(("jitter",)),
    "load_counted_by_a_pass_for_shapes": Bug(("bias",), where=_pipeline),
    "deepspeed_averages": Bug(where=_deepspeed),
    "deepspeed_averages_experts": Bug(where=_both(_deepspeed, _few_experts)),
    "deepspeed_knows_no_experts": Bug(where=_both(_deepspeed, _ep)),
    "deepspeed_divides_by_accumulation": Bug(where=_deepspeed),
}
"""In what ranks do together whatever is trained."""

_OF_FEATURES: dict[str, Bug] = {
    # what a layer computes
    "attention_dropout_by_rank": Bug(("attention_dropout",), _OTHER_NOISE),
    "expert_dropout_by_rank": Bug(("expert_dropout",), ("jitter", "noisy_experts")),
    "noise_of_own_experts_by_rank": Bug(("noisy_experts",)),
    "noise_by_stages_of_one_length": Bug(("attention_dropout", "uneven_stages"), where=_pipeline),
    "recomputation_without_its_noise": Bug(("attention_dropout",), where=_recomputed),
    "load_counted_again_in_recomputation": Bug(where=lambda layout: layout.recompute == "full"),
    "one_float8_scale_for_all_rows": Bug(("fp8_experts",), where=_ep),
    "scores_scaled_twice": Bug(("sigmoid",), where=_ep),
    "groups_ignored_by_expert_parallelism": Bug(("groups",), where=_ep),
    "experts_of_the_tenth_layer_in_reverse": Bug(("deep",), (*FEATURES["dispatcher"],), _ep),
    "temperature_forgotten_by_expert_parallelism": Bug(("temperature",), where=_ep),
    "temperature_of_the_weights_alone": Bug(("temperature", "groups"), where=_ep),
    "annealing_by_micro_batches": Bug(("annealing",), where=_pipeline),
    "fallbacks_of_every_rank_of_ep": Bug(("fallback",), where=_ep),
    "fallbacks_are_load_twice": Bug(("fallback",)),
    "fallback_on_the_first_rank": Bug(("fallback",)),
    "experts_choose_for_the_whole_group": Bug(("expert_choice",), where=_ep),
    "experts_choose_padding": Bug(("expert_choice",), ("even_batches",), _ep),
    "expert_dropout_by_stage": Bug(("expert_dropout",), where=_pipeline),
    "jitter_by_stage": Bug(("jitter",), where=_pipeline),
    "capacity_counts_padding": Bug(("capacity",), ("even_batches",), _ep),
    "z_loss_times_ep": Bug(("z_loss",), where=_ep),
    "sequence_scope_over_the_micro_batch": Bug(("sequence_scope",), ("no_aux_loss",), _ep),
    "global_load_is_local_in_a_sharded_pipeline": Bug(
        ("global_scope",), ("no_aux_loss",), _both(_pipeline, _fsdp, _replicas)
    ),
    "queries_not_normed_in_later_stages": Bug((), ("no_qk_norm", "latents"), _pipeline),
    "window_of_one_more_in_later_stages": Bug(("window",), where=_pipeline),
    "documents_kept_apart_in_a_pipeline": Bug(("no_document_mask",), ("even_batches",), _pipeline),
    "positions_of_the_first_micro_batch": Bug((), ("no_document_mask", "even_batches"), _pipeline),
    "domains_lost_in_a_pipeline": Bug(("domains",), where=_pipeline),
    "gathered_tokens_learn_from_one_rank": Bug(("all_gather",), where=_ep),
    "deduplicated_tokens_sent_again": Bug(("dedup",), ("top1",), _ep),
    "last_place_left_empty": Bug(("static",), where=_ep),
    "noise_of_another_host": Bug(("hierarchical", "noisy_experts"), where=_ep),
    "moments_stay_when_experts_move": Bug(("moved_experts",), where=_ep),
    "noise_stays_when_experts_move": Bug(("moved_experts", "noisy_experts"), where=_ep),
    "copies_learn_from_one_rank": Bug(("hot_experts",), where=_ep),
    "weights_of_other_ranks_learn_nothing": Bug(("dedup",), ("frozen_router",), _ep),
    "pieces_home_in_another_order": Bug(("pieces",), ("own_experts", "noisy_experts", "lora", "all_gather"), _ep),
    "evaluation_in_training_mode": Bug(("capacity",), where=_ep),
    "evaluation_keeps_documents_apart": Bug(("no_document_mask",), ("even_batches",)),
    "evaluation_counts_load": Bug(("bias",)),
    "jitter_in_an_evaluation": Bug(("jitter",)),
    # losses, gradients, updates
    "label_smoothing_ignored_by_fsdp": Bug(("label_smoothing",), where=_fsdp),
    "head_learns_from_the_last_chunk": Bug(("chunked_loss",)),
    "experts_learn_from_the_last_chunk": Bug(("chunked_rows",), ("pieces", *FEATURES["experts"]), _deepspeed),
    "ignored_labels_in_the_scale": Bug((), ("even_batches",)),
    "micro_batches_weigh_alike": Bug((), ("even_batches",), _accumulated),
    "tied_weight_counted_twice": Bug(("tied",), ("frozen_parts",), _fsdp),
    "clipped_by_a_local_norm": Bug((), _NOT_CLIPPED, _both(_whole, _ep)),
    # AdamW steps the same whatever factor all gradients have.
    "deepspeed_does_not_clip": Bug(("sgd",), _NOT_CLIPPED, _deepspeed),
    "shared_expert_reduced_as_an_expert": Bug(("shared_expert",), where=_both(_whole, _ep)),
    "dense_layer_reduced_as_an_expert": Bug(("dense_layer",), where=_both(_whole, _ep)),
    "expert_gradients_of_the_last_micro_batch": Bug(
        # Of hybrid sharding FSDP adds up elsewhere, until the last.
        where=_both(lambda layout: layout.zero_stage == 3 and layout.pp_size == 1, _accumulated, _not_hybrid)
    ),
    "half_gradients_of_experts_doubled": Bug(("pure_bf16",), where=_both(_whole, _ep)),
    "half_rows_doubled_on_the_way_back": Bug(("pure_bf16",), ("all_gather",), _ep),
    "half_gradients_added_up_in_half": Bug(("pure_bf16",), where=_both(_whole, lambda layout: layout.accumulation > 1)),
    "half_gradients_reduced_in_half": Bug(("pure_bf16",), where=_both(_fsdp, lambda layout: layout.accumulation == 1)),
    "own_rows_of_the_embedding_twice": Bug(("rows_reduction",), ("frozen_parts",), _both(_whole, _replicas)),
    "weights_of_shards_in_half": Bug(("pure_bf16",), where=_fsdp),
    "frozen_router_decayed_by_fsdp": Bug(("frozen_router",), ("no_decay",), _fsdp),
    "attention_biases_decayed_by_fsdp": Bug(("attention_bias",), ("no_decay",), _fsdp),
    "stacked_biases_decayed": Bug(("biased_experts",), ("no_decay",), lambda layout: layout.engine == "torch"),
    "adafactor_across_experts": Bug(("adafactor",), _NO_STACK),
    "bias_from_one_replica": Bug(("bias",), where=_replicas),
    "rate_by_rank": Bug(("cosine",)),
    # adapters
    "adapter_gradient_times_ep": Bug(("lora",), where=_both(_ep, _whole)),
    "adapter_b_cut_from_the_layout_of_files": Bug(("lora",), where=_ep),
    "adapter_dropout_by_rank": Bug(("lora",)),
    "adapters_added_twice_in_an_evaluation": Bug(("lora",)),
    "frozen_experts_decayed": Bug(("some_experts",), ("no_decay",), lambda layout: layout.engine == "torch"),
    "experts_chosen_by_their_place_here": Bug(("some_experts",), where=_ep),
    "norm_with_frozen_experts": Bug(("some_experts",), ("rare_clipping", "no_clipping")),
    "lengths_of_rows_of_a_shard": Bug(("dora",), where=_both(_fsdp, _replicas)),
    "lengths_of_rows_learn_in_a_pipeline": Bug(("dora",), where=_pipeline),
    "frozen_weights_decayed_by_fsdp": Bug(("lora",), ("no_decay",), _fsdp),
    # preferences
    "reference_with_adapters_on": Bug(("dpo", "lora")),
    "prompt_tokens_counted": Bug(("dpo",), ("even_batches",)),
    "preferences_weighed_by_rank": Bug(("dpo",), ("even_batches",), _replicas),
}
"""In one feature under one kind of layout."""

_OF_LIVES: dict[str, Bug] = {
    "rate_late_after_a_resume": Bug(("cosine",), life=True),
    "noise_starts_anew_after_a_resume": Bug(("attention_dropout",), life=True),
    "tokens_forgotten_by_a_resume": Bug(life=True),
    "data_position_of_one_replica": Bug(life=True),
    "selection_bias_not_restored": Bug(("bias",), life=True),
    "data_position_read_ahead": Bug(life=True),
    "first_moment_not_saved": Bug((), _NO_MOMENTS, life=True, where=lambda layout: layout.engine == "torch"),
    "momentum_not_saved": Bug(("sgd",), life=True),
    "factors_not_saved": Bug(("adafactor",), life=True),
    "masters_from_rounded_weights": Bug(("pure_bf16",), life=True, where=_whole),
    "annealing_starts_anew_after_a_resume": Bug(("annealing",), life=True),
    "gate_and_up_swapped_in_a_moment": Bug((), (*_NO_STACK, *_NO_MOMENTS), life=True),
    "weights_left_whole_by_an_evaluation": Bug(
        life=True, where=lambda layout: layout.engine == "torch" and layout.zero_stage in (1, 2), event="evaluate"
    ),
    "stacks_cut_twice_over_experts": Bug(
        ("biased_experts",), ("moved_experts",), where=_both(_fsdp, _few_experts), life=True
    ),
    "experts_saved_where_they_are": Bug(("moved_experts",), where=_ep, life=True),
    "skipped_step_moves_the_bias": Bug(("bias",), life=True, event="skip"),
    "save_behind_takes_the_next_weights": Bug(life=True, event="save_behind"),
}
"""In what comes after an event of a run's life."""

BUGS: dict[str, Bug] = _OF_LAYOUTS | _OF_FEATURES | _OF_LIVES
"""What `moe-dist verify --inject-bug` can put in."""
