"""`moe-dist launch k8s`: the manifests of k8s/ with a run in them, printed or applied.

The files are kustomize's, and `kubectl apply -k` reads them too. They are rendered here in plain Python, so that
what would be applied can be seen without kubectl and without a cluster; only what these files use is understood,
everything else is refused. Imports no torch.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from launcher.backends.command import for_world
from launcher.backends.shipped import SHIPPED
from moe_dist.config import Config, ConfigError, dump_config

MANIFESTS = (SHIPPED / "k8s").resolve()
RUNS = PurePosixPath("/runs")
"""Where every pod sees the claim."""
IMAGE = "moe-dist:latest"
"""The image that the manifests name."""
KINDS = ("jobset", "trainjob", "pytorchjob", "rayjob")
"""Components that put something else in the place of the Job."""
_UNDERSTOOD = {
    *("apiVersion", "kind", "resources", "configMapGenerator", "generatorOptions"),
    *("components", "patches", "replacements"),
}
_LOCAL = "config.kubernetes.io/local-config"
_MERGE_KEYS = {
    **dict.fromkeys(("containers", "env", "volumes"), "name"),
    "ports": "containerPort",
    "volumeMounts": "mountPath",
    "topologySpreadConstraints": "topologyKey",
}
_PODS, _RANKS = 128, 8
"""How many pods, and ranks of each, are thought of where those asked for do not fit."""
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")

Object = dict[str, Any]


def manifests(
    config: Config,
    overlay: str | None = None,
    nodes: int | None = None,
    nproc_per_node: int | None = None,
    namespace: str | None = None,
    image: str | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> str:
    """All objects of a run as YAML; `notice` hears what was chosen.

    Raises ConfigError when the run or the options cannot be."""
    chosen = _chosen(overlay)
    objects = render(MANIFESTS / "base")
    for name in chosen:
        objects = render(MANIFESTS / "components" / name, objects)
    ranks = (nodes or _default(objects, "NODES"), nproc_per_node or _default(objects, "NPROC_PER_NODE"))
    config = _check(config, chosen, *ranks, notice)
    put_in(objects, config, *ranks, namespace, image)
    return "---\n".join(yaml.dump(item, Dumper=_Text, sort_keys=False, width=1000) for item in objects)


def for_pods(config: Config, notice: Callable[[str], None]) -> Config:
    """The run as pods must be told it: whoever starts one again cannot tell the first start from the next."""
    config = config.model_copy(deep=True)
    if config.checkpoint.resume == "never":
        config.checkpoint.resume = "auto"
        notice("checkpoint.resume=never becomes auto: a pod that is started again goes on; take a new train.output_dir")
    if not config.checkpoint.save_steps:
        notice("checkpoint.save_steps=0: a lost pod costs the whole run")
    return config


def apply(text: str) -> int:
    """Hand the objects to kubectl; returns its exit code. Raises ConfigError without kubectl, or without a cluster."""
    try:
        done = subprocess.run(
            ["kubectl", "apply", "-f", "-"], input=text, text=True, check=False, stderr=subprocess.PIPE
        )
    except FileNotFoundError:
        raise ConfigError("kubectl is not installed; --dry-run prints the manifests without it") from None
    if done.returncode and re.search("connection refused|no such host|i/o timeout|no configuration", done.stderr):
        where = re.search(r"dial tcp ([^:\s]+:\d+)|lookup (\S+)", done.stderr)
        raise ConfigError(
            f"kubectl reaches no cluster{f' ({where[1] or where[2]})' if where else ''}: choose one with "
            "`kubectl config use-context`, or set KUBECONFIG; --dry-run prints the manifests without one"
        )
    sys.stderr.write(done.stderr)
    return done.returncode


def overlays() -> list[str]:
    return sorted(path.parent.name for path in MANIFESTS.glob("components/*/kustomization.yaml"))


def _chosen(overlay: str | None) -> list[str]:
    """Names of components, in the order in which they work: first what changes the Job, then what copies it."""
    chosen = overlay.split(",") if overlay else []
    for name in chosen:
        if name not in overlays():
            raise ConfigError(f"--overlay {overlay}: allowed: {', '.join(overlays())}, or several with commas between")
    if len(kinds := [name for name in chosen if name in KINDS]) > 1:
        raise ConfigError(
            f"--overlay {overlay}: {' and '.join(kinds)} are different kinds of job; allowed: one of them"
        )
    return sorted(set(chosen), key=lambda name: (name in KINDS, name))


def _check(
    config: Config, overlays: list[str], nodes: int, nproc_per_node: int, notice: Callable[[str], None]
) -> Config:
    """The run as so many ranks can train it. Raises ConfigError naming numbers that can, where these cannot."""
    if "pytorchjob" in overlays and nodes < 2:
        raise ConfigError(f"--nodes {nodes}: a PyTorchJob here is a master and workers; allowed: 2 or more")
    there = config.model_copy(deep=True)
    there.train.output_dir = Path(run_folder(config))  # a folder of that name here is another run's
    try:
        found = for_world(there, nodes * nproc_per_node, notice, per_host=nproc_per_node, elsewhere=True)
    except ConfigError as error:
        tries = [*((nodes, ranks) for ranks in range(1, _RANKS + 1)), *((pods, _RANKS) for pods in range(1, _PODS + 1))]
        fitting = next((fit for fit in tries if _fits(there, fit[0] * fit[1])), None)
        hint = "; --nodes {} --nproc-per-node {} would do".format(*fitting) if fitting else ""
        raise ConfigError(f"{nodes} nodes x {nproc_per_node} ranks: {error}{hint}") from None
    if config.parallel.layout == "given":
        return config  # pods choose for themselves what an elastic run changes
    found = found.model_copy(deep=True)
    found.train.output_dir = config.train.output_dir
    return found


def _fits(config: Config, world_size: int) -> bool:
    here = config.model_copy(deep=True)
    here.launch.cluster = None  # by the batch alone: a plan for each number would take minutes
    try:
        for_world(here, world_size, elsewhere=True)
    except ConfigError:
        return False
    return True


def run_folder(config: Config) -> str:
    """Where the run writes, as its pods see it: below the claim. Raises ConfigError for any other place."""
    folder = RUNS / PurePosixPath(config.train.output_dir.as_posix())
    if ".." in folder.parts or not folder.is_relative_to(RUNS) or folder == RUNS:
        raise ConfigError(
            f"train.output_dir={config.train.output_dir}: would be lost with its pod; allowed: a relative path, "
            f"or one below {RUNS}, where the claim is"
        )
    return str(folder)


def put_in(
    objects: list[Object], config: Config, nodes: int, nproc_per_node: int, namespace: str | None, image: str | None
) -> None:
    """Put a run into rendered manifests: its file, its folder, and how many ranks of what image."""
    if namespace is not None and not _NAME.fullmatch(namespace):
        raise ConfigError(f"--namespace {namespace}: lower-case letters, digits and dashes, at most 63")
    if image is not None and not re.fullmatch(r"[^\s]+", image):
        raise ConfigError(f"--image {image!r}: the name of an image")
    values = {"NODES": str(nodes), "NPROC_PER_NODE": str(nproc_per_node), "RUN_DIR": run_folder(config)}
    for item in objects:
        if namespace is not None:
            item["metadata"]["namespace"] = namespace
        if item["kind"] == "ConfigMap":
            item["data"] = {"run.yaml": dump_config(config)}
            continue
        for part in _parts(item):
            if part.get("name") in values and "value" in part:
                part["value"] = values[part["name"]]
            for key, value in {
                "completions": nodes,
                "parallelism": nodes,
                "numNodes": nodes,
                "numProcPerNode": nproc_per_node,
                "nvidia.com/gpu": nproc_per_node,
                "image": image or IMAGE,
            }.items():
                if key in part and not isinstance(part[key], (dict, list)):
                    part[key] = value
        if item["kind"] == "PyTorchJob":
            item["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] = nodes - 1
        if item["kind"] == "RayJob":
            cluster = item["spec"]["rayClusterSpec"]
            (workers,) = cluster["workerGroupSpecs"]
            workers |= dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), nodes - 1)
            for group in (cluster["headGroupSpec"], workers):
                group["rayStartParams"]["num-cpus"] = str(nproc_per_node)


def _default(objects: list[Object], name: str) -> int:
    """What the manifests themselves say: the value of an environment variable, or what a TrainJob has for it."""
    for item in objects:
        for part in _parts(item):
            if part.get("name") == name and "value" in part:
                return int(part["value"])
            key = {"NODES": "numNodes", "NPROC_PER_NODE": "numProcPerNode"}[name]
            if key in part:
                return int(part[key])
    return 1


def _parts(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a tree."""
    if isinstance(tree, dict):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _parts(value)


