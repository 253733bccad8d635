"""`moe-dist upcycle`: a dense Hugging Face folder as one with experts. Torch is imported when there is work to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.export import Dtype, MaxShardSize, num_bytes, print_check
from launcher.cli.paths import expanded
from launcher.connect.exit_codes import EXIT_FAILED


def upcycle(
    dense: Annotated[
        str, typer.Argument(metavar="DENSE_DIR", callback=expanded, help="Folder of a Llama, Mistral, Qwen2 or Qwen3.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", callback=expanded, help="Folder to make.")],
    experts: Annotated[int, typer.Option(min=2, help="Experts of each layer.")] = 16,
    top_k: Annotated[
        int, typer.Option(min=1, help="Experts of each token; with --granularity, so many times that.")
    ] = 2,
    granularity: Annotated[
        int, typer.Option(min=1, help="Cut each MLP into so many slices; an expert is a copy of one.")
    ] = 1,
    shared: Annotated[
        int | None,
        typer.Option(min=0, help="Slices in an expert that every token passes through; default: as the family needs."),
    ] = None,
    noise: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Part of each expert's units to draw anew (Drop-Upcycling: 0.5).")
    ] = 0.0,
    norm_topk_prob: Annotated[
        bool,
        typer.Option(
            "--norm-topk-prob/--no-norm-topk-prob", help="Whether the weights of a token's experts sum up to 1."
        ),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of routers and noise.")] = 0,
    dtype: Dtype = None,
    max_shard_size: MaxShardSize = "5GB",
    logits: Annotated[
        bool,
        typer.Option("--logits/--no-logits", help="Load both in transformers, one after the other, and compare."),
    ] = True,
) -> None:
    """Make the MLPs of a dense model into experts.

    Each MLP, or each slice of it, is copied; routers are drawn at random; all else is as it was. Out comes the family
    that has what the dense one has: qwen3_moe, mixtral or qwen2_moe, for transformers and for model.from_pretrained.
    The first pass equals the dense model's, or the difference is printed with its reason. Exit code 1, and no folder,
    when what must be equal is not; 2 when no family is such a model.

    [dim]Example:[/dim]  moe-dist upcycle Qwen3-0.6B --experts 16 --top-k 2 --output Qwen3-16x
    """
    max_shard_bytes = num_bytes(max_shard_size)
    from moe_dist.pretrained.export import DTYPES
    from moe_dist.pretrained.upcycled_weights import Recipe
    from moe_dist.pretrained.upcycling import upcycle as write

    done = write(
        Path(dense),
        Recipe(experts, top_k, granularity, shared, noise, norm_topk_prob, seed),
        Path(output),
        dtype=DTYPES[dtype] if dtype else None,
        max_shard_bytes=max_shard_bytes,
        logits=logits,
        on_check=print_check,
    )
    if not done.is_proven:
        print(f"{'not upcycled':<21}{output}: what was written is not what it must be, and was removed")
        raise typer.Exit(EXIT_FAILED)
    model = done.config
    experts_of = f"{model.num_experts} experts top-{model.num_experts_per_tok}"
    size = f"{done.num_bytes / 1e6:,.1f} MB of {done.dtype} in {done.num_files} file{'s' if done.num_files > 1 else ''}"
    print(f"{'upcycled':<21}{dense} ({done.dense_type}) to {output}: {done.model_type}, {experts_of}, {size}")
