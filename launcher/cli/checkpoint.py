"""`moe-dist checkpoint ls|verify|inspect|diff|prune|reshard|import`: look after what a run has saved.

`ls`, `verify` and `prune` load no torch: they answer at once, also on a machine that only stores.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli.paths import expanded
from launcher.connect.exit_codes import EXIT_FAILED
from moe_dist.checkpoint.config_diff import changes
from moe_dist.checkpoint.lock import quiet
from moe_dist.checkpoint.reading import CheckpointRef, read_trainer_state, whole
from moe_dist.checkpoint.retention import to_remove
from moe_dist.checkpoint.storage import Storage, open_storage, step_folder
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.storage.manifest import CheckpointError, Manifest
from moe_dist.checkpoint.tools.listing import listed, room_taken, verdict
from moe_dist.config import ConfigError, load_config

app = typer.Typer(
    name="checkpoint",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="List, verify, inspect, compare, thin out, rewrite and import checkpoints.",
    epilog="PATH is a run folder, a folder or URL with checkpoints (s3://bucket/run), or one checkpoint-STEP in it. "
    "Exit codes: 0 fine, 1 something does not verify, 2 it cannot be done.",
)
Place = Annotated[str, typer.Argument(metavar="PATH", callback=expanded, help="Run folder, URL, or one checkpoint.")]
One = Annotated[str, typer.Argument(metavar="CKPT", callback=expanded, help="One checkpoint: run/checkpoint-500.")]
Key = Annotated[
    list[str] | None,
    typer.Option("--encryption-key", callback=expanded, help="A file or env:NAME with the key; may be given twice."),
]
SigningKey = Annotated[
    str | None,
    typer.Option("--signing-key", callback=expanded, help="A file or env:NAME with the key that must have signed it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs, on standard output.")]


@app.command()
def ls(path: Place, as_json: AsJson = False) -> None:
    """What is there: every step with size, layout, metrics and age. Reads manifests and sizes only."""
    from launcher.cli.checkpoint_table import print_steps, step_as_json

    with plainly():
        storage, steps = storage_of(path)
        rows = [listed(found) for found in _steps(storage, steps)]
        leftovers = {} if steps else {name: room_taken(storage, name) for name in storage.leftovers()}
    if as_json:
        _print_json({"place": storage.where, "steps": [step_as_json(row) for row in rows], "leftovers": leftovers})
        return
    print_steps(storage.where, rows, leftovers)


@app.command()
def verify(path: Place, encryption_key: Key = None, signing_key: SigningKey = None, as_json: AsJson = False) -> None:
    """Hash every byte and compare with the manifest. Names the files and tensors that are not as written.

    Shapes are compared too: moments with their weights, weights with the configuration they were saved with. Hashes
    are of the files as stored: an encrypted checkpoint needs no key for them. With one, every seal is opened too, and
    the configuration read. With --signing-key, what that key has not signed does not verify.
    """
    from launcher.cli.checkpoint_table import print_verdicts

    with plainly():
        keys = Keys(encryption_key or (), signing_key)
        storage, steps = storage_of(path)
        found = _steps(storage, steps, some=True)
        verdicts = {one: verdict(one, keys) for one in found}
    good = not any(one.problems for one in verdicts.values())
    if as_json:
        rows = [{"step": one.step, "path": str(one), **found._asdict()} for one, found in verdicts.items()]
        _print_json({"place": storage.where, "ok": good, "steps": rows})
    else:
        print_verdicts(storage.where, verdicts)
    if not good:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def inspect(
    checkpoint: One,
    experts: Annotated[bool, typer.Option("--experts", help="Every expert on a line of its own.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="The optimizer's state too.")] = False,
    encryption_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """The tensors of a checkpoint with type, shape, norm and hash; experts summed up by layer."""
    from launcher.cli.checkpoint_table import print_tensors, tensors_as_json
    from moe_dist.checkpoint.tools.inspecting import entries

    with plainly():
        found, manifest, keys = good_checkpoint(checkpoint, encryption_key)
        listing = list(entries(found, manifest, keys))
    if as_json:
        _print_json({"path": str(found), "step": found.step, "tensors": tensors_as_json(listing)})
        return
    print_tensors(found, manifest, listing, experts, everything)


@app.command()
def diff(first: One, second: One, encryption_key: Key = None, as_json: AsJson = False) -> None:
    """Which tensors and experts are not bitwise alike, by how much, and which keys of the configuration differ.

    Exit code 0 whether they differ or not.
    """
    from launcher.cli.checkpoint_table import difference_as_json, print_differences
    from moe_dist.checkpoint.tools.inspecting import Tensors, differences

    with plainly():
        sides = [good_checkpoint(path, encryption_key) for path in (first, second)]
        one, other = (Tensors(*side) for side in sides)
        found = list(differences(one, other))
        states = [read_trainer_state(*side) for side in sides]
        replicas = [side[1].layout.get("edp", 1) * side[1].layout.get("ep", 1) for side in sides]
        keys = changes(states[0]["config"], states[1]["config"], *replicas)
    if as_json:
        rows = [difference_as_json(row) for row in found]
        config = {change.key: [change.before, change.now] for change in keys}
        _print_json({"first": first, "second": second, "tensors": rows, "config": config})
        return
    print_differences(one, other, found, keys)


@app.command()
def prune(
    path: Place,
    keep: Annotated[int, typer.Option(min=1, help="This many stay: the newest, or with --best the best.")],
    keep_every: Annotated[int, typer.Option(min=0, help="Multiples of this stay besides.")] = 0,
    best: Annotated[str | None, typer.Option(metavar="METRIC", help="Rank by this metric, such as eval_loss.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and leave it.")] = False,
) -> None:
    """Remove old steps and what cut-short saves have left. The newest good step always stays.

    Refuses while a run is writing there. Steps that are damaged are named, not counted and not removed.
    """
    from launcher.cli.checkpoint_table import size

    with plainly():
        storage, steps = storage_of(path)
        if steps:
            raise ConfigError(f"{path}: one checkpoint; prune takes the folder that holds several")
        run_folder = Path(path.removeprefix("file://"))
        lock = nullcontext(False) if "://" in path and not run_folder.is_dir() else quiet(run_folder, "nothing removed")
        with lock as locked:
            going, broken = _going(storage, keep, keep_every, best)
            leftovers = storage.leftovers()
            for line in broken:
                print(f"damaged, left alone: {line}", file=sys.stderr)
            if leftovers and not locked:
                print(
                    f"left alone: {', '.join(leftovers)}: no run lock here says whether a run is writing them now; "
                    "prune the run's own folder, or let the next start of the run collect them",
                    file=sys.stderr,
                )
                leftovers = []
            freed = 0
            for folder in [*map(step_folder, going), *leftovers]:
                taken = room_taken(storage, folder)
                freed += taken
                if not dry_run:
                    storage.remove(folder)
                print(f"{'would remove' if dry_run else 'removed'} {storage.where}/{folder} ({size(taken)})")
            kept = ", ".join(str(step) for step in storage.steps() if step not in going) or "none"
            print(f"{size(freed)} {'would be ' if dry_run else ''}freed; steps that stay: {kept}")


@app.command()
def reshard(
    source: One,
    destination: Annotated[
        str, typer.Argument(metavar="DEST", callback=expanded, help="Folder or URL that gets checkpoint-STEP.")
    ],
    shards: Annotated[int, typer.Option(min=1, max=4096, help="Files to write; experts and rows are shared out.")],
    encryption_key: Key = None,
    seal_with: Annotated[
        str | None, typer.Option(callback=expanded, help="Encrypt the copy with this key; default: as the source.")
    ] = None,
    decrypt: Annotated[bool, typer.Option("--decrypt", help="Write the copy without encryption.")] = False,
    signing_key: SigningKey = None,
    sign_with: Annotated[
        str | None, typer.Option(callback=expanded, help="Sign the copy with this key; default: with --signing-key.")
    ] = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="Write the copy without a signature.")] = False,
) -> None:
    """Write the same checkpoint into another number of files, or under another key. Nothing is ever overwritten.

    A run needs no resharding to go on at another size; this is for copies with files of another size, and for keys
    that must be replaced. A signed checkpoint is copied with the key that has signed it, or --unsigned.
    """
    from launcher.cli.checkpoint_table import size
    from moe_dist.checkpoint.tools.inspecting import digests
    from moe_dist.checkpoint.tools.resharding import reshard as write

    with plainly():
        found, manifest, keys = good_checkpoint(source, encryption_key)
        if decrypt and seal_with:
            raise ConfigError("--decrypt and --seal-with exclude each other")
        _check_signature(found, manifest, signing_key, unsigned, sign_with)
        sealing = Keys([seal_with] if seal_with else [], None if unsigned else sign_with or signing_key)
        if not seal_with and not decrypt and manifest.encryption is not None:
            sealing.keys = [key for key in keys.keys if key.id == manifest.encryption.key_id]
        storage = _destination(destination, found.step)
        root = storage.local_path("")
        with nullcontext(False) if root is None else quiet(root, "nothing written"):
            made = write(found, keys, storage, shards, sealing)
        if digests(made, sealing) != digests(found, keys):
            raise CheckpointError(f"{made}: does not hold what {found} holds")
    new = made.storage.manifest(made.step)
    how = "plain" if new.encryption is None else f"encrypted with key {new.encryption.key_id}"
    how += "" if new.signature is None else f", signed with key {new.signature.key_id}"
    print(f"{made}: {len(new.files) - 1} shards, {size(new.num_bytes)}, {how}; verified, every tensor bitwise the same")


@contextmanager
def plainly() -> Iterator[None]:
    """Errors of checkpoints are one line: 1 when one is damaged, which prints it here."""
    try:
        yield
    except ConfigError:
        raise
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def storage_of(path: str) -> tuple[Storage, list[int]]:
    """The storage a person means, and the step when it is one checkpoint. Follows a run's own configuration."""
    parent, _, name = path.rstrip("/").rpartition("/")
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    if match:
        return open_storage(parent or "."), [int(match[1])]
    storage = open_storage(path)
    root = storage.local_path("")
    if root is None:
        return storage, []
    if not root.is_dir():
        raise ConfigError(f"{path}: there is no such folder")
    if (root / "config.yaml").is_file() and not storage.candidates():
        elsewhere = load_config(root / "config.yaml").checkpoint.folder
        if elsewhere:
            return open_storage(elsewhere), []
    return storage, []