class _Text(yaml.SafeDumper):
    """Text as a person would write it: files as blocks, and quotes around all that any YAML could take for a number."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    risky = re.match(r"[-+.]?\d|[yn]$", text, re.IGNORECASE)  # PyYAML itself sees to true, null, on and the like
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else "'" if risky else None)


_Text.add_representer(str, _write_text)


# --- the part of kustomize that k8s/ uses


def render(folder: Path, given: list[Object] | None = None) -> list[Object]:
    """The objects of a folder with a kustomization.yaml, as `kubectl kustomize` would print them.

    A component works on the objects that are `given`.
    """
    plan = _read(folder / "kustomization.yaml")[0]
    if unknown := set(plan) - _UNDERSTOOD:
        raise ConfigError(
            f"{folder / 'kustomization.yaml'}: {', '.join(sorted(unknown))}: only kubectl understands this"
        )
    objects = list(given or [])
    for name in plan.get("resources", []):
        path = folder / name
        objects += render(path.resolve()) if path.is_dir() else _read(path)
    for wanted in plan.get("configMapGenerator", []):
        data = {name: (folder / name).read_text("utf-8") for name in wanted["files"]}
        metadata = {"name": wanted["name"], "labels": plan["generatorOptions"]["labels"]}
        objects.insert(0, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    for name in plan.get("components", []):
        objects = render(folder / name, objects)
    for patch in plan.get("patches", []):
        (content,) = _read(folder / patch["path"])
        for item in objects:
            if item["kind"] == content["kind"]:
                _merge(item, content)
    for rule in plan.get("replacements", []):
        (source,) = [item for item in objects if item["kind"] == rule["source"]["kind"]]
        value = _at(source, rule["source"]["fieldPath"])
        for target in rule["targets"]:
            for item in objects:
                for path in target["fieldPaths"] if item["kind"] == target["select"]["kind"] else ():
                    above, _, last = path.rpartition(".")
                    _at(item, above)[last] = copy.deepcopy(value)
    return [item for item in objects if item["metadata"].get("annotations", {}).get(_LOCAL) != "true"]


def _read(path: Path) -> list[Any]:
    try:
        return list(yaml.safe_load_all(path.read_text("utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None


def _at(tree: Any, path: str) -> Any:
    """What `a.0.b.[name=c]` leads to."""
    for step in path.split("."):
        if step.startswith("["):
            key, _, wanted = step[1:-1].partition("=")
            (tree,) = [item for item in tree if item[key] == wanted]
        else:
            tree = tree[int(step)] if isinstance(tree, list) else tree[step]
    return tree


def _merge(tree: Object, patch: Object) -> None:
    """A strategic merge: mappings and lists of named things are merged, null takes away, the rest is replaced."""
    for key, value in patch.items():
        if value is None:
            tree.pop(key, None)
        elif isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        elif isinstance(value, list) and key in _MERGE_KEYS and key in tree:
            tree[key] = _merge_list(tree[key], value, _MERGE_KEYS[key])
        else:
            tree[key] = copy.deepcopy(value)


def _merge_list(items: list[Object], patch: list[Object], key: str) -> list[Object]:
    """The items of the patch come first, in its order, as kustomize has it."""
    left = {item[key]: item for item in items}
    first = []
    for change in patch:
        item = left.pop(change[key], None)
        if change.get("$patch") == "delete":
            continue
        if item is None:
            item = copy.deepcopy(change)
        else:
            _merge(item, change)
        first.append(item)
    return first + list(left.values())
