"""The model of a command that uses one, opened on every rank. Torch is imported where there is work."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from launcher.connect.rank_job import Inference
from moe_dist.config import Config, ConfigError

if TYPE_CHECKING:
    from moe_dist.data.tokenizer import Tokenizer
    from moe_dist.models.transformer import Transformer
    from moe_dist.parallel.mesh import Mesh


def opened(config: Config, mesh: Mesh, wanted: Inference) -> tuple[Transformer, Tokenizer]:
    """This rank's part of the model, with int8 weights where that is wanted, and the tokenizer. A collective."""
    from moe_dist.checkpoint.reading import locate
    from moe_dist.checkpoint.storage import open_storage
    from moe_dist.pretrained.inference import Source, open_model

    found = None if wanted.checkpoint is None else locate(wanted.checkpoint, open_storage("."))
    model, tokenizer = open_model(Source(config, found), mesh, wanted.keys)
    if wanted.int8:
        from moe_dist.models.int8 import to_int8

        try:
            before, after = to_int8(model)
        except ValueError as error:
            raise ConfigError(f"--{error}") from error
        if mesh.rank == 0:
            whose = "of a rank " if mesh.layout.world_size > 1 else ""
            print(f"int8: weights {whose}are {after / 1e6:,.1f} MB, not {before / 1e6:,.1f}", file=sys.stderr)
    return model, tokenizer
