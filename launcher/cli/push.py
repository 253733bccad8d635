"""`moe-dist export --push`: a folder onto the Hugging Face Hub. The hub's client is imported when it is asked."""

from __future__ import annotations

from pathlib import Path

import typer

from launcher.connect.exit_codes import EXIT_FAILED
from moe_dist.config import ConfigError
from moe_dist.config.model_source import hub_name


def check_before_push(name: str) -> None:
    """Raises ConfigError for a name that the hub cannot have, and for a token that it does not know."""
    found = hub_name(name)
    if found is None or found[1] is not None:
        raise ConfigError(f"--push {name}: not ORG/NAME" + ("; a branch is --revision" if found else ""))
    from moe_dist.pretrained.push import check_token

    check_token(name)


def exported_folder(path: str) -> Path:
    """A folder that an export has made. Raises ConfigError for another."""
    folder = Path(path)
    configs = (folder / "config.json", folder / "adapter_config.json")
    if not any(config.is_file() for config in configs) or not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{path}: no exported folder; to export a run first, give --output DIR too")
    return folder


def push_folder(folder: Path, name: str, private: bool, revision: str | None) -> None:
    """Upload, compare, say so. Exit code 1 where the hub has something else afterwards."""
    from moe_dist.pretrained.push import push

    try:
        done = push(folder, name, private=private, revision=revision)
    except ConfigError as error:
        again = f"moe-dist export {folder} --push {name}{' --private' if private else ''}"
        again += f" --revision {revision}" if revision else ""
        raise ConfigError(f"{error}; {folder} is whole, and this goes on: {again}") from error
    for problem in done.problems:
        print(f"{'not pushed':<21}{problem}")
    if done.problems:
        raise typer.Exit(EXIT_FAILED)
    print(f"{'pushed':<21}{done.num_files} files to {name}, commit {done.commit}: the hub has what is in {folder}")
