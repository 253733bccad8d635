"""What seeing every expert costs: the collector, every sink and a Prometheus scrape, in CPU milliseconds of rank 0.

    python tools/bench/monitor.py [--step-seconds 1.0] [--logging-steps 10]

`add` runs once a step, `take` and the sinks once per logging interval, all in the training thread; their sum per step
is given as a share of `--step-seconds`. A scrape runs in its own thread, whenever a Prometheus asks. CPU time of the
whole process, so that a busy machine changes little; the best of five rounds. `--domains N`: with so many named sources
of data, whose counting in the layers is measured too, against the time of a whole layer.

Not covered: the reduction over ranks (one tensor of layers x (experts * (2 + domains) + 6) float64, and a row per
rank), diagnosis, phases, the watchdog, slow disks: `monitor_ranks.py` beside this measures all of it on two ranks that
train.
"""

from __future__ import annotations

import argparse
import io
import random
import tempfile
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from moe_dist.config import BalanceConfig, ModelConfig, MonitorConfig, PrometheusConfig
from moe_dist.models.auxiliary import LoadBalance, LoadFacts
from moe_dist.models.context import RoutingContext
from moe_dist.models.moe import MoE
from moe_dist.models.router import Routing
from moe_dist.monitor.collector import Collector
from moe_dist.monitor.health.rules import Health
from moe_dist.monitor.records import RunInfo, TrainRecord
from moe_dist.monitor.sinks import ConsoleSink, JsonlSink, Sink, TensorBoardSink
from moe_dist.monitor.sinks.prometheus import PrometheusSink

SIZES = ((16, 8), (48, 128), (94, 128))
ROUNDS = 5
TOKENS = 4096
INFO = RunInfo("bench", [], 1, 1, 1, "model: {}\n", "bench", 1, "cpu")


def best(call: Callable[[], object]) -> float:
    """CPU milliseconds of the fastest of some rounds: what the work costs when nothing is in its way."""
    times = []
    for _ in range(ROUNDS):
        before = time.process_time()
        call()
        times.append(time.process_time() - before)
    return 1e3 * min(times)


def record(step: int, collector: Collector) -> TrainRecord:
    fields = {"step": step, "max_steps": 1000, "epoch": 0.1, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0}
    fields |= {"tokens": 1000 * step, "tokens_per_second": 1e5, "step_seconds": 1.0, "all_to_all_share": 0.1}
    fields |= {"data_wait_share": 0.0, "skipped_steps": 0, "elapsed_seconds": 1.0, "remaining_seconds": 1.0}
    return TrainRecord(**fields, memory_bytes=1, layers=collector.take())  # type: ignore[arg-type]


def count_domains(experts: int, domains: int) -> tuple[float, float]:
    """CPU milliseconds of a layer's auxiliary losses and counts of TOKENS tokens, top-8: without domains and with."""
    top_k = min(8, experts)
    logits_TE = torch.randn(TOKENS, experts)
    ids_TK = logits_TE.topk(top_k).indices
    routing = Routing(torch.ones(TOKENS, top_k), ids_TK, logits_TE.softmax(-1), logits_TE)
    costs = []
    for number in (0, domains):
        balance = LoadBalance(BalanceConfig(), experts, top_k)
        balance.facts = LoadFacts.zeros(experts, torch.device("cpu"), number)
        context = RoutingContext(domain_ids_BS=torch.randint(max(1, number), (1, TOKENS), dtype=torch.uint8))
        call = partial(balance.losses, routing, 1, context)
        call()
        costs.append(best(call))
    return costs[0], costs[1]


def layer_milliseconds(experts: int) -> float:
    """CPU milliseconds of a layer, forward and backward, for TOKENS tokens of width 512, experts of 256."""
    config = ModelConfig(hidden_size=512, moe_intermediate_size=256, num_experts=experts)
    config.num_experts_per_tok = min(8, experts)
    layer = MoE(config, BalanceConfig(), 0)
    layer.experts.initialize(lambda expert: expert, 0.02)
    x_BSD = torch.randn(1, TOKENS, 512, requires_grad=True)
    layer(x_BSD).sum().backward()
    return best(lambda: layer(x_BSD).sum().backward())


def measure(layers: int, experts: int, step_seconds: float, logging_steps: int, domains: int) -> None:
    """Print one size."""
    collector = Collector(range(layers), experts, 2, "cpu", num_domains=domains)
    facts = {layer: LoadFacts.zeros(experts, torch.device("cpu"), domains) for layer in range(layers)}
    for one in facts.values():
        one.pairs_E += torch.tensor([random.randrange(10**6, 10**9) for _ in range(experts)])
        one.tokens += one.pairs_E.sum() // 2
        one.sums += 1.1e9
        if one.pairs_NE is not None:
            one.pairs_NE += torch.randint(10**6, 10**9, one.pairs_NE.shape)
    print(f"\n{layers} x {experts}" + (f", {domains} domains" if domains else ""))
    per_step, per_interval = best(lambda: collector.add(facts)), best(collector.take)
    print(f"  {'add':<13} {per_step:8.2f} ms a step\n  {'take':<13} {per_interval:8.2f} ms an interval")
    collector.add(facts)
    shown = record(1, collector)
    health = best(lambda: Health().observe(shown.layers))
    print(f"  {'health':<13} {health:8.2f} ms an interval")
    per_interval += health
    with tempfile.TemporaryDirectory() as folder:
        prometheus = PrometheusSink(folder, MonitorConfig(prometheus=PrometheusConfig(port=0)))
        sinks: list[Sink] = [ConsoleSink("plain", io.StringIO()), JsonlSink(Path(folder) / "metrics.jsonl")]
        for sink in (*sinks, TensorBoardSink(Path(folder) / "tb"), prometheus):
            sink.open(INFO)
            sink.train(shown)  # the first time imports, opens and allocates
            cost = best(lambda sink=sink: sink.train(shown))  # type: ignore[misc]
            per_interval += cost
            print(f"  {sink.name:<13} {cost:8.2f} ms an interval")
        if domains:
            plain, counted = count_domains(experts, domains)
            whole = layer_milliseconds(experts)
            ratio = f"{100 * (counted - plain) / whole:.2f} % of a layer's {whole:.0f} ms"
            print(f"  {'domains':<13} {counted - plain:8.2f} ms a layer and {TOKENS} tokens, {ratio}")
        share = (per_step + per_interval / logging_steps) / (1e3 * step_seconds)
        print(f"  {'together':<13} {100 * share:8.2f} % of a step of {step_seconds:g} s, logged every {logging_steps}")
        url = f"http://{prometheus.address}/metrics"
        scrape = best(lambda: urllib.request.urlopen(url).read())
        with urllib.request.urlopen(url) as reply:
            plain = len(reply.read())
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept-Encoding": "gzip"})) as reply:
            packed = len(reply.read())
        print(f"  {'scrape':<13} {scrape:8.2f} ms, {plain / 1e3:.0f} kB ({packed / 1e3:.0f} kB compressed)")
        prometheus.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-seconds", type=float, default=1.0, help="seconds of one training step")
    parser.add_argument("--logging-steps", type=int, default=10, help="monitor.logging_steps")
    parser.add_argument("--domains", type=int, default=0, help="named sources of data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for layers, experts in SIZES:
        measure(layers, experts, arguments.step_seconds, arguments.logging_steps, arguments.domains)


if __name__ == "__main__":
    main()