def _steps(storage: Storage, steps: list[int], some: bool = False) -> list[CheckpointRef]:
    found = steps or storage.candidates()
    if some and not found:
        raise ConfigError(f"{storage.where}: there is no checkpoint")
    for step in steps:
        storage_has = storage.size(f"{step_folder(step)}/manifest.json") is not None
        if not storage_has:
            storage.manifest(step)  # says what there is beside it
    return [CheckpointRef(storage, step) for step in found]


def good_checkpoint(path: str, encryption_key: list[str] | None) -> tuple[CheckpointRef, Manifest, Keys]:
    """A checkpoint that verifies, ready to be read."""
    storage, steps = storage_of(path)
    if not steps:
        known = ", ".join(step_folder(step) for step in storage.steps()) or "none"
        raise ConfigError(f"{path}: not one checkpoint but a folder of several; there: {known}")
    (found,) = _steps(storage, steps)
    keys = Keys(encryption_key or ())
    wrong = whole(found)
    if wrong:
        more = f" (and {len(wrong) - 1} more: moe-dist checkpoint verify)" if len(wrong) > 1 else ""
        print(f"moe-dist: error: {wrong[0]}{more}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED)
    manifest = found.storage.manifest(found.step)
    keys.opening(manifest, str(found))
    return found, manifest, keys


def _check_signature(
    found: CheckpointRef, manifest: Manifest, key: str | None, unsigned: bool, sign_with: str | None
) -> None:
    """A signature is checked before the copy gets another one, and left out on demand only."""
    if unsigned and sign_with:
        raise ConfigError("--unsigned and --sign-with exclude each other")
    if key is not None:
        Keys(signing=key).check_signature(manifest, str(found))
    elif manifest.signature is not None and not unsigned:
        raise ConfigError(
            f"{found}: signed with key {manifest.signature.key_id}; --signing-key KEY (a file or env:NAME) checks that "
            "and signs the copy, --unsigned writes one that a run with checkpoint.signing_key refuses"
        )


def _destination(path: str, step: int) -> Storage:
    parent, _, name = path.rstrip("/").rpartition("/")
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    if match and int(match[1]) != step:
        raise ConfigError(f"{path}: the copy of step {step} is to be named {step_folder(step)}")
    return open_storage((parent or ".") if match else path)


def _going(storage: Storage, keep: int, every: int, best: str | None) -> tuple[list[int], list[str]]:
    """Steps that may go, and what is wrong with those that are damaged. The newest that stays is read in full."""
    rows = [listed(found) for found in _steps(storage, [], some=True)]
    broken = [row.problems[0] for row in rows if row.problems]
    good = {row.checkpoint.step: row.manifest for row in rows if row.manifest and not row.problems}
    if best is not None and not any(best in manifest.metrics for manifest in good.values()):
        raise ConfigError(f"--best {best}: no checkpoint in {storage.where} has that metric")
    while good:
        newest = max(good)
        wrong = whole(CheckpointRef(storage, newest))
        if not wrong:
            break
        broken.append(wrong[0])
        del good[newest]
    metrics = None
    if best is not None:
        metrics = {step: manifest.metrics[best] for step, manifest in good.items() if best in manifest.metrics}
    return to_remove(list(good), limit=keep, keep_every=every, metrics=metrics), broken


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))
