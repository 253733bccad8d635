"""`moe-dist export`: a checkpoint as a Hugging Face folder. Torch is imported when there is something to export."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launcher.cli.checkpoint import Key, good_checkpoint, plainly, storage_of
from launcher.cli.paths import expanded
from launcher.cli.push import check_before_push, exported_folder, push_folder
from launcher.connect.exit_codes import EXIT_FAILED
from moe_dist.config import ConfigError

if TYPE_CHECKING:
    from moe_dist.pretrained.verification import Checked

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Dtype = Annotated[
    Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="Type of the weights; default: as they are.")
]
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Largest file, such as 500MB.")]


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CHECKPOINT",
            callback=expanded,
            help="Run folder or URL (its newest step), or one checkpoint. With --push and without --output: a folder "
            "that was exported before.",
        ),
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", callback=expanded, help="Folder to make.")
    ] = None,
    to: Annotated[
        Literal["hf", "safetensors", "onnx"],
        typer.Option(
            "--to", help="hf: as transformers, vLLM and SGLang load it; safetensors: our own names; onnx: one model."
        ),
    ] = "hf",
    dtype: Dtype = None,
    max_shard_size: MaxShardSize = "5GB",
    step: Annotated[int | None, typer.Option(min=0, help="Which step of a run; default: the newest.")] = None,
    logits: Annotated[
        bool,
        typer.Option(
            "--logits/--no-logits",
            help="Load it in transformers and compare weights and logits; takes memory for the model twice.",
        ),
    ] = True,
    drop_experts: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Keep the N busiest experts of each layer, by the run's record of load."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a run with adapters: the model with them added, not the adapters alone.")
    ] = False,
    encryption_key: Key = None,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload it to the Hugging Face Hub when it is proven.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A model that --push makes is private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch to push to; default: main.")] = None,
) -> None:
    """Write a checkpoint as a folder that others load, and prove it.

    Every tensor is read again and compared with the checkpoint. A Hugging Face folder is then loaded by transformers:
    the same weights bit by bit, the same logits. Exit code 1, and no folder, when anything differs; 2 when no Hugging
    Face family has what the run has: --to safetensors writes any run, for moe-dist checkpoint import.

    A run with adapters (lora.r) becomes a folder for peft, or with --merge a model as any other.

    [dim]Example:[/dim]  moe-dist export outputs/demo --to hf --output demo-hf --dtype bf16
    """
    max_shard_bytes = num_bytes(max_shard_size)
    if push is None and (private or revision):
        raise ConfigError(f"--{'private' if private else 'revision'}: only with --push ORG/NAME")
    if push is not None:
        check_before_push(push)
    if output is None:
        if push is None:
            raise ConfigError("--output DIR: the folder to make is missing")
        push_folder(exported_folder(source), push, private, revision)
        return
    with plainly():
        found, manifest, keys = good_checkpoint(_one(source, step), encryption_key)
        from moe_dist.pretrained.export import Fewer
        from moe_dist.pretrained.export import export as write

        fewer = None
        if drop_experts is not None:
            from moe_dist.train.held_out import loss_change

            fewer = Fewer(drop_experts, run_of(source), loss_change)

        done = write(
            found,
            manifest,
            keys,
            Path(output),
            to=to,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            logits=logits,
            fewer=fewer,
            merge=merge,
            on_check=print_check,
        )
    for note in done.notes:
        print(f"{'note':<21}{note}")
    if not done.is_proven:
        print(f"{'not exported':<21}{output}: what was written is not what the checkpoint holds, and was removed")
        raise typer.Exit(EXIT_FAILED)
    size = f"{done.num_bytes / 1e6:,.1f} MB"
    files = f"{done.num_files} file{'s' if done.num_files > 1 else ''}"
    print(f"{'exported':<21}{found} to {output}: {done.model_type}, {size} of {done.dtype} in {files}")
    if push is not None:
        push_folder(Path(output), push, private, revision)


def print_check(check: Checked) -> None:
    """What a check has found, a line for each problem."""
    for problem in check.problems[:20]:
        print(f"{check.what:<21}{problem}", flush=True)
    if len(check.problems) > 20:
        print(f"{check.what:<21}and {len(check.problems) - 20} more")
    if not check.problems:
        print(f"{check.what:<21}{check.said}", flush=True)


def run_of(source: str) -> Path:
    """The run folder of a checkpoint in it, or itself."""
    path = Path(source)
    return path.parent if re.fullmatch(r"checkpoint-\d+", path.name) else path


def _one(path: str, step: int | None) -> str:
    """The path of one checkpoint: the newest of a run, or the step a person asks for."""
    storage, steps = storage_of(path)
    if steps:
        if step is not None and steps != [step]:
            raise ConfigError(f"--step {step}: {path} is step {steps[0]}; give the run's folder, or leave --step out")
        return path
    there = storage.steps()
    if not there or (step is not None and step not in there):
        known = ", ".join(map(str, there)) or "none"
        wanted = f"--step {step}: " if step is not None else ""
        raise ConfigError(f"{wanted}{storage.where}: there is no such checkpoint; steps there: {known}")
    return f"{storage.where}/checkpoint-{there[-1] if step is None else step}"


def num_bytes(text: str) -> int:
    """What `--max-shard-size` says. Raises ConfigError for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or not (size := int(float(match[1]) * _UNITS[match[2].upper()])):
        raise ConfigError(f"--max-shard-size {text}: a number of bytes, such as 5GB or 500MB")
    return size
