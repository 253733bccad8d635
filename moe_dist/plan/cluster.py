"""Devices and the links between them: what a plan knows of a machine. One file format for a cluster that is bought, and
for one that was measured by `moe-dist plan --calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from moe_dist.config import ConfigError, Section, read_yaml
from moe_dist.config.sections.base import Fraction, NonNegativeFloat, Positive, PositiveFloat
from moe_dist.monitor.devices import PEAKS

GIB = 2**30


class Cluster(Section):
    """Devices of one kind on equal hosts. Bandwidths are bytes per second of one device in one direction."""

    name: str = "cluster"
    """For people."""
    gpu: str = "h100"
    """Device that says what the file leaves out, where no `--gpu` does: h100, h200, b200, a100, l40s or cpu."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What its devices are to the trainer."""
    memory_gb: PositiveFloat
    """Memory of a device in GB (1e9 bytes) that a process can have."""
    peak_bf16: PositiveFloat
    """Floating-point operations per second in bfloat16, dense."""
    peak_float32: PositiveFloat
    """In float32."""
    gemm_efficiency: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    """Share of the peak that large matrix products reach."""
    gemm_rows: NonNegativeFloat = 256.0
    """Rows at which a matrix product reaches half of that."""
    grouped_efficiency: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """The same for the grouped products of experts."""
    grouped_rows: NonNegativeFloat = 128.0
    """Rows of one expert at which they reach half of it."""
    attention_efficiency: Annotated[float, Field(gt=0.0, le=1.0)] = 0.45
    """Share of the peak of attention scores and sums."""
    memory_bandwidth: PositiveFloat
    """Of the device's own memory."""
    layer_overhead: NonNegativeFloat = 1e-3
    """Seconds that starting the kernels of a layer takes forward: about a hundred, ten microseconds each."""
    devices_per_host: Positive = 8
    """Devices of one host, joined by `link_bandwidth`."""
    link_bandwidth: PositiveFloat
    """Inside a host."""
    link_latency: NonNegativeFloat = 1e-5
    """Seconds of a collective inside a host, whatever its size."""
    network_bandwidth: PositiveFloat
    """Between hosts: a device's share of its host's network."""
    network_latency: NonNegativeFloat = 3e-5
    """Seconds of a collective between hosts."""
    link_efficiency: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    """Share of both bandwidths that collectives reach."""
    reduce_scatter_cost: PositiveFloat = 1.0
    """A reduce-scatter as multiples of an all-gather: gloo reduces all of it on every rank and keeps a part, 2."""
    overlap: Fraction = 0.8
    """Share of sharded reductions and gatherings that can hide behind computing; gloo hides nothing: 0."""
    slack: Fraction = 0.06
    """Share of the memory that allocators, libraries and fragmentation take."""
    storage_bandwidth: PositiveFloat = 2e9
    """Of checkpoint storage, for one host."""
    host_memory_gb: PositiveFloat = 1024.0
    """Of one host."""
    watts: NonNegativeFloat = 700.0
    """One device under load, with its share of the host."""
    price_per_hour: NonNegativeFloat | None = None
    """Money for one device and hour."""
    mtbf_hours: PositiveFloat = 50_000.0
    """Mean hours between failures of one device, with its share of host and network."""
    restart_seconds: NonNegativeFloat = 300.0
    """From a failure to the first step after it."""

    @property
    def memory(self) -> float:
        """Bytes that tensors of a run may take."""
        return self.memory_gb * 1e9 * (1 - self.slack)


