"""What a record is, and what a metric is: a field of one. All of them stand in `moe_dist/monitor/metrics.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, ClassVar, Literal, Self, get_type_hints


class Record:
    """A record that knows its name in `metrics.jsonl`."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The fields and `kind`; nested records become dicts. Floats stay floats, NaN and infinity too.

        Lists of numbers are the record's own, to be written and not to be changed: copying them takes longer.
        """
        return {"kind": self.kind} | _plain(self)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """The record of a row of `metrics.jsonl`; what another version wrote more is left out."""
        return known(cls, row)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, list) and value and is_dataclass(value[0]):
        return [_plain(item) for item in value]
    return value


def known(kind: type[Any], row: Mapping[str, Any]) -> Any:
    """The dataclass with those of the row's values that it has a field for."""
    names = {item.name for item in fields(kind)}
    return kind(**{key: value for key, value in row.items() if key in names})


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
