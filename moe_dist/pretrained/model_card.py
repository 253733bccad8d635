"""README.md of an exported model, from what its checkpoint knows."""

from __future__ import annotations

import platform
from typing import Any

from moe_dist import __version__
from moe_dist.checkpoint.reading import CheckpointRef
from moe_dist.checkpoint.storage.manifest import Manifest
from moe_dist.config import Config
from moe_dist.config.huggingface import MODEL_TYPE
from moe_dist.models.counts import parameter_counts
from moe_dist.versions import installed

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
    found: CheckpointRef, manifest: Manifest, config: Config, state: dict[str, Any], model_type: str, dtype: str
) -> str:
    """Markdown with the hub's front matter. Neither prompts nor paths of the run's machine are in it."""
    model, counts, done = config.model, parameter_counts(config.model), state["counters"]
    layout, is_own = manifest.layout, model_type == MODEL_TYPE
    rows = {
        "architecture": f"{model_type}, {counts.total:,} parameters, {counts.active:,} active per token",
        "experts": f"{model.num_experts}, {model.num_experts_per_tok} per token, in {len(model.moe_layers)} of "
        f"{model.num_hidden_layers} layers",
        "weights": dtype,
        "step": f"{manifest.step:,}",
        "tokens seen": f"{done.get('tokens', 0):,}",
        "data": f"{config.data.source}{f' ({config.data.name})' if config.data.name else ''}, sequences of "
        f"{config.data.max_seq_length}",
        **{name.replace("_", " "): f"{value:.4f}" for name, value in sorted(manifest.metrics.items())},
        "first loss": None if done.get("initial_loss") is None else f"{done['initial_loss']:.4f}",
        "optimizer": f"{config.optimizer.optim}, learning rate {config.optimizer.learning_rate:g}, "
        f"{config.optimizer.lr_scheduler_type}",
        "layout": f"{layout['world']} ranks: pp {layout['pp']} x edp {layout['edp']} x ep {layout['ep']}, "
        f"ZeRO {layout.get('zero_stage', 0)}",
        "run": f"{manifest.run}, saved {manifest.created}",
        "exported with": f"moe-dist {__version__}, PyTorch {installed('torch')}, Python {platform.python_version()}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    return (
        f"---\nlibrary_name: {'moe-dist' if is_own else 'transformers'}\npipeline_tag: text-generation\n"
        "tags:\n- mixture-of-experts\n- moe-dist\n---\n\n"
        f"# {found.folder.replace('checkpoint-', 'Step ')} of a moe-dist run\n\n"
        "A mixture-of-experts language model. What it may be used for, and under which licence, is for whoever "
        f"publishes it to say.\n\n| | |\n|---|---|\n{table}\n\n"
        f"{_OWN if is_own else _TRANSFORMERS}"
    )