# Peaks: moe_dist/monitor/devices.py. Memory, bandwidth, power, links: data sheets of NVIDIA (H100 SXM: 80 GB, 3.35
# TB/s, 700 W, NVLink 900 GB/s both ways; H200: 141 GB, 4.8 TB/s; B200 in DGX: 180 GB, 8 TB/s, 1000 W, NVLink 1.8
# TB/s; A100 SXM: 80 GB, 2.04 TB/s, 400 W, NVLink 600 GB/s; L40S: 48 GB, 864 GB/s, 350 W, PCIe 4.0 x16), memory as
# drivers report it. Networks: a 400 Gbit/s port for each device as in DGX H100 and B200, 200 Gbit/s as in DGX A100,
# 100 Gbit/s Ethernet for a host of eight L40S. A third of the host's power is added. Mean time between failures: 419
# interruptions in 54 days of 16,384 H100 (Llama 3, arXiv 2407.21783, section 3.3.4) are one in 50,700 device hours.
_DEVICES: dict[str, dict[str, Any]] = {
    "h100": {"peak": "H100", "memory_gb": 85.0, "memory_bandwidth": 3.35e12, "link_bandwidth": 450e9, "watts": 1000.0},
    "h200": {"peak": "H200", "memory_gb": 150.0, "memory_bandwidth": 4.8e12, "link_bandwidth": 450e9, "watts": 1000.0},
    "b200": {"peak": "B200", "memory_gb": 192.0, "memory_bandwidth": 8e12, "link_bandwidth": 900e9, "watts": 1400.0},
    "a100": {
        "peak": "A100",
        "memory_gb": 85.0,
        "memory_bandwidth": 2.04e12,
        "link_bandwidth": 300e9,
        "watts": 650.0,
        "network_bandwidth": 25e9,
    },
    "l40s": {
        "peak": "L40S",
        "memory_gb": 48.0,
        "memory_bandwidth": 8.64e11,
        "link_bandwidth": 32e9,
        "watts": 500.0,
        "network_bandwidth": 12.5e9 / 8,
        "link_latency": 2e-5,
    },
}
# One process on one core of a server, and hosts with two of them on 1 Gbit/s; `--calibrate` measures what is there.
_CPU: dict[str, Any] = {
    "memory_gb": 8.0,
    "peak_bf16": 1e11,
    "peak_float32": 8e10,
    "memory_bandwidth": 8e9,
    "layer_overhead": 2e-4,
    "gemm_efficiency": 0.7,
    "gemm_rows": 16.0,
    "grouped_efficiency": 0.6,
    "grouped_rows": 16.0,
    "attention_efficiency": 0.4,
    "device": "cpu",
    "devices_per_host": 2,
    "link_bandwidth": 1e9,
    "link_latency": 4e-4,
    "network_bandwidth": 6e7,
    "network_latency": 8e-4,
    "link_efficiency": 1.0,
    "overlap": 0.0,
    "reduce_scatter_cost": 2.0,
    "watts": 15.0,
    "host_memory_gb": 16.0,
    "storage_bandwidth": 3e8,
    "slack": 0.0,
}
DEVICES = (*_DEVICES, "cpu")


def cluster_of(device: str | None, path: Path | str | None = None) -> Cluster:
    """A cluster of one of DEVICES (None: the one that the file says), with what a file says otherwise.

    Raises ConfigError naming the key.
    """
    said = {} if path is None else read_cluster(path)
    if device is None:
        device = str(said.get("gpu", "h100"))
        if device not in DEVICES:
            raise ConfigError(f"{path}: gpu={device}: one of {', '.join(DEVICES)}")
    if device not in DEVICES:
        raise ConfigError(f"--gpu {device}: one of {', '.join(DEVICES)}")
    values: dict[str, Any] = {"network_bandwidth": 50e9}
    if device == "cpu":
        values = dict(_CPU)
    else:
        known = dict(_DEVICES[device])
        peak = PEAKS[known.pop("peak")]
        values |= {"peak_bf16": peak.bfloat16, "peak_float32": peak.float32} | known
    values |= {"name": device, "gpu": device} | said
    try:
        return Cluster.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path}: {key}={first['input']!r}: {first['msg']} (docs/planning.md lists the keys)"
        ) from None


def read_cluster(path: Path | str) -> dict[str, Any]:
    """What a cluster file says; raises ConfigError where it cannot be read or has another key."""
    values = read_yaml(Path(path))
    unknown = sorted(set(map(str, values)) - set(Cluster.model_fields))
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]}: no key of a cluster; there are {', '.join(Cluster.model_fields)}")
    return values
