"""Measures this machine: the keys of a cluster file, for `moe-dist plan --calibrate`. Torch is imported here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import grouped_mm

from moe_dist.config import BalanceConfig, ModelConfig
from moe_dist.models.transformer import Transformer

_ROWS = (16, 64, 256, 1024)
_SIZES = (512, 1024)
_EXPERTS = 8


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Median of a few, after one to warm up."""
    found = []
    for _ in range(rounds + 1):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def measured_device(device: torch.device) -> dict[str, float]:
    """Keys of a cluster file that are of one device: rates of products by rows, bandwidth, launches, attention."""
    keys: dict[str, float] = {"gemm_efficiency": 1.0, "grouped_efficiency": 1.0}
    for name, dtype in (("peak_float32", torch.float32), ("peak_bf16", torch.bfloat16)):
        rates = {rows: _gemm_rate(rows, dtype, device) for rows in _ROWS}
        keys[name] = max(rates.values())
        if dtype == torch.float32:
            keys["gemm_rows"] = _half_rows(rates)
            grouped = {rows: _grouped_rate(rows, dtype, device) for rows in _ROWS}
            keys["grouped_efficiency"] = min(1.0, max(grouped.values()) / keys[name])
            keys["grouped_rows"] = _half_rows(grouped)
            keys["attention_efficiency"] = min(1.0, _attention_rate(device) / keys[name])
    block = torch.randn(2**24, device=device)
    other = torch.empty_like(block)
    keys["memory_bandwidth"] = 2 * block.nbytes / seconds_of(lambda: other.copy_(block), device)
    keys["layer_overhead"] = _layer_overhead(device)
    return keys


def measured_links(device: torch.device) -> dict[str, float]:
    """Of the default process group, whose ranks are taken to be on a host each: seconds, and bytes per second.

    Collective.
    """
    small, large = torch.ones(1, device=device), torch.ones(2**21, device=device)
    latency = seconds_of(lambda: dist.all_reduce(small), device)
    size = dist.get_world_size()
    whole = seconds_of(lambda: dist.all_reduce(large), device, rounds=3)
    sent = 2 * large.nbytes * (size - 1) / size
    found = torch.tensor([latency, sent / max(whole - latency, 1e-9)], dtype=torch.float64)
    return {"network_latency": float(found[0]), "network_bandwidth": float(found[1]), "link_efficiency": 1.0}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gemm_rate(rows: int, dtype: torch.dtype, device: torch.device) -> float:
    x, weight = (torch.randn(*shape, device=device).to(dtype) for shape in ((rows, _SIZES[0]), _SIZES))
    return 2 * rows * _SIZES[0] * _SIZES[1] / seconds_of(lambda: x @ weight, device)


def _grouped_rate(rows: int, dtype: torch.dtype, device: torch.device) -> float:
    x = torch.randn(rows * _EXPERTS, _SIZES[0], device=device).to(dtype)
    weights = torch.randn(_EXPERTS, *_SIZES, device=device).to(dtype)
    ends = torch.arange(1, _EXPERTS + 1, device=device, dtype=torch.int32) * rows
    return 2 * len(x) * _SIZES[0] * _SIZES[1] / seconds_of(lambda: grouped_mm(x, weights, offs=ends), device)


def _attention_rate(device: torch.device) -> float:
    heads = torch.randn(2, 8, 256, 64, device=device)
    spent = seconds_of(lambda: F.scaled_dot_product_attention(heads, heads, heads), device)
    return 4 * heads.numel() * heads.shape[2] / spent


def _half_rows(rates: dict[int, float]) -> float:
    """Rows at which half of the best rate is reached, by rate = best * rows / (rows + half)."""
    best = max(rates.values())
    return max(0.0, statistics.median(rows * (best / rate - 1) for rows, rate in rates.items() if rate < best))


def _layer_overhead(device: torch.device) -> float:
    """Of a layer whose arithmetic takes no time."""
    model = ModelConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, moe_intermediate_size=32)
    tiny = Transformer(model, BalanceConfig())
    tiny.initialize(0)
    tiny.to(device).train()
    ids: Tensor = torch.zeros(1, 8, dtype=torch.int64, device=device)
    return seconds_of(lambda: tiny(ids), device) / model.num_hidden_layers
