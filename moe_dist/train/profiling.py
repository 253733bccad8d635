"""`moe-dist profile`: a few real steps under torch.profiler, made into one page. Trains nothing that is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from moe_dist.config import Config
from moe_dist.data.packing import PreferenceDataset
from moe_dist.models.counts import flops_per_token
from moe_dist.monitor.rank_facts import PHASE_KEYS
from moe_dist.monitor.report.profile_page import Operator, PartTime, Profile, RankProfile, write_page
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.engines.optimizer import local
from moe_dist.parallel.engines.registry import build_engine
from moe_dist.parallel.engines.replicated import ReplicatedEngine
from moe_dist.parallel.flight import Trace
from moe_dist.parallel.layout import layers_by_pp_rank
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.state_bytes import state_bytes
from moe_dist.parallel.status import Status
from moe_dist.train.balance import Balancer
from moe_dist.train.build import build_datasets, build_loader, build_model
from moe_dist.train.profiler_ranges import REST, Part, Ranges, entered, saved_for_backward
from moe_dist.train.run_summary import layout_lines, sentence
from moe_dist.train.schedule import learning_rate
from moe_dist.train.step import TrainStep

WARM_UP = 3
"""Steps before the profiled ones: allocators, caches and optimizer state."""
TOP = 15


@dataclass
class _Run:
    """What training needs, without a run folder, logs and checkpoints."""

    config: Config
    mesh: Mesh

    def __post_init__(self) -> None:
        config, mesh = self.config, self.mesh
        self.clock = Clock(mesh.device, Status())
        samples = build_datasets(config).train
        if isinstance(samples, PreferenceDataset) and config.dpo_reference == "start":
            samples.reference = np.zeros((samples.num_pairs, 2))  # it takes as long whatever it is
        self.loader = build_loader(config, samples, mesh)
        self.model = build_model(config, mesh, self.clock)
        self.engine = build_engine(self.model, config, mesh)
        self.balancer = Balancer(self.model, mesh, config.balance.bias_update_rate)
        arguments = (self.model, mesh, self.engine, self.balancer, config, self.clock.status)
        self.train = TrainStep(*arguments)
        self.number = 0

    def look(self) -> Trace:
        """Of messages from now on, on the CPU: on CUDA nobody on the host sees when they land."""
        trace = self.clock.trace = Trace()
        if isinstance(self.engine, ReplicatedEngine):
            self.engine.look(trace)
        return trace

    def step(self) -> int:
        """One optimizer step; returns the tokens of the global batch."""
        status = self.clock.status
        status.at("waiting for data", step=self.number + 1)
        batches = self.loader.next_step()
        rate = learning_rate(self.config.optimizer, self.number, None, 0.0)
        result = self.train(batches, self.number, rate)
        self.number += 1
        status.at("agreeing on the next step")
        self.mesh.barrier()  # as the trainer's own agreement: every step begins together
        return result.num_tokens


def run_profile(
    config: Config, mesh: Mesh, steps: int, compute: bool, memory: bool, folder: Path
) -> tuple[Profile, Path] | None:
    """Profile on every rank and write `profile.html` into `folder`; on rank 0 the profile and where its page is,
    elsewhere None. `compute`: where the time of `steps` steps goes; `memory`: what a step keeps for backward.
    """
    steps = steps if compute else 0
    run = _Run(config, mesh)
    try:
        cuda = mesh.device.type == "cuda"
        for _ in range(WARM_UP):
            tokens_per_step = run.step()
        saved, peak = _measure_memory(run) if memory else ({}, 0)
        run.clock.take()
        run.clock.take_traffic()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
        parts: dict[tuple[Part, str], float] = {}
        # One profile per step keeps the numbers of autograd nodes apart, and memory bounded.
        phases = dict.fromkeys(PHASE_KEYS, 0.0)
        trace = run.look() if steps and not cuda else None
        operators: dict[str, Operator] = {}
        with entered(run.model, run.clock) as ranges:
            for _ in range(steps):
                ranges.forget()
                mesh.barrier()
                with profile(activities=activities, acc_events=True) as profiler:
                    run.clock.status.take()
                    run.step()
                    if cuda:
                        torch.cuda.synchronize()
                    taken = run.clock.status.take()
                for key, phase in PHASE_KEYS.items():
                    phases[key] += taken[phase] / steps
                _add_parts(parts, ranges, profiler, cuda, steps)
                _add_operators(operators, profiler, cuda, steps)
    finally:
        run.loader.close()
    if not cuda:  # what no range holds: loss, masks, positions; so that parts add up to the phases
        inside = phases["computing"] + phases["all_to_all"]
        parts[REST, "forward"] = max(0.0, inside - sum(parts.values()))
    pp_rank = mesh.layout.coordinates(mesh.rank)[0]
    mine = RankProfile(
        rank=mesh.rank,
        phases=phases,
        parts=[PartTime(part.layer, part.name, direction, time) for (part, direction), time in parts.items()],
        operators=sorted(operators.values(), key=lambda one: -one.seconds)[:TOP],
        sent_bytes=run.clock.take_traffic().sent_bytes // max(1, steps),
        state=run.engine.held_bytes(),
        predicted=state_bytes(config, mesh.layout)[pp_rank],
        saved=[(part.layer, part.name, size) for part, size in saved.items()],
        peak_bytes=peak,
        layers=[layer for stage in layers_by_pp_rank(config)[pp_rank] for layer in stage],
        overlap=[] if trace is None else trace.take(steps),
    )
    ranks = mesh.from_all(mine)
    if mesh.rank != 0:
        return None
    result = Profile(
        sentence=sentence(config, mesh.layout, mesh.device.type),
        layout=layout_lines(mesh.layout, config.model.num_experts),
        steps=steps,
        tokens_per_step=tokens_per_step,
        flops_per_token=flops_per_token(config.model, config.data.max_seq_length),
        device=mesh.device.type,
        ranks=ranks,
        with_compute=compute,
        with_memory=memory,
    )
    path = folder / "profile.html"
    write_page(result, path)
    return result, path


def _add_parts(parts: dict[tuple[Part, str], float], ranges: Ranges, profiler: Any, cuda: bool, steps: int) -> None:
    for key, seconds in ranges.seconds(profiler.events(), cuda).items():
        parts[key] = parts.get(key, 0.0) + seconds / steps


def _add_operators(operators: dict[str, Operator], profiler: Any, cuda: bool, steps: int) -> None:
    for one in profiler.key_averages():
        if one.key.startswith(("moe_dist/", "ProfilerStep", "autograd::engine")):
            continue
        seconds = (one.self_device_time_total if cuda else one.self_cpu_time_total) / 1e6 / steps
        before = operators.get(one.key, Operator(one.key, 0.0, 0.0))
        operators[one.key] = Operator(one.key, before.calls + one.count / steps, before.seconds + seconds)


def _measure_memory(run: _Run) -> tuple[dict[Part, int], int]:
    """One more step: bytes saved for backward by part at the end of the first forward pass, and on CUDA the peak and a
    snapshot of the allocator, `profile-memory-rank-N.pickle` for pytorch.org/memory_viz.
    """
    owned = [local(parameter.detach()) for parameter in run.model.parameters()]
    with (
        entered(run.model, run.clock) as ranges,
        _cuda_history(run) as peak,
        saved_for_backward(ranges, owned) as saved,
    ):
        found: dict[Part, int] = {}
        backward = run.engine.backward

        def first_backward(loss: torch.Tensor) -> None:
            found.update(found or saved())
            backward(loss)

        run.engine.backward = first_backward  # type: ignore[method-assign]
        try:
            run.step()
        finally:
            del run.engine.backward  # the method of its class again
        found = found or saved()  # a pipeline goes backward by itself: all its micro-batches
    return found, peak()


@contextmanager
def _cuda_history(run: _Run) -> Iterator[Any]:
    if run.mesh.device.type != "cuda":
        yield lambda: 0
        return
    torch.cuda.reset_peak_memory_stats(run.mesh.device)
    torch.cuda.memory._record_memory_history()
    yield lambda: torch.cuda.max_memory_allocated(run.mesh.device)
    folder = run.config.train.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._dump_snapshot(str(folder / f"profile-memory-rank-{run.mesh.rank}.pickle"))
    torch.cuda.memory._record_memory_history(enabled=None)
