"""What leaving experts out costs: the loss on held-out data of the run, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_dist.config import Config
from moe_dist.data.identity import identity
from moe_dist.data.loader import eval_batches
from moe_dist.data.packing import PackedDataset
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.pretrained.fewer_experts import FewerExperts
from moe_dist.pretrained.saved_weights import SavedWeights
from moe_dist.pretrained.verification import Checked, prompts_for, relative_difference
from moe_dist.train.build import build_validation
from moe_dist.train.evaluation import evaluate

NUM_SEQUENCES = 32
"""Of the run's evaluation data at most."""


def loss_change(config: Config, state: Mapping[str, Any], fewer: FewerExperts) -> Checked:
    """The loss with all experts and with fewer, in float32; without the data that the run evaluated, how far logits of
    a few prompts move.

    `state`: what the trainer saved. Needs memory for one model in float32 at a time.
    """
    whole = fewer.whole
    try:
        samples = build_validation(config)
        reason = "the run evaluates nothing"
    except (ValueError, OSError, ImportError) as error:
        samples, reason = None, str(error)
    saved = state.get("corpus", {}).get("validation")
    if samples is not None and saved is not None:
        now = identity(samples, (), config.num_evaluated)
        if now["tokens"] != saved["tokens"]:
            samples, reason = None, "the held-out data is not what the run evaluated"
    which = f"with {fewer.config.num_experts} of {whole.config.num_experts} experts"
    had = f"{which}, which had {fewer.kept.share:.1%} of the load"
    if samples is None:
        expected, found = _logits(whole), _logits(fewer)
        moved = " ".join(f"{relative_difference(*pair):.1e}" for pair in zip(found, expected, strict=True))
        return Checked("loss", f"not measured ({reason}); logits of random prompts move by {moved} {had}", [])
    before, after = (_loss(config, weights, samples) for weights in (whole, fewer))
    num_sequences = min(len(samples), NUM_SEQUENCES)
    said = f"{before:.4f} with all, {after:.4f} ({after - before:+.4f}) {had}; {num_sequences} held-out sequences"
    return Checked("loss", said, [])


def _model(weights: SavedWeights) -> Transformer:
    with torch.device("meta"):
        model = Transformer(weights.config)
    model.to_empty(device="cpu").load_state_dict(weights.read_ours())
    return model.eval()


def _loss(config: Config, weights: SavedWeights, samples: PackedDataset) -> float:
    batches = eval_batches(samples, 1, 1, 0, NUM_SEQUENCES)
    found = evaluate(
        _model(weights),
        batches,
        Mesh.single(),
        document_mask=config.data.document_mask,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
    )
    assert found is not None  # nobody has asked to stop
    return found.loss


@torch.no_grad()
def _logits(weights: SavedWeights) -> list[torch.Tensor]:
    model = _model(weights)
    return [model(prompt[None]) for prompt in prompts_for(weights.config)]
