"""README.md of a folder that was made here, from what is known of how."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_dist import __version__
from moe_dist.checkpoint.reading import CheckpointRef
from moe_dist.checkpoint.storage.manifest import Manifest
from moe_dist.config import Config, ConfigError, ModelConfig
from moe_dist.config.huggingface import MODEL_TYPE
from moe_dist.models.counts import parameter_counts
from moe_dist.pretrained.fewer_experts import recorded_load
from moe_dist.versions import installed

if TYPE_CHECKING:
    from moe_dist.pretrained.upcycled_weights import UpcycledWeights


_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
```
"""
_OWN = """Tensors have the names and the layout of moe-dist, and `config.json` is the `model` section of a run file.

```
moe-dist checkpoint import FOLDER --output RUN
```
"""


def model_card(
    found: CheckpointRef,
    manifest: Manifest,
    config: Config,
    model: ModelConfig,
    state: dict[str, Any],
    model_type: str,
    dtype: str,
) -> str:
    """Markdown with the hub's front matter. Neither prompts nor paths of the run's machine are in it.

    `model`: what is written of `config.model`; it may have fewer experts.
    """
    counts, done = parameter_counts(model), state["counters"]
    dropped = config.model.num_experts - model.num_experts
    layout = manifest.layout
    rows = {
        "architecture": f"{model_type}, {counts.total:,} parameters, {counts.active:,} active per token",
        "experts": f"{model.num_experts}, {model.num_experts_per_tok} per token, in {len(model.moe_layers)} of "
        f"{model.num_hidden_layers} layers",
        "left out": f"{dropped} experts of each layer, those with the fewest tokens" if dropped else None,
        "weights": dtype,
        "step": f"{manifest.step:,}",
        "tokens seen": f"{done.get('tokens', 0):,}",
        "data": f"{config.data.source}{f' ({config.data.name})' if config.data.name else ''}, sequences of "
        f"{config.data.max_seq_length}",
        **{name.replace("_", " "): f"{value:.4f}" for name, value in sorted(manifest.metrics.items())},
        "first loss": None if done.get("initial_loss") is None else f"{done['initial_loss']:.4f}",
        "expert load": _expert_load(found, config.model),
        "optimizer": f"{config.optimizer.optim}, learning rate {config.optimizer.learning_rate:g}, "
        f"{config.optimizer.lr_scheduler_type}",
        "layout": f"{layout['world']} ranks: pp {layout['pp']} x edp {layout['edp']} x ep {layout['ep']}, "
        f"ZeRO {layout.get('zero_stage', 0)}",
        "run": f"{manifest.run}, saved {manifest.created}",
        "exported with": f"moe-dist {__version__}, PyTorch {installed('torch')}, Python {platform.python_version()}",
    }
    about = (
        f"# {found.folder.replace('checkpoint-', 'Step ')} of a moe-dist run\n\n"
        "A mixture-of-experts language model. What it may be used for, and under which licence, is for whoever "
        "publishes it to say."
    )
    return _card(about, rows, is_own=model_type == MODEL_TYPE)


def _expert_load(found: CheckpointRef, model: ModelConfig) -> str | None:
    """As the run has logged it last; None where its log is not beside the checkpoint."""
    path = found.storage.local_path(found.folder)
    if path is None or not model.moe_layers:
        return None
    try:
        loads, (first, last) = recorded_load(path.parent, found.step, model)
    except ConfigError:
        return None
    busiest = [max(load) * len(load) / max(1, sum(load)) for load in loads.values()]
    idle = sum(not pairs for load in loads.values() for pairs in load)
    return (
        f"the busiest expert of a layer has {min(busiest):.1f} to {max(busiest):.1f} times the mean, {idle} of "
        f"{sum(map(len, loads.values()))} have no token, in steps {first:,} to {last:,}"
    )


def upcycled_card(weights: UpcycledWeights, model_type: str, dtype: str) -> str:
    """The same of a dense model with its MLPs as experts."""
    model, dense, recipe = weights.config, weights.dense, weights.recipe
    before, after = parameter_counts(dense.config), parameter_counts(model)
    shared = recipe.num_shared(dense.config)
    rows = {
        "made of": f"{dense.folder.resolve().name}: {dense.found.family.model_type}, {before.total:,} parameters",
        "architecture": f"{model_type}, {after.total:,} parameters, {after.active:,} active per token",
        "experts": f"{model.num_experts}, {model.num_experts_per_tok} per token, in every layer",
        "an expert": "a copy of the layer's MLP"
        if recipe.granularity == 1
        else f"one of {recipe.granularity} slices of the layer's MLP; {model.num_experts // recipe.granularity} "
        "experts have the same",
        "shared expert": f"{shared} of {recipe.granularity} slices of the MLP" if shared else None,
        "drawn anew": f"{recipe.noise:.0%} of each expert's units" if recipe.noise else None,
        "router": f"drawn with deviation {model.initializer_range:g}, seed {recipe.seed}; weights of a token's experts "
        + ("sum to 1" if recipe.norm_topk_prob else "are those of the softmax over all"),
        "first pass": weights.inequality or "equals the dense model's",
        "weights": dtype,
        "made with": f"moe-dist {__version__}, PyTorch {installed('torch')}, Python {platform.python_version()}",
    }
    about = (
        f"# {dense.folder.resolve().name} with experts\n\n"
        "A dense language model whose MLPs have become experts; nothing has been trained since. Licence and limits are "
        "those of the dense model."
    )
    return _card(about, rows)


def _card(about: str, rows: Mapping[str, str | None], *, is_own: bool = False) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    return (
        f"---\nlibrary_name: {'moe-dist' if is_own else 'transformers'}\npipeline_tag: text-generation\n"
        "tags:\n- mixture-of-experts\n- moe-dist\n---\n\n"
        f"{about}\n\n| | |\n|---|---|\n{table}\n\n"
        f"{_OWN if is_own else _TRANSFORMERS}"
    )
