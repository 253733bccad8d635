"""What the allocator says of one training step on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from moe_dist.config import Config
from moe_dist.parallel.engines.registry import build_engine
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.build import build_model
from moe_dist.train.loss import head_cross_entropy

_FORWARD_DONE = "forward done"


def measured_step(config: Config, mesh: Mesh | None = None) -> tuple[int, int]:
    """Bytes kept from forward to backward, and the peak of the step, both above what is there between steps: of one
    process, or of this rank of `mesh`, on which gradients that are sharded are not there between steps."""
    mesh = mesh or Mesh.single()
    model = build_model(config, mesh)
    engine = build_engine(model, config, mesh)
    model.gradient_checkpointing_enable(config.train.gradient_checkpointing)
    model.train()
    shape = config.train.per_device_train_batch_size, config.data.max_seq_length
    ids = torch.randint(0, config.model.vocab_size, shape)
    documents = torch.zeros(shape, dtype=torch.int64) if config.data.document_mask else None
    positions = torch.arange(shape[1])[None].expand(shape).contiguous()

    def loss_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return head_cross_entropy(hidden, weight, ids, chunk_tokens=config.train.loss_chunk_tokens)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.bf16):
            return model(ids, position_ids=positions, document_ids=documents, head_function=loss_of)

    def step() -> None:
        engine.zero_grad()
        for left in reversed(range(config.train.gradient_accumulation_steps)):
            engine.before_backward(left == 0)
            made = loss()
            with record_function(_FORWARD_DONE):
                pass
            engine.backward(made)
            del made
        engine.reduce()
        engine.norm()
        engine.step(1e-3)

    step()
    engine.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    kept, peak = kept_and_peak(profiled)
    assert peak > kept > 0
    return kept, peak


def kept_and_peak(profiled: Any) -> tuple[int, int]:
    """Of a profile with memory. Kept is 0 where nothing says that the forward pass was done."""
    events: list[Any] = []
    waiting = list(profiled.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        events.append(event)
        waiting.extend(event.children)
    now = kept = peak = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        if event.tag.name == "Allocation":
            now += event.extra_fields.alloc_size
            peak = max(peak, now)
        elif event.name == _FORWARD_DONE:
            kept = now
    return kept, peak
