"""Where records go: the console, `metrics.jsonl`, TensorBoard, Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from moe_dist.config import MonitorConfig
from moe_dist.monitor.sinks.base import Sink
from moe_dist.monitor.sinks.console import ConsoleSink
from moe_dist.monitor.sinks.jsonl import JsonlSink
from moe_dist.monitor.sinks.multi_sink import Sinks
from moe_dist.monitor.sinks.tensorboard import TensorBoardSink

__all__ = ["ConsoleSink", "JsonlSink", "Sink", "Sinks", "TensorBoardSink", "build_sinks"]


def build_sinks(output_dir: Path | str, monitor_config: MonitorConfig, *, stream: TextIO | None = None) -> Sinks:
    """The sinks of a run, for the one rank that reports. `stream`: the console's, default stdout.

    Raises ValueError for a file of `monitor.prometheus` that cannot be used, and for a name in `monitor.sinks` that is
    no sink.
    """
    folder = Path(output_dir)
    sinks: list[Sink] = [
        ConsoleSink(monitor_config.progress, stream),
        JsonlSink(folder / "metrics.jsonl", monitor_config.detail_steps),
    ]
    if monitor_config.tensorboard:
        sinks.append(TensorBoardSink(folder / "tb", monitor_config.detail_steps))
    prometheus = monitor_config.prometheus
    if prometheus.port is not None or prometheus.pushgateway:
        from moe_dist.monitor.sinks.prometheus import PrometheusSink, PushgatewaySink

        if prometheus.port is not None:
            sinks.append(PrometheusSink(folder, monitor_config))
        if prometheus.pushgateway:
            sinks.append(PushgatewaySink(folder, monitor_config))
    return Sinks([*sinks, *(_own_sink(name) for name in monitor_config.sinks)])


def _own_sink(name: str) -> Sink:
    from moe_dist.models.registry import Registry

    sink = Registry[Callable[[], Sink]]("monitor.sinks", "sink").resolve(name)()
    if not isinstance(sink, Sink):
        raise ValueError(f"monitor.sinks={name}: a subclass of moe_dist.monitor.sinks.Sink is needed")
    return sink
