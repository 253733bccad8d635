"""What a metric is. All of them stand in `moe_dist/monitor/metrics.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal, get_type_hints


@dataclass(frozen=True)
class Series:
    """A metric of Prometheus."""

    name: str
    """Without `moe_dist_`, and without the `_total` of a counter."""
    help: str
    kind: Literal["gauge", "counter", "info"] = "gauge"
    """A counter is of one start of the run: from zero on, whatever checkpoint it goes on from."""
    labels: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """The name that queries use."""
        return f"moe_dist_{self.name}{ {'gauge': '', 'counter': '_total', 'info': '_info'}[self.kind] }"


@dataclass(frozen=True)
class Metric:
    """What there is to know about a field of a record."""

    help: str
    """A sentence, for Prometheus and docs/metrics.md."""
    unit: str = ""
    tag: str = ""
    """In TensorBoard. Of a layer: `moe/x` over all layers, `moe/layer_07/x` of one."""
    gauge: str = ""
    """In Prometheus, as `Series.name`; its labels are those of the record."""
    reduce: Callable[[Sequence[float]], float] | None = None
    """Of a layer: over layers. Of a rank: over the ranks of a pipeline stage. Of the run: over ranks, from the field of
    RanksRecord that is called alike. None: where the record is made."""
    value: Callable[[Any], Any] = lambda value: value
    """What TensorBoard and Prometheus show of the field: a number, None (nothing), or several by key, for which `{}`
    stands in their names."""
    chart: str = ""
    """Of a layer: the title of its curve in the report, which keeps it of more steps than the rest."""
    note: str = ""
    """More for docs/metrics.md alone, in Markdown."""
    more: tuple[Series, ...] = ()
    """What the Prometheus sink makes of the field besides."""
    name: str = ""
    """The field's, by `metrics_of`."""
    labels: tuple[str, ...] = ()
    """The record's, by `metrics_of`."""

    @property
    def series(self) -> tuple[Series, ...]:
        """All of Prometheus."""
        own = (Series(self.gauge, self.help, "gauge", self.labels),) if self.gauge else ()
        return own + self.more

    def shown(self, record: object) -> Iterator[tuple[str, float]]:
        """(key, number) of what TensorBoard and Prometheus show; no key where it is one number."""
        value = self.value(getattr(record, self.name))
        for key, number in value.items() if isinstance(value, Mapping) else (("", value),):
            if number is not None:
                yield key, number


def metrics_of(kind: type[Any]) -> Mapping[str, Metric]:
    """The metrics of a record, by name."""
    key: Any = kind  # mypy: not every class has instances with a hash
    return _metrics_of(key)


@cache
def _metrics_of(kind: type[Any]) -> Mapping[str, Metric]:
    hints = get_type_hints(kind, include_extras=True)
    said = {item.name: next(iter(getattr(hints[item.name], "__metadata__", ())), None) for item in fields(kind)}
    labels = getattr(kind, "labels", ())
    return {name: replace(metric, name=name, labels=labels) for name, metric in said.items() if metric is not None}
