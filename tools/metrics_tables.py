"""Keep the tables in `docs/metrics.md` true: made from `moe_dist/monitor/metrics.py`.

They stand between `<!-- metrics: NAME -->` and `<!-- end -->`.

python tools/metrics_tables.py           write the tables
python tools/metrics_tables.py --check   only say whether they are stale
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # run as a script

from moe_dist.monitor import metrics  # noqa: E402
from moe_dist.monitor.metric import Metric, Series, metrics_of  # noqa: E402

PAGE = ROOT / "docs" / "metrics.md"
REGION = re.compile(r"(?<=<!-- metrics: )(\w+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
RECORDS = {
    "layers": metrics.LayerRecord,
    "ranks": metrics.RanksRecord,
    "train": metrics.TrainRecord,
    "eval": metrics.EvalRecord,
    "checkpoint": metrics.CheckpointRecord,
    "summary": metrics.RunSummary,
}
OVER = {"layers": "over layers", "ranks": "over a stage's ranks", "train": "over ranks"}
"""What `Metric.reduce` of a record reduces over."""


def updated(page: str) -> str:
    """The page with fresh tables. Raises KeyError for a region that names no table."""
    made = {name: of_record(name) for name in RECORDS} | {"sink": of_sink()}
    return REGION.sub(lambda match: f"{match[1]}{match[2]}{made[match[1]]}", page)


def of_record(name: str) -> str:
    """The metrics of a record; a column that would be empty is left out."""
    found = metrics_of(RECORDS[name]).values()
    columns = {
        "field": [f"`{metric.name}`" for metric in found],
        "unit": [metric.unit for metric in found],
        "meaning": [f"{metric.help} {metric.note}".strip() for metric in found],
        OVER.get(name, ""): ["" if metric.reduce is None else metric.reduce.__name__ for metric in found],
        "TensorBoard": [_code(metric.tag.replace("{}", "NAME")) for metric in found],
        "Prometheus": ["<br>".join(_of(metric, series) for series in metric.series) for metric in found],
    }
    return _table({title: cells for title, cells in columns.items() if any(cells)})


def of_sink() -> str:
    """What only Prometheus has."""
    found = metrics.SINK_SERIES.values()
    return _table({"metric": [_of(None, series) for series in found], "meaning": [series.help for series in found]})


def _of(metric: Metric | None, series: Series) -> str:
    labels = f" by {', '.join(f'`{label}`' for label in series.labels)}" if series.labels else ""
    said = f": {series.help}" if metric is not None and series.help != metric.help else ""
    return f"`{series.exported.replace('{}', 'NAME')}`{labels}{said}"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(columns: dict[str, Sequence[str]]) -> str:
    rows = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> int:
    page = PAGE.read_text()
    fresh = updated(page)
    if "--check" in sys.argv:
        return int(fresh != page)
    PAGE.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
