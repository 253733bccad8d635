"""What Prometheus sees of a server: `moe_dist_serve_*`, in base units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from moe_dist.generate.engine import MoEInferenceEngine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class ServeMetrics(Collector):
    """Counters and histograms that requests add to, and what the engine says when it is asked."""

    def __init__(self, engine: MoEInferenceEngine) -> None:
        self._engine = engine
        self.load: dict[int, list[int]] = {}
        """Tokens by layer and expert, as last reported."""
        self.registry = CollectorRegistry(auto_describe=False)
        kept: dict[str, Any] = {"registry": self.registry, "namespace": "moe_dist_serve"}
        self.requests = Counter("requests", "Requests by what was asked and status.", ["path", "status"], **kept)
        self.seconds = Histogram(
            "request_seconds", "From a request's first byte to its answer's last.", ["path"], buckets=_SECONDS, **kept
        )
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From queueing to the first token.", buckets=_SECONDS, **kept
        )
        self.next_token = Histogram(
            "time_per_output_token_seconds", "From a token to the next one.", buckets=_TOKEN_SECONDS, **kept
        )
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **kept)
        self.inference_tokens = Counter("inference_tokens", "Tokens of answers.", **kept)
        self.cancelled = Counter("cancelled_requests", "Whose client has gone, or that took too long.", **kept)
        self.registry.register(self)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        engine, name, occupied = self._engine, "moe_dist_serve_", self._engine.occupied
        yield GaugeMetricFamily(f"{name}live_requests", "Requests in the batch.", occupied.live)
        yield GaugeMetricFamily(f"{name}waiting_requests", "Requests in the queue.", occupied.waiting)
        yield GaugeMetricFamily(f"{name}cache_blocks", "Blocks of the cache that answers hold.", occupied.blocks)
        yield GaugeMetricFamily(f"{name}cache_blocks_max", "Blocks that there may be.", occupied.max_blocks)
        load = CounterMetricFamily(
            f"{name}expert_tokens", "Tokens that an expert got of served traffic.", labels=["layer", "expert"]
        )
        for layer, counts in self.load.items():
            for expert, count in enumerate(counts):
                load.add_metric([str(layer), str(expert)], count)
        yield load
        if (stats := engine.expert_cache_stats) is not None:
            yield CounterMetricFamily(f"{name}expert_cache_hits", "Experts that were there.", stats.hits)
            yield CounterMetricFamily(f"{name}expert_cache_misses", "Experts that were fetched.", stats.misses)
