"""Experts that do not fit: they stay in host memory or in files, and the busy ones are kept where the model computes.

Shape suffixes: R rows, D hidden, e experts held here.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from moe_dist.models.experts import Experts
from moe_dist.models.int8 import Int8Experts
from moe_dist.models.moe import MoE
from moe_dist.models.precision import full
from moe_dist.models.transformer import Transformer

CachePolicy = Literal["lru", "lfu"]
Key = tuple[int, int]
"""Layer, and expert as it is counted on this rank."""
Weights = dict[str, Tensor]
"""Tensors of one expert, each a stack of one: its parameters, or where they are int8 these and their scales."""


@dataclass
class ExpertCacheStats:
    """`hits`: experts that were there when tokens came; `prefetched`: of these, those that had been asked for ahead."""

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    bytes_loaded: int = 0

    @property
    def hit_rate(self) -> float:
        """From 0 to 1."""
        return self.hits / max(1, self.hits + self.misses)


class ExpertCache:
    """Takes the experts out of `model` and lets its layers get them from here.

    At most `max_bytes` of them stay on the device of the model: what has not been used for longest goes first
    (`lru`), or what has been used least often (`lfu`, ties by age). With a `folder` they are written into a file for
    each layer and read through the page cache; without, they stay in host memory. `prefetch`: while a layer computes,
    the experts are fetched that the router of the next layer would choose for what came into this one.

    Raises ValueError for experts that are not one stack of tensors, and for less room than one expert needs.
    """

    def __init__(
        self,
        model: Transformer,
        max_bytes: int,
        policy: CachePolicy = "lru",
        *,
        folder: str | Path | None = None,
        prefetch: bool = False,
    ) -> None:
        if policy not in ("lru", "lfu"):
            raise ValueError(f"cache_policy={policy}: lru or lfu")
        self.max_bytes, self.policy, self.stats = max_bytes, policy, ExpertCacheStats()
        self._here: OrderedDict[Key, Weights] = OrderedDict()
        self._uses: dict[Key, int] = {}
        self._bytes = self._largest = 0
        self._coming: dict[Key, Future[Weights]] = {}
        self._thread = ThreadPoolExecutor(1, "experts") if prefetch else None
        self._load: dict[int, Callable[[int], Weights]] = {}
        self._files = tempfile.TemporaryDirectory(dir=folder) if folder is not None else None
        layers = list(model.moe_layers())
        for moe in layers:
            self._take_over(moe)
        for moe, following in zip(layers, [*layers[1:], None], strict=True):
            if prefetch and following is not None:
                assert isinstance(moe.experts, CachedExperts)
                moe.router.register_forward_pre_hook(self._look_ahead(following))

    def get(self, key: Key) -> Weights:
        """An expert's weights, on the device."""
        self._uses[key] = self._uses.get(key, 0) + 1
        if key in self._here:
            self.stats.hits += 1
            self._here.move_to_end(key)
            return self._here[key]
        coming = self._coming.pop(key, None)
        if coming is not None:
            self.stats.hits += 1
            self.stats.prefetched += 1
            weights = coming.result()
        else:
            self.stats.misses += 1
            weights = self._load[key[0]](key[1])
        self._keep(key, weights)
        return weights

    def _keep(self, key: Key, weights: Weights) -> None:
        size = _bytes(weights)
        self.stats.bytes_loaded += size
        while self._here and self._bytes + size > self.max_bytes:
            oldest = next(iter(self._here))
            if self.policy == "lfu":
                oldest = min(self._here, key=lambda one: self._uses[one])  # of equals the one used longest ago
            self._bytes -= _bytes(self._here.pop(oldest))
        self._here[key] = weights
        self._bytes += size

    @torch.no_grad()
    def _take_over(self, moe: MoE) -> None:
        experts = moe.experts
        if not isinstance(experts, Experts | Int8Experts) or experts.draws_noise:
            raise ValueError(f"expert_cache_size_gb: experts of class {type(experts).__name__} are not one stack")
        if experts.is_adapted:
            raise ValueError(
                "expert_cache_size_gb: these experts have adapters beside them; moe-dist export --merge makes one model"
            )
        if experts.is_quantized:
            raise ValueError("expert_cache_size_gb: these experts are in few bits (lora.quantize); set it to null")
        tensors = (*experts.named_parameters(recurse=False), *experts.named_buffers(recurse=False))
        stacks = {name: tensor.detach() for name, tensor in tensors}
        device, one = next(iter(stacks.values())).device, sum(stack[0].nbytes for stack in stacks.values())
        self._largest = max(self._largest, one)
        if one > self.max_bytes:
            raise ValueError(f"expert_cache_size_gb={self.max_bytes / 2**30:g}: one expert needs {one / 2**30:g}")
        if self._files is None:
            host = {name: stack.cpu() for name, stack in stacks.items()}
            self._load[moe.layer] = lambda index: {
                name: stack[index : index + 1].to(device, copy=True) for name, stack in host.items()
            }
        else:
            file = Path(self._files.name) / f"layer-{moe.layer}.safetensors"
            save_file({name: stack.cpu().contiguous() for name, stack in stacks.items()}, file)
            mapped = safe_open(file, framework="pt")
            self._load[moe.layer] = lambda index: {
                name: mapped.get_slice(name)[index : index + 1].to(device) for name in stacks
            }
        moe.experts = CachedExperts(experts, moe.layer, self)  # type: ignore[assignment]

    def _look_ahead(self, following: MoE) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def fetch(router: nn.Module, arguments: tuple[Any, ...]) -> None:
            assert self._thread is not None
            logits = following.router.logits(full(arguments[0]))
            for stale in [key for key in self._coming if key[0] == following.layer]:
                del self._coming[stale]  # asked for in the pass before, and not used
            for expert in logits.topk(following.top_k, dim=-1).indices.unique().tolist():
                key = (following.layer, expert - following.experts.first_expert)
                is_ours = 0 <= key[1] < following.experts.num_local
                fits = (len(self._coming) + 1) * self._largest <= self.max_bytes
                if is_ours and fits and key not in self._here and key not in self._coming:
                    self._coming[key] = self._thread.submit(self._load[key[0]], key[1])

        return fetch


class CachedExperts(nn.Module):
    """Stands where `Experts` or `Int8Experts` stood: the same rows in and out, one expert after the other."""

    draws_noise = False

    def __init__(self, experts: Experts | Int8Experts, layer: int, cache: ExpertCache) -> None:
        super().__init__()
        self.first_expert, self.num_local, self.layer = experts.first_expert, experts.num_local, layer
        self.casts_rows = experts.casts_rows
        self._of = (experts.to("meta"), cache)  # in a tuple: no part of this module's state

    def forward(self, rows_RD: Tensor, rows_per_expert: Tensor) -> Tensor:
        experts, cache = self._of
        counts, out, at = rows_per_expert.tolist(), [], 0
        for index, count in enumerate(counts):
            if count:
                number = rows_per_expert.new_tensor([count])
                weights = cache.get((self.layer, index))
                out.append(functional_call(experts, weights, (rows_RD[at : at + count], number)))
                at += count
        return torch.cat(out) if out else rows_RD.new_empty(rows_RD.shape)


def _bytes(weights: Weights) -> int:
    return sum(tensor.nbytes for tensor in weights.values())
