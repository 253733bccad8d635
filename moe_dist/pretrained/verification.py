"""An exported folder against the checkpoint it was made of: bytes, configuration, what `transformers` loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from moe_dist.config import ModelConfig
from moe_dist.config.huggingface import architecture_differences, model_of, read_huggingface
from moe_dist.models.huggingface import from_huggingface
from moe_dist.models.tensor_names import Names
from moe_dist.models.transformer import Transformer
from moe_dist.pretrained.safetensors_files import Weights
from moe_dist.pretrained.saved_weights import SavedWeights
from moe_dist.pretrained.source import INDEX
from moe_dist.versions import installed

MAX_LOGITS_ERROR = 1e-4
"""L2 of the difference over L2, in float32. Two implementations of a deep model differ by rounding in another order; a
wrong weight is found by comparing weights, bit by bit."""
_EXPERTS: dict[str, Any] = {"experts_implementation": "eager"}  # the grouped kernel of transformers refuses odd sizes
NUM_PROMPTS, PROMPT_LENGTH = 4, 64


class ComparedWeights(Weights, Protocol):
    """What a folder should hold."""

    source: str
    """How the weights should be, in words."""


class Checked(NamedTuple):
    """What one check has found: `said` when all is right, `problems` otherwise."""

    what: str
    said: str
    problems: list[str]


def public_names(config: ModelConfig) -> list[str]:
    """What a Hugging Face folder must have, by a table of its own: what was left out while writing is missed."""
    names = Names(config)
    return [name for name in names.parts() if name not in names.optional]


def check_tensors(folder: Path, weights: ComparedWeights, wanted: Sequence[str]) -> Checked:
    """Every tensor read again and compared with what it should be, one part at a time. `wanted`: those it must have."""
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
                    problems.append(f"{key}: not {weights.source} ({name})")
    problems += [f"{name}: missing" for name in wanted if name not in where]
    if len(files) > 1 and json.loads((folder / INDEX).read_text("utf-8"))["weight_map"] != where:
        problems.append(f"{INDEX}: does not say where the tensors are")
    count = len(wanted)
    return Checked("tensors", f"{count} of {count} read again, {weights.source}", problems)


def _same_in_file(file: Any, key: str, weights: Weights) -> bool:
    rows, first = file.get_slice(key), 0
    if tuple(rows.get_shape()) != weights.shapes[key]:
        return False
    for block in weights.blocks(key):
        if not _same(rows[first : first + len(block)] if block.ndim else file.get_tensor(key), block):
            return False
        first += len(block) if block.ndim else 1
    return True


def check_config(folder: Path, config: ModelConfig, whose: str) -> Checked:
    """`config.json` read as a stranger's, and compared with a model, which is `whose`."""
    file = folder / "config.json"
    found = model_of(read_huggingface(file, str(file)))
    problems = [f"config.json: {line}" for line in architecture_differences(found, config)]
    return Checked("config.json", f"is {whose}", problems)


def check_with_transformers(folder: Path, weights: SavedWeights) -> list[Checked]:
    """What `transformers` loads from the folder: weights bit by bit, then logits of a few prompts.

    Needs memory for both models in float32.
    """
    config = weights.config
    what = with_transformers()
    try:
        theirs, problems = load_with_transformers(folder, weights.names.optional)
    except ValueError as error:
        return [Checked(what, "", [str(error)])]
    ours = weights.read_ours()
    try:
        state = from_huggingface(theirs.state_dict(), config)
    except ValueError as error:
        return [Checked(what, "", [*problems, str(error)])]
    problems += [f"{name}: not the checkpoint's" for name in sorted(ours) if not _same(ours[name], state[name])]
    del state
    said = f"loads it; all {len(ours)} weights are the checkpoint's, bit by bit"
    return [Checked(what, said, problems), _check_logits(theirs, ours, config)]


def with_transformers() -> str:
    """Which one it is."""
    return f"transformers {installed('transformers')}"


def load_with_transformers(folder: Path, optional: Collection[str] = ()) -> tuple[Any, list[str]]:
    """The model in float32, and tensors that it did not find or had no use for, but for `optional` ones.

    Raises ValueError where it cannot be loaded.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
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
        raise ValueError(" ".join(f"cannot load it: {error}".split())) from error
    model, info = loaded
    problems = [
        f"{kind}: {name}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in sorted(map(str, info.get(kind) or ()))
        if name not in optional
    ]
    return model.eval(), problems


def prompts_for(config: ModelConfig) -> Tensor:
    """(NUM_PROMPTS, S) random tokens, always the same."""
    length = min(PROMPT_LENGTH, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (NUM_PROMPTS, length), generator=torch.Generator().manual_seed(0))


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """L2 of the difference over L2."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _check_logits(theirs: Any, ours: dict[str, Tensor], config: ModelConfig) -> Checked:
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu").load_state_dict(ours)
    model.eval()
    prompts = prompts_for(config)
    problems, errors = [], []
    with torch.no_grad():
        for number, prompt in enumerate(prompts):
            expected, found = model(prompt[None]), theirs(prompt[None]).logits
            errors.append(relative_difference(found, expected))
            if not errors[-1] <= MAX_LOGITS_ERROR:
                problems.append(f"logits of prompt {number}: relative difference {errors[-1]:.1e}")
    numbers = " ".join(f"{error:.1e}" for error in errors)
    return Checked(
        "logits", f"{NUM_PROMPTS} prompts of {prompts.shape[1]} tokens: relative difference {numbers}", problems
    )


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    flat: Callable[[Tensor], Tensor] = lambda values: values.contiguous().reshape(-1).view(torch.uint8)  # noqa: E731
    return torch.equal(flat(one), flat(other))
