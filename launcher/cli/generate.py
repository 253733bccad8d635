"""`moe-dist generate`: text from a model. Torch is imported when there is something to answer."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli.checkpoint import Key
from launcher.cli.inference import (
    AdapterPath,
    CachePolicy,
    Dtype,
    ExpertCacheGb,
    ExpertFolder,
    Int8,
    Model,
    Nproc,
    Prefetch,
    Step,
    expert_cache,
    run_inference,
)
from launcher.cli.paths import expanded
from moe_dist.config import ConfigError


def generate(
    context: typer.Context,
    model: Model,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to go on from; may be given again.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            callback=expanded,
            help="A prompt on every line, or JSON lines with a key prompt; - for standard input. Answers in JSON.",
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", callback=expanded, help="Where JSON lines go.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="A conversation, by the tokenizer's template.")] = False,
    system: Annotated[str | None, typer.Option(help="How a chat is to be answered.")] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token always.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that have so much probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Leave out what is less likely than this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: less of what has been there.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same draws every time.")] = None,
    num_beams: Annotated[int, typer.Option(help="Beam search with so many.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Of beam search: above 0 likes long answers.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be given again.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on behind the end of a document.")] = False,
    json_schema: Annotated[
        str | None,
        typer.Option(metavar="FILE", callback=expanded, help="Answers are JSON by this schema (extra json-schema)."),
    ] = None,
    show_experts: Annotated[
        bool, typer.Option("--show-experts", help="Colour every token by its busiest expert, layer by layer.")
    ] = False,
    adapter_path: AdapterPath = None,
    nproc: Nproc = 1,
    step: Step = None,
    dtype: Dtype = "fp32",
    int8: Int8 = False,
    expert_cache_gb: ExpertCacheGb = None,
    cache_policy: CachePolicy = "lru",
    expert_folder: ExpertFolder = None,
    prefetch: Prefetch = False,
    encryption_key: Key = None,
) -> None:
    """Let a model go on from a prompt, answer a file of prompts, or talk.

    Greedy by default; several prompts share batches. With [bold]--nproc[/bold] and [bold]key=value[/bold] after MODEL
    the model is spread over ranks: ep_size=2 shares out the experts of every layer, pp_size=2 its layers.

    [dim]Example:[/dim]  moe-dist generate outputs/demo --prompt "def " --temperature 0.8 --seed 1
    """
    asked = [name for name, given in (("--prompt", prompt), ("--prompts", prompts), ("--chat", chat)) if given]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)}: one of them")
    if chat and nproc > 1:
        raise ConfigError(f"--chat --nproc {nproc}: a conversation is held by one process; leave --nproc out")
    if show_experts and (chat or prompts):
        raise ConfigError("--show-experts: only with --prompt")
    if (output and not prompts) or (system and not chat):
        raise ConfigError("--output: only with --prompts" if output else "--system: only with --chat")
    texts = [] if chat else _read_prompts(prompts) if prompts else list(prompt or [_standard_input()])
    sampling: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": list(stop or ()),
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "ignore_eos": ignore_eos,
        "json_schema": json_schema and _read_schema(json_schema),
    }
    from moe_dist.generate.options import SamplingOptions

    try:  # says what is wrong before anything is opened
        SamplingOptions(**sampling | {"stop": tuple(stop or ())})
    except ValueError as error:
        raise ConfigError(str(error)) from error
    engine = expert_cache(expert_cache_gb, cache_policy, expert_folder, prefetch)
    options = {"sampling": sampling, "prompts": texts, "as_json": prompts is not None, "output": output}
    options |= {"chat": chat, "system": system, "engine": engine, "show_experts": show_experts}
    how = (nproc, step, dtype, encryption_key, adapter_path, int8)
    raise typer.Exit(run_inference("generate", model, context.args, options, *how))


def _read_schema(path: str) -> str:
    """Its text. Whether it can be followed is known where the tokenizer is."""
    if importlib.util.find_spec("llguidance") is None:
        raise ConfigError("--json-schema needs llguidance: pip install 'moe-dist[json-schema]'")
    try:
        return json.dumps(json.loads(Path(path).read_text("utf-8")), allow_nan=False)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--json-schema {path}: {error}") from error


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise ConfigError("--prompt TEXT, --prompts FILE or --chat: what is there to go on from?")
    return sys.stdin.read().removesuffix("\n")


def _read_prompts(path: str) -> list[str]:
    """Raises ConfigError naming the line."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path}: {error}") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if not path.endswith((".jsonl", ".json")):
            found.append(line)
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            raise ConfigError(f'--prompts {path}: line {number} is no object with a text "prompt"')
        found.append(prompt)
    if not found:
        raise ConfigError(f"--prompts {path}: there is no prompt")
    return found
