"""`moe-dist init`: run files and what clusters need, out of the installed package into a folder of a person's own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from launcher.backends.shipped import SHIPPED
from launcher.cli.paths import expanded
from moe_dist.config import ConfigError

Template = Literal["demo", "pretrain", "finetune", "slurm", "k8s"]
# What each lays down: run files by name, whole folders by name, and the command that comes next.
_RUN_FILES: dict[Template, tuple[str, ...]] = {
    "demo": ("demo",),
    "pretrain": ("*",),
    "finetune": ("demo", "finetune"),
    "slurm": ("demo",),
    "k8s": ("demo",),
}
_FOLDERS: dict[Template, tuple[str, ...]] = {
    "demo": (),
    "pretrain": ("monitoring",),
    "finetune": (),
    "slurm": ("slurm", "monitoring"),
    "k8s": ("k8s", "monitoring"),
}
_NEXT: dict[Template, str] = {
    "demo": "moe-dist train demo.yaml",
    "pretrain": "moe-dist train moe_16x.yaml data.source=text data.path='corpus/**/*.txt'",
    "finetune": "moe-dist train demo.yaml, then what finetune.yaml says at its top",
    "slurm": "moe-dist launch slurm demo.yaml --dry-run, or sbatch slurm/train.sbatch demo.yaml",
    "k8s": "moe-dist launch k8s demo.yaml --dry-run, or kubectl apply -k k8s/base",
}


def init(
    folder: Annotated[str, typer.Argument(metavar="DIR", callback=expanded, help="Made when it is missing.")] = ".",
    template: Annotated[Template, typer.Option("--template", "-t", help="What to lay down.")] = "demo",
) -> None:
    """Lay down run files in DIR, with the scripts, manifests or alert rules that go with them.

    [bold]demo[/bold]: two minutes on a laptop. [bold]pretrain[/bold]: every run file, alert rules and a Grafana
    dashboard. [bold]finetune[/bold]: from weights of an earlier run on to data of your own. [bold]slurm[/bold],
    [bold]k8s[/bold]: batch scripts, manifests. What is there already is kept.

    [dim]Example:[/dim]  moe-dist init runs --template pretrain
    """
    target = Path(folder)
    for name, source in contents(template).items():
        made = _lay_down(source, target / name)
        print(f"{'made' if made else 'kept, was there'}  {target / name}")
    where = "" if target == Path(".") else f"cd {shlex.quote(folder)}; "
    print(f"next: {where}{_NEXT[template]}")


def contents(template: Template) -> dict[str, Path]:
    """What a template lays down: path inside the folder, and the file of this package that it comes from."""
    found = {
        path.name: path for pattern in _RUN_FILES[template] for path in (SHIPPED / "configs").glob(f"{pattern}.yaml")
    }
    for folder in _FOLDERS[template]:
        for path in (SHIPPED / folder).resolve().rglob("*"):
            if path.is_file() and path.name != "Dockerfile":  # an image is built from a checkout
                found[f"{folder}/{path.relative_to((SHIPPED / folder).resolve())}"] = path
    return dict(sorted(found.items()))


def _lay_down(source: Path, path: Path) -> bool:
    """Copy a file where there is none yet; whether there was none. Raises ConfigError when it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(source.read_bytes())
    except FileExistsError:
        if path.parent.is_dir():
            return False
        raise ConfigError(f"{path.parent}: a file; moe-dist init needs a folder of that name") from None
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: {error.strerror}; give a folder that can be written to") from None
    return True
