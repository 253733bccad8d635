"""A checkpoint as an ONNX model: token ids of any batch and length to logits, proven in ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.reading import CheckpointRef
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import Manifest
from moe_dist.config import Config, ConfigError
from moe_dist.models.transformer import Transformer
from moe_dist.pretrained.dense_experts import DenseTransformer
from moe_dist.pretrained.own_format import OwnWeights
from moe_dist.pretrained.verification import MAX_LOGITS_ERROR, Checked

FILE = "model.onnx"
SIZES = ((2, 64), (1, 7), (3, 1))
"""(batch, length) of the prompts that are compared; lengths as far as the model takes them."""


def refuse_onnx(config: Config) -> None:
    """Raises ConfigError for what ONNX cannot be here, and where its packages are missing: before anything is read."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--to onnx: {error.name} is not installed; pip install 'moe-dist[onnx]'") from None
    if config.model.router != "topk":
        raise ConfigError(f"--to onnx: model.router={config.model.router} cannot be written as ONNX; only topk")


def build(found: CheckpointRef, manifest: Manifest, keys: Keys, config: Config) -> Transformer:
    """The whole model with the weights of the checkpoint, in float32, as it computes at that step."""
    weights = OwnWeights(found, manifest, keys, config.model, torch.float32)
    with torch.device("meta"):
        model = Transformer(config.model, config.balance)
    model.to_empty(device="cpu")
    if config.model.tie_word_embeddings:
        model.tie()
    state = model.state_dict()
    for name in weights.shapes:
        state[name].copy_(torch.cat([block.reshape(-1) for block in weights.blocks(name)]).view(state[name].shape))
    weights.close()
    for moe in model.moe_layers():
        moe.router.set_temperature(config.balance.temperature_at(found.step))
    return model.eval()


@torch.no_grad()
def write_onnx(model: Transformer, folder: Path) -> tuple[int, list[Checked]]:
    """Write `model.onnx` (and a file beside it past 2 GB), run it, and compare; the model is changed by this.

    Returns how many bytes, and what was found.
    """
    config = model.config
    prompts = _prompts(config.vocab_size, config.max_position_embeddings)
    expected = [model(prompt) for prompt in prompts]
    dense = DenseTransformer(model)
    batch = torch.export.Dim("batch")
    length = torch.export.Dim("sequence", max=config.max_position_embeddings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own inside
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                dense,
                (prompts[0],),
                folder / FILE,
                dynamo=True,
                verbose=False,
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": {0: batch, 1: length}},
                external_data=_num_bytes(model) > 2**31 - 2**24,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = " ".join(str(error.__cause__ or error).split())[:300]
            raise ConfigError(f"--to onnx: PyTorch cannot write this model: {cause}") from error
    size = sum(path.stat().st_size for path in folder.glob(f"{FILE}*"))
    checks = [
        _compare("experts", [dense(prompt) for prompt in prompts], expected, "each over all tokens"),
        _compare(*_run(folder / FILE, prompts), expected, f"{len(prompts)} batches of other sizes"),
    ]
    return size, checks


def _run(file: Path, prompts: list[Tensor]) -> tuple[str, list[Tensor]]:
    """The name of what has run it, and its logits."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    logits = [torch.from_numpy(session.run(None, {"input_ids": prompt.numpy()})[0]) for prompt in prompts]
    return f"onnxruntime {onnxruntime.__version__}", logits


def _compare(what: str, found: list[Tensor], expected: list[Tensor], said: str) -> Checked:
    errors = [
        float((one - other).norm() / other.norm().clamp(min=1e-30)) if one.shape == other.shape else float("inf")
        for one, other in zip(found, expected, strict=True)
    ]
    problems = [
        f"logits of {tuple(other.shape[:2])} tokens: relative difference {error:.1e}"
        for error, other in zip(errors, expected, strict=True)
        if not error <= MAX_LOGITS_ERROR
    ]
    return Checked(what, f"{said}: relative difference {' '.join(f'{error:.1e}' for error in errors)}", problems)


def _prompts(vocabulary: int, longest: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (batch, min(length, longest)), generator=generator) for batch, length in SIZES]


def _num_bytes(model: Transformer) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
