"""An exported folder against the checkpoint it was made of: bytes, configuration, what `transformers` loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from moe_dist.checkpoint.reading import CheckpointRef
from moe_dist.config import ModelConfig
from moe_dist.config.huggingface import architecture_differences, model_of, read_huggingface
from moe_dist.models.huggingface import from_huggingface
from moe_dist.models.tensor_names import Names
from moe_dist.models.transformer import Transformer
from moe_dist.pretrained.saved_weights import SavedWeights
from moe_dist.pretrained.source import INDEX

MAX_LOGITS_ERROR = 1e-4
"""L2 of the difference over L2, in float32. Two implementations of a deep model differ by rounding in another order; a
wrong weight is found by comparing weights, bit by bit."""
_EXPERTS: dict[str, Any] = {"experts_implementation": "eager"}  # the grouped kernel of transformers refuses odd sizes
NUM_PROMPTS, PROMPT_LENGTH = 4, 64


class Checked(NamedTuple):
    """What one check has found: `said` when all is right, `problems` otherwise."""

    what: str
    said: str
    problems: list[str]


class Weights(Protocol):
    """Weights of a checkpoint as an export has them: `shapes` by name."""

    found: CheckpointRef
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype

    def dtype_of(self, name: str) -> torch.dtype:
        """Of one tensor as it is written."""

    def blocks(self, name: str) -> Iterator[Tensor]:
        """One tensor: its rows, a part at a time."""

    def close(self) -> None:
        """Let go of the open files."""


def public_names(config: ModelConfig) -> list[str]:
    """What a Hugging Face folder must have, by a table of its own: what was left out while writing is missed."""
    names = Names(config)
    return [name for name in names.parts() if name not in names.optional]


def check_tensors(folder: Path, weights: Weights, wanted: Sequence[str]) -> Checked:
    """Every tensor read again and compared with the checkpoint's, one part at a time. `wanted`: those it must have."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    problems: list[str] = []
    where: dict[str, str] = {}
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key in where:
                    problems.append(f"{key}: in {where[key]} and in {name}")
                where[key] = name
                if key not in weights.shapes:
                    problems.append(f"{key}: not of the model ({name})")
                elif not _same_in_file(file, key, weights):
                    problems.append(f"{key}: not as in {weights.found} ({name})")
    problems += [f"{name}: missing" for name in wanted if name not in where]
    if len(files) > 1 and json.loads((folder / INDEX).read_text("utf-8"))["weight_map"] != where:
        problems.append(f"{INDEX}: does not say where the tensors are")
    count = len(wanted)
    return Checked("tensors", f"{count} of {count} read again, as in the checkpoint", problems)


def _same_in_file(file: Any, key: str, weights: Weights) -> bool:
    rows, first = file.get_slice(key), 0
    if tuple(rows.get_shape()) != weights.shapes[key]:
        return False
    for block in weights.blocks(key):
        if not _same(rows[first : first + len(block)] if block.ndim else file.get_tensor(key), block):
            return False
        first += len(block) if block.ndim else 1
    return True


def check_config(folder: Path, config: ModelConfig) -> Checked:
    """`config.json` read as a stranger's, and compared with the run's model."""
    file = folder / "config.json"
    found = model_of(read_huggingface(file, str(file)))
    problems = [f"config.json: {line}" for line in architecture_differences(found, config)]
    return Checked("config.json", "is the run's model", problems)


def check_with_transformers(folder: Path, weights: SavedWeights) -> list[Checked]:
    """What `transformers` loads from the folder: weights bit by bit, then logits of a few prompts.

    Needs memory for both models in float32.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = weights.config
    what = f"transformers {transformers.__version__}"
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            **_EXPERTS,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # whatever it raises for a folder that it cannot load
        return [Checked(what, "", [" ".join(f"cannot load it: {error}".split())])]
    theirs, info = loaded
    problems = [
        f"{kind}: {name}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in sorted(map(str, info.get(kind) or ()))
        if name not in weights.names.optional
    ]
    ours = weights.read_ours()
    try:
        state = from_huggingface(theirs.state_dict(), config)
    except ValueError as error:
        return [Checked(what, "", [*problems, str(error)])]
    problems += [f"{name}: not the checkpoint's" for name in sorted(ours) if not _same(ours[name], state[name])]
    del state
    said = f"loads it; all {len(ours)} weights are the checkpoint's, bit by bit"
    return [Checked(what, said, problems), _check_logits(theirs, ours, config)]


def _check_logits(theirs: Any, ours: dict[str, Tensor], config: ModelConfig) -> Checked:
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu").load_state_dict(ours)
    model.eval()
    theirs.eval()
    length = min(PROMPT_LENGTH, config.max_position_embeddings)
    prompts = torch.randint(config.vocab_size, (NUM_PROMPTS, length), generator=torch.Generator().manual_seed(0))
    problems, errors = [], []
    with torch.no_grad():
        for number, prompt in enumerate(prompts):
            expected, found = model(prompt[None]), theirs(prompt[None]).logits
            errors.append(float((found - expected).norm() / expected.norm().clamp(min=1e-30)))
            if not errors[-1] <= MAX_LOGITS_ERROR:
                problems.append(f"logits of prompt {number}: relative difference {errors[-1]:.1e}")
    numbers = " ".join(f"{error:.1e}" for error in errors)
    return Checked("logits", f"{NUM_PROMPTS} prompts of {length} tokens: relative difference {numbers}", problems)


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    flat: Callable[[Tensor], Tensor] = lambda values: values.contiguous().reshape(-1).view(torch.uint8)  # noqa: E731
    return torch.equal(flat(one), flat(other))
