"""Noise of experts: it belongs to the micro-batch and the expert, wherever and together with whatever they run.

Shape suffixes: S micro-batches, e experts held here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Sources:
    """The micro-batches whose rows lie here, in the order they have within every expert.

    `rows_SE` (S, e) int64: rows of each for each local expert; `seeds`: of each one's noise in this layer.
    """

    rows_SE: Tensor
    seeds: list[int]


def draw_seed() -> int:
    """A seed from torch's random state, which the pass has seeded by micro-batch and layer (`Stage.forward`)."""
    return int(torch.randint(2**62, (), device="cpu"))


def draws_noise(module: nn.Module) -> bool:
    """Whether it draws random numbers in training: it has a dropout module, or says so by `has_noise`."""
    return any(
        getattr(part, "has_noise", False) or (isinstance(part, _DropoutNd) and part.p > 0) for part in module.modules()
    )


def seed_noise(seed: int, device: torch.device) -> None:
    """Seed torch's random states of the CPU and of `device`.

    Not by `torch.manual_seed`: that keeps the caller's stack as text for each kind of accelerator that has not been
    used yet, which takes longer than a small layer.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Inside, seeds may be set: afterwards the random states of the CPU and of `device` are as before."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield


def refuse_stray_noise(experts: M) -> M:
    """The same module, whose forward raises ValueError when it moves torch's random state."""
    experts.register_forward_pre_hook(_remember)
    experts.register_forward_hook(_compare)
    return experts


def _remember(experts: Any, arguments: tuple[Any, ...]) -> None:
    experts.random_state = _random_state(arguments[0].device)


def _compare(experts: Any, arguments: tuple[Any, ...], out: Tensor) -> None:
    now = _random_state(arguments[0].device)
    if not all(map(torch.equal, now, experts.random_state)):
        raise ValueError(
            f"model.expert: {experts.kind} draws random numbers in a way that changes with the layout of ranks; "
            "write one expert (a subclass of Expert) that draws in training only, with nn.Dropout or, for noise of "
            "another kind, `has_noise = True`"
        )


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


_MULTIPLIERS = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
"""Of splitmix64 (https://doi.org/10.1145/2660193.2660195), as signed numbers."""


def _mixed(values: Tensor) -> Tensor:
    """int64, every bit of which depends on every bit of the value: the last step of splitmix64."""
    values = (values ^ (values >> 30 & 2**34 - 1)) * _MULTIPLIERS[1]
    values = (values ^ (values >> 27 & 2**37 - 1)) * _MULTIPLIERS[2]
    return values ^ (values >> 31 & 2**33 - 1)


def keep_mask(sources: Sources, held: Sequence[int], rows_RX: Tensor, probability: float) -> Tensor:
    """Which elements dropout keeps, (R, X) in the dtype of the rows: 1.0 with `1 - probability`, else 0.0.

    An element's number is a function of its micro-batch's seed, the expert's global id, its row's position among the
    rows that the expert has of that micro-batch, and the column: the same wherever and together with whatever it runs.
    Nothing waits for the device. `held`: global ids of the experts here.
    """
    device, num_rows = rows_RX.device, len(rows_RX)
    sizes = sources.rows_SE.t()  # in the order of rows: by expert, then by source
    num_experts, num_sources = sizes.shape
    seeds = torch.tensor(sources.seeds, dtype=torch.int64, device=device)
    experts = torch.tensor([*held], dtype=torch.int64, device=device)
    chunk_keys = _mixed(_mixed(seeds[None, :] * _MULTIPLIERS[0]) + experts[:, None]).flatten()
    ends = sizes.flatten().cumsum(0)
    chunk_of_row = torch.repeat_interleave(
        torch.arange(num_experts * num_sources, device=device), sizes.flatten(), output_size=num_rows
    )
    position = torch.arange(num_rows, device=device) - (ends - sizes.flatten())[chunk_of_row]
    row_keys = _mixed(chunk_keys[chunk_of_row] + position)
    columns = torch.arange(1, rows_RX.shape[1] + 1, device=device) * _MULTIPLIERS[0]
    numbers = _mixed(row_keys[:, None] + columns) >> 33 & 2**31 - 1
    return (numbers >= int(probability * 2**31)).to(rows_RX.dtype)
