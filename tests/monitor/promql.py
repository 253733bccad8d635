"""The queries of the dashboard and the alert rules, and what is structurally wrong with a dashboard."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families
from services import need

import moe_dist.monitor

FOLDER = Path(moe_dist.monitor.__file__).parent
ALERTS = FOLDER / "alerts.yml"
DASHBOARD = FOLDER / "grafana.json"
METRIC = re.compile(r"\bmoe_dist_\w+")


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return group["rules"]


def series(scrapes: Sequence[str], last_for: int = 0) -> list[dict[str, str]]:
    """What a server would have, one scrape a minute, for promtool; the last one is seen `last_for` minutes more.

    promtool begins at 1970, and so does the run.
    """
    found: dict[str, list[str]] = {}
    for minute, text in enumerate(scrapes):
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        (began,) = (sample.value for sample in samples if sample.name == "moe_dist_run_start_timestamp_seconds")
        for sample in samples:
            labels = {**sample.labels, "run": "r", "instance": "i", "job": "j"}
            told = ", ".join(f'{key}="{value}"' for key, value in labels.items())
            name = f"{sample.name}{{{told}}}"
            value = sample.value - began if sample.name.endswith("_timestamp_seconds") else sample.value
            values = found.setdefault(name, ["_"] * len(scrapes))
            values[minute] = f"{value!r}"
            if minute == len(scrapes) - 1 and last_for:
                values[minute] += f"x{last_for}"
    return [{"series": name, "values": " ".join(values)} for name, values in found.items()]


def evaluate(known: Sequence[dict[str, str]], checks: Sequence[dict[str, Any]], folder: Path) -> str:
    """What promtool has against the checks of the alert rules; empty: nothing."""
    test = {"interval": "1m", "input_series": list(known), "promql_expr_test": list(checks)}
    tests = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [test]}
    (folder / "alerts_test.yml").write_text(yaml.safe_dump(tests))
    command = [need("promtool"), "test", "rules", str(folder / "alerts_test.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr if done.returncode else ""


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels", [])


def panel_queries(run: str = ".*") -> dict[str, str]:
    """Panel and reference -> its query, with Grafana's variables filled in."""
    found = {}
    for panel in panels(dashboard()):
        for target in panel.get("targets", []):
            query = target["expr"].replace("$__rate_interval", "1m").replace("$run", run)
            assert "$" not in query
            found[f"{panel['title']} {target['refId']}"] = query
    return found


def faults(board: dict[str, Any]) -> list[str]:
    """What Grafana would refuse or draw over each other."""
    found = []
    for key, kind in (("title", str), ("schemaVersion", int), ("uid", str), ("panels", list)):
        if not isinstance(board.get(key), kind):
            found.append(f"dashboard: {key}")
    variables = {variable["name"] for variable in board["templating"]["list"]}
    if variables != {"datasource", "run"}:
        found.append(f"variables {variables}")
    numbers, taken = set(), {}
    for panel in panels(board):
        title, place = panel.get("title"), panel["gridPos"]
        if panel["id"] in numbers:
            found.append(f"{title}: id {panel['id']} twice")
        numbers.add(panel["id"])
        if place["x"] + place["w"] > 24:
            found.append(f"{title}: wider than the page")
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                if (x, y) in taken:
                    found.append(f"{title}: over {taken[x, y]}")
                taken[x, y] = title
        if panel["type"] == "row":
            continue
        if not panel.get("targets"):
            found.append(f"{title}: no query")
        references = [target["refId"] for target in panel.get("targets", [])]
        if len(references) != len(set(references)):
            found.append(f"{title}: a reference twice")
        for part in (panel, *panel.get("targets", [])):
            if part.get("datasource", {}).get("uid") != "${datasource}":
                found.append(f"{title}: not the chosen data source")
        found += [f"{title}: not of the chosen run" for t in panel["targets"] if 'run=~"$run"' not in t["expr"]]
    return sorted(set(found))
