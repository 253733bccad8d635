"""Expert-specialised fine-tuning: of every layer only the experts are trained that carry the task's tokens.

Wang et al. 2024, https://arxiv.org/abs/2407.01906. Shape suffixes: T tokens, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from moe_dist.checkpoint.manager import Checkpoints
from moe_dist.config import Config, ConfigError
from moe_dist.config.trained_weights import ChosenExperts
from moe_dist.data.loader import Chosen, eval_batches
from moe_dist.data.order import GlobalOrder
from moe_dist.data.packing import PackedDataset
from moe_dist.models.transformer import Transformer
from moe_dist.models.watching import watching
from moe_dist.parallel.engines.eval_mode import evaluating
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.passes import model_inputs

Shares = dict[int, list[float]]
"""Layer -> of each expert its part of all affinity, 0..1."""
_DIGITS = 6
"""Of a share: layouts sum in other orders, and must choose alike."""


def affinity(model: Transformer, train: PackedDataset, config: Config, mesh: Mesh) -> tuple[Shares, int]:
    """What the first `esft_samples` of the training order say, and how many tokens they have; the same on every rank,
    whatever the layout (collective). The model is this rank's part, not sharded yet.
    """
    settings, experts = config.train, config.model.num_experts
    order = GlobalOrder(len(train), settings.seed, config.data.shuffle)
    samples = Chosen(train, order.take(0, min(settings.esft_samples, len(train))).tolist())
    size = settings.per_device_eval_batch_size or settings.per_device_train_batch_size
    sums = torch.zeros(config.model.num_hidden_layers, experts + 1, dtype=torch.float64, device=mesh.device)
    count = torch.zeros((), dtype=torch.int64, device=mesh.device)
    with evaluating(model), watching(model) as seen:
        for batch in eval_batches(samples, size, mesh.layout.dp_size, mesh.dp_rank):
            inputs = model_inputs(batch.to(mesh.device), document_mask=config.data.document_mask)
            model(**inputs, head_function=lambda hidden, weight: hidden.new_zeros(()))
            valid_T = inputs["context"].valid_T
            for layer, (ids_TK, weights_TK) in seen.items():
                ids = ids_TK if valid_T is None else ids_TK.masked_fill(~valid_T[:, None], experts)
                counted = weights_TK.double() if settings.esft_score == "gate" else torch.ones_like(ids).double()
                sums[layer].index_add_(0, ids.flatten(), counted.flatten())
            count += batch.num_tokens
    mesh.sum_over("world", sums)
    mesh.sum_over("dp", count)
    shares = (sums[:, :-1] / sums[:, :-1].sum(-1, keepdim=True).clamp(min=1e-30)).tolist()
    return {layer: [round(share, _DIGITS) for share in shares[layer]] for layer in config.model.moe_layers}, int(count)


def choose(shares: Shares, threshold: float) -> ChosenExperts:
    """Of each layer the most wanted experts, until together they have this share; of two alike the lower id."""
    chosen = {}
    for layer, of_experts in shares.items():
        taken, so_far = [], 0.0
        for expert in sorted(range(len(of_experts)), key=lambda expert: (-of_experts[expert], expert)):
            if so_far >= threshold - 10**-_DIGITS:
                break
            taken.append(expert)
            so_far += of_experts[expert]
        chosen[layer] = frozenset(taken)
    return chosen


def table(shares: Shares, chosen: ChosenExperts, config: Config, num_tokens: int) -> Iterator[str]:
    """What was chosen, line by line."""
    train, count = config.train, sum(map(len, chosen.values()))
    what = "tokens" if train.esft_score == "token" else "gate weights"
    yield (
        f"experts:esft trains {count} of {len(chosen) * config.model.num_experts} experts: of each layer those with "
        f"most of the {what}, until {train.esft_threshold:.0%}, measured on {num_tokens:,} tokens of the training data"
    )
    for layer, of_experts in shares.items():
        taken = sorted(chosen[layer], key=lambda expert: (-of_experts[expert], expert))
        rest = max((share for expert, share in enumerate(of_experts) if expert not in chosen[layer]), default=0.0)
        each = " ".join(f"E{expert:02d} {of_experts[expert]:.1%}" for expert in taken)
        yield f"  L{layer}: {each} = {sum(of_experts[e] for e in taken):.1%}; the next has {rest:.1%}"


def experts_of_task(
    config: Config,
    mesh: Mesh,
    model: Transformer,
    train: Any,
    checkpoints: Checkpoints,
    resume: str,
    has_weights: bool,
    message: Callable[[str], None],
) -> ChosenExperts:
    """What `experts:esft` stands for: as the checkpoint has it that the run goes on from, or else measured and said.

    Raises ConfigError where there is neither a choice nor a trained model to measure.
    """
    found = None if resume == "never" else checkpoints.find(resume, lambda text: None)
    saved = None if found is None else checkpoints.read_state(found).trainer_state.get("esft")
    if saved is not None:
        chosen = from_json(saved)
        message(f"experts:esft trains the {sum(map(len, chosen.values()))} experts that were chosen for {found}")
        return chosen
    if not has_weights:
        where = "there is no trained model" if found is None else f"{found} has no choice of experts"
        raise ConfigError(
            f"train.train_only=experts:esft: {where}, and experts are chosen by what a trained model does: set "
            "model.from_pretrained (moe-dist export makes a folder of a run)"
        )
    if not isinstance(train, PackedDataset):
        raise ConfigError(
            "train.train_only=experts:esft: data.streaming=true has no samples to measure on; set it to false, or name "
            "experts"
        )
    shares, num_tokens = affinity(model, train, config, mesh)
    chosen = choose(shares, config.train.esft_threshold)
    for line in table(shares, chosen, config, num_tokens):
        message(line)
    return chosen


def to_json(chosen: ChosenExperts | None) -> dict[str, list[int]] | None:
    """For a checkpoint."""
    return None if chosen is None else {str(layer): sorted(ids) for layer, ids in chosen.items()}


def from_json(saved: Mapping[str, list[int]]) -> ChosenExperts:
    """As `to_json` wrote it."""
    return {int(layer): frozenset(ids) for layer, ids in saved.items()}
