"""Is an object what Kubernetes would take? Strictly and without a cluster: unknown fields and unknown kinds are errors.

Core kinds, and pod templates wherever they are, are checked by kubernetes-validate. Kinds of operators are checked
against schemas/: `KIND.json.gz` is a CustomResourceDefinition of the operator without its prose, `KIND.yaml` says in
our own words which fields of the kind we use. To renew the first kind:

    python tests/launcher/kube_check.py CRD.yaml ...
"""

from __future__ import annotations

import gzip
import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.32"
_KEPT = {"type", "enum", "required", "pattern", "minimum", "maximum", "minItems", "minLength", "x-api-version"}
Object = dict[str, Any]


def complaints(item: Object) -> list[str]:
    """What is wrong with an object, as `path: message`; empty when nothing is."""
    kind, version = item.get("kind", "no kind"), item.get("apiVersion", "no version")
    found = [
        f"metadata: {key}" for key in set(item.get("metadata", {})) - {"name", "namespace", "labels", "annotations"}
    ]
    if schema := _schema(kind):
        if version != schema["x-api-version"]:
            return [f"apiVersion: {version} of {kind}, known is {schema['x-api-version']}"]
        for error in jsonschema.Draft202012Validator(schema).iter_errors(item):
            found.append(f"{'/'.join(map(str, error.absolute_path))}: {error.message}")
        for template in _pod_templates(item):
            found += _core({"apiVersion": "v1", "kind": "PodTemplate", "template": template})
        return found
    return found + _core(item)


def _core(item: Object) -> list[str]:
    try:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}"]
    except (kubernetes_validate.SchemaNotFoundError, KeyError) as error:
        return [f"nobody knows this kind: {error!r}"]  # kubernetes-validate's own command lets it pass
    return []


def _pod_templates(tree: Any) -> list[Object]:
    """Pod templates with containers that have images: those of a patch are only parts of one."""
    if isinstance(tree, dict):
        containers = (tree.get("spec") or {}).get("containers", []) if isinstance(tree.get("spec"), dict) else []
        if containers and all("image" in container for container in containers):
            return [tree]
        return [found for value in tree.values() for found in _pod_templates(value)]
    return [found for value in tree for found in _pod_templates(value)] if isinstance(tree, list) else []


@lru_cache
def _schema(kind: str) -> Object | None:
    packed, ours = SCHEMAS / f"{kind}.json.gz", SCHEMAS / f"{kind}.yaml"
    if packed.exists():
        return json.loads(gzip.decompress(packed.read_bytes()))
    return closed(yaml.safe_load(ours.read_text()), top=True) if ours.exists() else None


def closed(schema: Any, top: bool = False) -> Any:
    """The schema with every mapping of known fields closed to others, and without its prose."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {}
    for key, value in schema.items():
        if key == "properties":
            kept[key] = {name: closed(inner, top and name == "metadata") for name, inner in value.items()}
        elif key in ("items", "additionalProperties"):
            kept[key] = closed(value)
        elif key in _KEPT:
            kept[key] = value
    if "properties" in kept and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept.setdefault("additionalProperties", top and "kind" not in kept["properties"])
    return kept


def pack(path: Path) -> None:
    definition = yaml.safe_load(path.read_text())["spec"]
    (stored,) = [version for version in definition["versions"] if version["storage"]]
    schema = closed(stored["schema"]["openAPIV3Schema"], top=True)
    schema["x-api-version"] = f"{definition['group']}/{stored['name']}"
    text = json.dumps(schema, separators=(",", ":"), sort_keys=True)
    target = SCHEMAS / f"{definition['names']['kind']}.json.gz"
    target.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(target.name, len(text), target.stat().st_size)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        pack(Path(name))
