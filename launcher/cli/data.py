"""`moe-dist data preview|prepare`: what a run will learn from, before it is started."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.backends.command import for_world
from launcher.cli.completion import RunCommand
from launcher.cli.paths import expanded
from moe_dist.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from moe_dist.train.data_preview import DataPreview, Stretch

app = typer.Typer(
    name="data",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Look at the data of a run, or make some of source code.",
)
_GREEN, _PLAIN = "\x1b[30;42m", "\x1b[0m"
_BAR = 40


@app.command(cls=RunCommand, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def preview(
    context: typer.Context,
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/finetune.yaml.")],
    samples: Annotated[int, typer.Option("--samples", "-s", min=0, help="Documents to print.")] = 3,
    world_size: Annotated[
        int | None, typer.Option("--world-size", "-n", min=1, help="Ranks; default: launch.nproc_per_node.")
    ] = None,
    characters: Annotated[int, typer.Option(min=1, help="Of each document at most.")] = 2000,
) -> None:
    """Print what CONFIG trains on, with the learned tokens marked, and its statistics. Nothing is started.

    Learned tokens are green on a terminal, elsewhere in {+...+}. Exit code 2 when nothing can be trained.

    [dim]Example:[/dim]  moe-dist data preview run.yaml data.path=chats.jsonl --samples 5
    """
    settings = load_config(config, context.args)
    ranks = world_size or settings.launch.nproc_per_node
    settings = for_world(settings, ranks, elsewhere=True)
    from moe_dist.train.data_preview import preview as look

    try:
        found = look(settings, ranks)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    for number in range(min(samples, found.train.num_documents)):
        for heading, document in _shown(found, number):
            print(f"--- {heading}: {int(found.lengths[document]):,} tokens")
            print(_marked(found.document(document), characters, _on_a_terminal()))
    print("\n".join(_statistics(found, settings, ranks)))


@app.command()
def prepare(
    code: Annotated[str, typer.Argument(metavar="CODE_DIR", callback=expanded, help="Folder with source files.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", callback=expanded, help="JSONL file to write.")
    ] = "all_data.jsonl",
    any_licence: Annotated[
        bool, typer.Option("--any-licence", help="Also files under copyleft or proprietary licences.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
) -> None:
    """Make samples of the source files below CODE_DIR: each file, and each of its functions and types.

    Left out, with counts and reasons: near duplicates, files with secrets, generated ones, and those whose first lines
    name a copyleft or proprietary licence. Columns: text, path, language, kind, line.

    [dim]Example:[/dim]  moe-dist data prepare ~/src/project -o all_data.jsonl
    """
    from moe_dist.data.code_folder import Prepared, samples_of_folder

    target = Path(output)
    if target.exists() and not overwrite:
        raise ConfigError(f"--output {output}: it is there already; give another name, or --overwrite")
    if not Path(code).is_dir():
        raise ConfigError(f"{code}: there is no such folder")
    counts, unfinished = Prepared(), target.with_name(f"{target.name}.part")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            for sample in samples_of_folder(Path(code), counts, any_licence):
                file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
        if not counts.files:
            raise ValueError(f"{code}: nothing is left of {len(counts.left_out)} files ({'; '.join(counts.reasons())})")
        unfinished.replace(target)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"files       {counts.files:,} of {counts.files + len(counts.left_out):,}")
    print(f"parts       {counts.parts:,} functions and types of them")
    print(f"samples     {counts.files + counts.parts:,} in {output}")
    for reason, paths in counts.reasons().items():
        print(f"left out    {len(paths):>7,}  {reason}: {', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}")


def _shown(found: DataPreview, number: int) -> list[tuple[str, int]]:
    """(heading, document) of what belongs together: of a pair both answers."""
    if not found.are_pairs:
        return [(f"document {number + 1}", number)]
    return [(f"pair {number + 1}, {side}", 2 * number + index) for index, side in enumerate(("chosen", "rejected"))]


def _on_a_terminal() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _marked(stretches: Any, characters: int, colour: bool) -> str:
    begin, end = (_GREEN, _PLAIN) if colour else ("{+", "+}")
    parts, left = [], characters
    stretch: Stretch
    for stretch in stretches:
        text = stretch.text[:left]
        left -= len(text)
        # Texts may hold commands to the terminal.
        text = "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
        parts.append(f"{begin}{text}{end}" if stretch.learned else text)
        if not left:
            parts.append(" ...")
            break
    return "".join(parts)


def _statistics(found: DataPreview, settings: Config, ranks: int) -> list[str]:
    from moe_dist.data.losses import cut_off, losses
    from moe_dist.train.data_preview import OF_A_STREAM

    train, lengths = found.train, found.lengths
    total, rows = int(lengths.sum()), "2 x " if found.are_pairs else ""
    held_out = f", {found.validation_documents:,} more are held out" if found.validation_documents else ""
    lines = [
        f"{'pairs' if found.are_pairs else 'documents':<12}{train.num_documents:,}{held_out}",
        f"tokens      {total:,}, of which {found.labels:,} are learned ({100 * found.labels / total:.1f} %)",
        f"lengths     {int(lengths.min()):,} to {int(lengths.max()):,}, median {found.median:,}",
    ]
    histogram = found.histogram()
    most = max(count for _, _, count in histogram)
    width = max(len(f"{shortest:,}-{longest:,}") for shortest, longest, _ in histogram)
    for shortest, longest, count in histogram:
        bar = "#" * -(-_BAR * count // most)
        lines.append(f"  {f'{shortest:,}-{longest:,}':>{width}}  {count:>9,}  {bar}".rstrip())
    lines.append(
        f"samples     {len(train):,} of {rows}{train.max_seq_length:,} tokens, {100 * found.fill:.1f} % filled "
        f"(data.packing={'true' if settings.data.packing else 'false'})"
    )
    if train.truncated:
        lines.append(f"cut off     {cut_off(train.truncated)}")
    if found.skipped:
        lines.append(f"left out    {losses(found.skipped, train.num_documents + found.validation_documents)}")
    steps = "until train.max_time" if found.steps is None else f"{found.steps:,} in all"
    if found.steps_per_epoch is None:
        epoch = f"a stream, of which {OF_A_STREAM:,} documents were read"
    else:
        whole = found.steps_per_epoch == int(found.steps_per_epoch)
        epoch = f"{found.steps_per_epoch:,.{0 if whole else 1}f} per epoch"
    replicas = ranks // settings.parallel.pp_size
    lines.append(
        f"steps       {epoch}, {steps}; {settings.train.per_device_train_batch_size} x "
        f"{settings.train.gradient_accumulation_steps} x {replicas} = {found.batch:,} samples in each"
    )
    return lines
