"""Prometheus: a small web server that answers scrapes, and a client that pushes to a Pushgateway."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import os
import socket
import ssl
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from threading import Lock
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, Metric, push_to_gateway
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from moe_dist.config import MonitorConfig
from moe_dist.monitor.records import RunInfo, RunSummary, TrainRecord
from moe_dist.monitor.sinks.http_server import BoundedServer, guarded, read_token, tls_context
from moe_dist.monitor.sinks.prometheus_metrics import SnapshotSink

logger = logging.getLogger(__name__)

TARGETS = "targets.json"
TRIES = 100
"""Ports looked at, from the configured one on."""
FRESH = 600.0
"""Seconds for which /healthz holds a logged step for a sign of health; checkpoints and evaluations are shorter."""
PUSH_SECONDS = 5.0
"""Longest wait for a Pushgateway."""
RETRY_SECONDS = 60.0
"""After a push that failed, this long without another: a gateway that is away must not slow training."""


class _RunSink(SnapshotSink):
    """A snapshot with a registry of its own: `prometheus_client`'s global one is never touched."""

    def __init__(self, output_dir: Path | str, config: MonitorConfig) -> None:
        super().__init__(config.logging_steps, config.prometheus.per_expert)
        self.output_dir, self.config = Path(output_dir), config.prometheus
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self.metrics)

    @property
    def run_name(self) -> str:
        """Label `run` of everything scraped or pushed: the name of the run folder, and the id of the run."""
        return self.snapshot.info.label if self.snapshot.info else self.output_dir.resolve().name


class _Labelled(Collector):
    """What a registry has, every sample with these labels."""

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        self.registry, self.labels = registry, labels

    def collect(self) -> Iterator[Metric]:
        for family in self.registry.collect():
            family.samples = [sample._replace(labels=self.labels | sample.labels) for sample in family.samples]
            yield family


class PrometheusSink(_RunSink):
    """Serves /metrics from `open` to `close`, and tells Prometheus where by `targets.json` in the run folder.

    /metrics?label=run gives every sample the label `run`, for discovery that cannot know it.
    /healthz says how old the last logged step is, with status 503 before the first and when it is too old.

    `targets.json` is a target list for `file_sd_configs`. A run that ended as planned leaves it empty; after any
    other end it stays, so that Prometheus sees a target that does not answer.
    """

    name = "Prometheus"

    def __init__(self, output_dir: Path | str, config: MonitorConfig) -> None:
        super().__init__(output_dir, config)
        self.folder = self.output_dir  # of targets.json
        self.address = ""
        self._server: BoundedServer | None = None
        access = self.config
        self._token = None if access.bearer_token is None else read_token(access.bearer_token)
        self._tls = None
        if access.tls_certificate is not None and access.tls_key is not None:
            self._tls = tls_context(access.tls_certificate, access.tls_key)
        self._pages: dict[tuple[str, bool, bool], bytes] = {}
        self._shown: object = None
        """The snapshot that `_pages` show."""
        self._lock = Lock()

    def open(self, info: RunInfo) -> None:
        super().open(info)
        wanted, tls = self.config.port or 0, self._tls
        metrics: WSGIApplication = self._metrics if self._token is None else guarded(self._metrics, self._token)
        self._server = self._listen(
            wanted, lambda env, start: (self._health if env["PATH_INFO"] == "/healthz" else metrics)(env, start), tls
        )
        self._server.start()
        port, scheme = self._server.server_port, "https" if tls else "http"
        self.address = address_of(self.config.host, port)
        if wanted not in (0, port):
            logger.warning("port %d is taken; Prometheus metrics are at %s://%s/metrics", wanted, scheme, self.address)
        else:
            logger.info("Prometheus metrics are at %s://%s/metrics", scheme, self.address)
        labels = {"run": self.run_name} | ({"__scheme__": scheme} if tls else {})
        self._write_targets([{"targets": [self.address], "labels": labels}])

    def close(self) -> None:
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        if self.snapshot.finished:
            self._write_targets([])

    def _metrics(self, asked: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Written once for a snapshot, whoever asks how often."""
        if asked["REQUEST_METHOD"] != "GET" or asked["PATH_INFO"] != "/metrics":
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"GET /metrics or /healthz\n"]
        encode, kind = choose_encoder(asked.get("HTTP_ACCEPT", ""))
        packed = "gzip" in asked.get("HTTP_ACCEPT_ENCODING", "")
        labelled = "label=run" in asked.get("QUERY_STRING", "").split("&")
        with self._lock:
            if self._shown is not self.snapshot:
                self._shown = self.snapshot
                self._pages.clear()
            if (kind, packed, labelled) not in self._pages:
                text = encode(_Labelled(self.registry, {"run": self.run_name}) if labelled else self.registry)
                self._pages[kind, packed, labelled] = gzip.compress(text, 1) if packed else text
            page = self._pages[kind, packed, labelled]
        start_response("200 OK", [("Content-Type", kind), *([("Content-Encoding", "gzip")] if packed else [])])
        return [page]

    def _health(self, asked: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        seen = self.snapshot
        age = time.time() - seen.train_time
        text = f"step {seen.train.step} was logged {age:.0f} s ago" if seen.train else "no step was logged yet"
        start_response("200 OK" if age <= FRESH else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [f"{text}\n".encode()]

    def _listen(self, first: int, app: WSGIApplication, tls: ssl.SSLContext | None) -> BoundedServer:
        """A server on the first free port from `first` on. Raises OSError."""
        last = min(first + TRIES - 1, 65535)
        for port in range(first, last + 1):
            try:
                return BoundedServer(self.config.host, port, app, tls)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or port == last:
                    raise
        raise AssertionError("the last port either works or raises")

    def _write_targets(self, targets: list[dict[str, object]]) -> None:
        # Replaced in one move: Prometheus reads the file whenever it likes.
        self.output_dir.mkdir(parents=True, exist_ok=True)
        temporary = self.output_dir / f".{TARGETS}.tmp"
        temporary.write_text(json.dumps(targets, indent=1) + "\n")
        os.replace(temporary, self.output_dir / TARGETS)


def address_of(host: str, port: int) -> str:
    """Where a Prometheus on another machine finds this one."""
    if host in ("", "0.0.0.0", "::"):
        host = socket.gethostname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class PushgatewaySink(_RunSink):
    """Pushes every record of training and the end to a Pushgateway, under job `moe_dist` and the run's name.

    A push that fails is one warning; it is tried again later, without another word until one has worked.
    """

    name = "Pushgateway"

    def __init__(self, output_dir: Path | str, config: MonitorConfig) -> None:
        super().__init__(output_dir, config)
        self._failing, self._not_before = False, 0.0

    def train(self, record: TrainRecord) -> None:
        super().train(record)
        if time.monotonic() >= self._not_before:
            self._push()

    def summary(self, summary: RunSummary) -> None:
        super().summary(summary)
        self._push()

    def _push(self) -> None:
        gateway = self.config.pushgateway or ""
        key = {"run": self.run_name, "instance": socket.gethostname()}
        try:
            push_to_gateway(gateway, "moe_dist", self.registry, key, PUSH_SECONDS)
        except (OSError, HTTPException, ValueError) as error:  # away, refusing, or no such address
            if not self._failing:
                logger.warning("no push to the Pushgateway %s (%s); trying again later", gateway, error)
            self._failing, self._not_before = True, time.monotonic() + RETRY_SECONDS
        else:
            self._failing = False
