"""`moe-dist serve`: a model behind OpenAI's HTTP interface. Imports neither torch nor a web framework."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.backends.command import TRAIN
from launcher.cli.checkpoint import Key
from launcher.cli.inference import (
    AnyModel,
    CachePolicy,
    Dtype,
    ExpertCacheGb,
    ExpertFolder,
    Int8,
    Prefetch,
    Step,
    expert_cache,
    run_inference,
)
from launcher.cli.paths import expanded
from moe_dist.config import ConfigError

_NEEDS = ("fastapi", "fastapi_offline", "uvicorn", "argon2")


def serve(
    context: typer.Context,
    model: AnyModel = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's want --keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: MODEL's last part.")] = None,
    keys: Annotated[
        str | None,
        typer.Option(metavar="FILE", callback=expanded, help="NAME ROLE HASH a line; only these may ask."),
    ] = None,
    hash_key: Annotated[
        str | None,
        typer.Option(
            "--hash-key",
            metavar="NAME:ROLE",
            help="Draw a key, print its line for --keys, and the key itself on standard error; then end.",
        ),
    ] = None,
    tls_certificate: Annotated[
        str | None, typer.Option(metavar="FILE", callback=expanded, help="PEM, with --tls-key: https.")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", callback=expanded, help="PEM.")] = None,
    audit: Annotated[
        str | None,
        typer.Option("--audit-log", metavar="FILE", callback=expanded, help="A line of JSON for every request."),
    ] = None,
    audit_text: Annotated[bool, typer.Option("--audit-text", help="With what was asked and answered.")] = False,
    audit_mb: Annotated[int, typer.Option(min=1, help="Size at which a log becomes FILE.1, up to FILE.5.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")] = 4096,
    max_body_kb: Annotated[int, typer.Option(min=1, help="Largest request.")] = 1000,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Longest time for an answer.")] = 600.0,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that are computed together.")] = 32,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 429.")] = 256,
    cache_tokens: Annotated[int, typer.Option(min=16, help="Places for tokens of all answers together.")] = 131_072,
    drain_seconds: Annotated[int, typer.Option(min=0, help="For answers under way when SIGTERM comes.")] = 30,
    train_dir: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", callback=expanded, help="Let admins train by /train, with files in here alone."),
    ] = None,
    train_code: Annotated[
        bool, typer.Option("--train-code", help="Let trainings name package.module:Class of one's own, which runs.")
    ] = False,
    nproc: Annotated[
        int,
        typer.Option(
            "--nproc",
            "--workers",
            "-n",
            min=1,
            help="Ranks on this machine; key=value says the layout: without one, replicas.",
        ),
    ] = 1,
    step: Step = None,
    dtype: Dtype = "fp32",
    int8: Int8 = False,
    expert_cache_gb: ExpertCacheGb = None,
    cache_policy: CachePolicy = "lru",
    expert_folder: ExpertFolder = None,
    prefetch: Prefetch = False,
    encryption_key: Key = None,
) -> None:
    """Serve a model to OpenAI's clients: /v1/chat/completions, /v1/completions, /v1/models.

    On this machine alone without keys. SIGTERM: answers under way are finished.

    [dim]Example:[/dim]  moe-dist serve outputs/demo --port 8000
    """
    missing = [package for package in _NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"serve needs {', '.join(missing)}: pip install 'moe-dist[serve]'")
    if hash_key is not None:
        _print_key(hash_key)
        return
    if model is None:
        raise ConfigError("MODEL: which one is to be served?")
    if (tls_certificate is None) != (tls_key is None):
        raise ConfigError("--tls-certificate and --tls-key: both, or neither")
    if audit_text and audit is None:
        raise ConfigError("--audit-text: only with --audit-log FILE")
    if train_code and train_dir is None:
        raise ConfigError("--train-code: only with --train-dir FOLDER")
    if train_dir is not None and not Path(train_dir).is_dir():
        raise ConfigError(f"--train-dir {train_dir}: there is no such folder")
    from moe_dist.serve.gate import is_loopback

    if not is_loopback(host) and keys is None:
        raise ConfigError(f"--host {host}: others can reach it; say who may ask by --keys FILE (--hash-key makes keys)")
    if keys is not None:
        from moe_dist.serve.keys import read_keys

        try:
            read_keys(Path(keys))
        except ValueError as error:
            raise ConfigError(f"--keys {error}") from error
    if not is_loopback(host) and tls_key is None:
        print("moe-dist: keys travel in the clear: --tls-certificate and --tls-key, or a proxy", file=sys.stderr)
    engine: dict[str, Any] = {"max_rows": max_batch, "cache_tokens": cache_tokens}
    engine |= expert_cache(expert_cache_gb, cache_policy, expert_folder, prefetch)
    options = {
        "host": host,
        "port": port,
        "name": name or model.rstrip("/").rpartition("/")[2],
        "keys": keys,
        "tls": [tls_certificate, tls_key] if tls_key else None,
        "audit": audit,
        "audit_options": {"max_bytes": audit_mb * 2**20, "with_text": audit_text},
        "limits": {"body_bytes": max_body_kb * 1000, "request_seconds": max_seconds, "max_tokens": max_tokens},
        "train": None,
        "max_waiting": max_waiting,
        "drain_seconds": drain_seconds,
        "engine": engine,
    }
    if train_dir is not None:
        command = [sys.executable, "-u", *TRAIN]
        options["train"] = {"folder": train_dir, "own_code": train_code, "command": command}
    raise typer.Exit(
        run_inference("serve", model, context.args, options, nproc, step, dtype, encryption_key, int8=int8)
    )


def _print_key(wanted: str) -> None:
    from moe_dist.serve.keys import new_key

    name, _, role = wanted.partition(":")
    try:
        key, line = new_key(name, role or "user")
    except ValueError as error:
        raise ConfigError(f"--hash-key {error}") from error
    print(line)
    print(f"moe-dist: the key, which is kept nowhere: {key}", file=sys.stderr)
