"""How many parameters and how much arithmetic a model is, from its configuration alone: no torch, no memory.

Convention for `active`, the one behind the names: every weight one token passes through, with the embedding
and the output head counted whole, the router counted, and K of E experts per layer. So counted, the published
models come out at their published figures: Qwen3-30B-A3B 30.53B / 3.35B, Qwen3-235B-A22B 235.09B / 22.19B,
Qwen3-Coder-480B-A35B 480.15B / 35.47B, Mixtral-8x7B 46.70B / 12.88B (total / active).

Counts are of the built-in `topk` router and `swiglu` expert; a class of your own may have more.
Letters: V vocab_size, D hidden_size, H query heads, G key-value heads, C head width, E experts, K experts per
token, F moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_dist.config import ModelConfig


class Split(Protocol):
    """How a model is divided: what `per_rank` needs of a `parallel.layout.Layout`, which is a floor above."""

    @property
    def pp_size(self) -> int: ...

    @property
    def ep_size(self) -> int: ...


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, by part. The parts add up to `total`."""

    embedding: int
    """embed_tokens, V x D."""
    head: int
    """lm_head, V x D; 0 when it shares the embedding's weights."""
    attention: int
    """q, k, v and o projections of all layers, with biases if there are any; without their norms."""
    experts: int
    """All routed experts of all layers."""
    shared_experts: int
    """Experts that every token passes through."""
    router: int
    """Router weights of all layers, E x D each."""
    dense_mlp: int
    """SwiGLU of the layers without experts."""
    norms: int
    """Block norms, query and key norms, final norm."""
    per_expert: int
    """One routed expert of one layer, 3 x D x F."""
    active_experts: int
    """Routed experts of all layers that one token goes to."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.experts

    @property
    def active(self) -> int:
        """Parameters one token uses; the convention is in the module's docstring."""
        return self.dense + self.active_experts

    @property
    def dense(self) -> int:
        """Everything but the routed experts: what expert parallelism does not split."""
        parts = (self.embedding, self.head, self.attention, self.shared_experts, self.router)
        return sum(parts) + self.dense_mlp + self.norms


@dataclass(frozen=True)
class RankCounts:
    """Parameters on each rank of one place in the pipeline; all ranks of a place hold equally many.

    `stage` is the place (a rank's `pp` coordinate), `layers` the global numbers of the layers there.
    """

    stage: int
    layers: tuple[int, ...]
    dense: int
    experts: int

    @property
    def total(self) -> int:
        """All parameters of one rank."""
        return self.dense + self.experts


def _block(model: ModelConfig, layer: int) -> tuple[int, int, int, int, int, int]:
    """(attention, experts, shared_experts, router, dense_mlp, norms) of one block."""
    D, C = model.hidden_size, model.head_size
    q_width, kv_width = model.num_attention_heads * C, model.kv_heads * C
    attention = 2 * D * q_width + 2 * D * kv_width
    if model.attention_bias:
        attention += q_width + 2 * kv_width + D
    norms = 2 * D + (2 * C if model.qk_norm else 0)
    if not model.has_experts(layer):
        return attention, 0, 0, 0, 3 * D * model.intermediate_size, norms
    experts = model.num_experts * 3 * D * model.moe_intermediate_size
    shared = 3 * D * model.shared_expert_intermediate_size
    return attention, experts, shared, model.num_experts * D, 0, norms


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Parameters of the whole model, by part."""
    V, D = model.vocab_size, model.hidden_size
    blocks = [_block(model, layer) for layer in range(model.num_hidden_layers)]
    attention, experts, shared, router, dense_mlp, norms = (sum(part) for part in zip(*blocks, strict=True))
    per_expert = 3 * D * model.moe_intermediate_size
    return ParameterCounts(
        embedding=V * D,
        head=0 if model.tie_word_embeddings else V * D,
        attention=attention,
        experts=experts,
        shared_experts=shared,
        router=router,
        dense_mlp=dense_mlp,
        norms=norms + D,
        per_expert=per_expert if model.num_experts else 0,
        active_experts=len(model.moe_layers) * model.num_experts_per_tok * per_expert,
    )


def per_rank(model: ModelConfig, layout: Split, places: Sequence[Sequence[range]] | None = None) -> list[RankCounts]:
    """What each rank holds, one entry per place in the pipeline: experts split over ep, the rest replicated.

    `places`: the layers of each place, as one or several stages; default: one stage each, as `split_layers`
    has it. The embedding is on the first stage, final norm and head on the last (tied weights: on both).
    Raises ValueError when there are more stages than layers or ep_size does not divide the experts.
    """
    places = places or [[layers] for layers in split_layers(model, layout.pp_size)]
    if model.moe_layers and model.num_experts % layout.ep_size:
        raise ValueError(f"ep_size={layout.ep_size}: must divide num_experts={model.num_experts}")
    V, D = model.vocab_size, model.hidden_size
    counts = []
    for place, stages in enumerate(places):
        layers = tuple(layer for stage in stages for layer in stage)
        blocks = [_block(model, layer) for layer in layers]
        experts = sum(block[1] for block in blocks)
        dense = sum(sum(block) for block in blocks) - experts
        first, last = 0 in layers, model.num_hidden_layers - 1 in layers
        tied_here = model.tie_word_embeddings and first and last
        dense += V * D * (first + last - tied_here) + D * last
        counts.append(RankCounts(place, layers, dense, experts // layout.ep_size))
    return counts


def split_layers(model: ModelConfig, num_stages: int) -> list[range]:
    """Consecutive layers of each pipeline stage, such that the slowest stage is as fast as can be.

    Time is counted in weights that multiply one token: attention, K of E experts, router, shared experts or the
    dense SwiGLU, and on the last stage the head. Among equally fast splits the largest stage is as small as
    can be, in parameters: there the embedding counts as well. Raises ValueError for more stages than layers.
    """
    num_layers = model.num_hidden_layers
    if num_stages > num_layers:
        raise ValueError(f"pp_size={num_stages}: at most num_hidden_layers={num_layers}")
    V, D = model.vocab_size, model.hidden_size
    times, sizes = [], []
    for layer in range(num_layers):
        attention, experts, shared, router, dense_mlp, norms = _block(model, layer)
        active = experts * model.num_experts_per_tok // model.num_experts if experts else 0
        times.append(attention + active + shared + router + dense_mlp)
        sizes.append(attention + experts + shared + router + dense_mlp + norms)
    times[-1] += V * D
    sizes[0] += V * D
    sizes[-1] += V * D
    _, slowest = fairest_split(times, times, sum(times), num_stages)
    stages, _ = fairest_split(sizes, times, slowest, num_stages)
    return stages


def fairest_split(costs: list[int], times: list[int], limit: int, num_stages: int) -> tuple[list[range], int]:
    """The split into consecutive stages whose largest sum of `costs` is smallest, with no stage's sum of `times` above
    `limit`; and that sum. There must be one.
    """
    count = len(costs)
    cost_to, time_to = ([sum(values[:end]) for end in range(count + 1)] for values in (costs, times))
    # best[end] = (largest sum, starts of the stages) for the layers before `end`, in so many stages as rounds so far
    best: list[tuple[int, tuple[int, ...]] | None] = [(0, ())] + [None] * count
    for _ in range(num_stages):
        after: list[tuple[int, tuple[int, ...]] | None] = [None] * (count + 1)
        for end in range(1, count + 1):
            for start in range(end):
                before = best[start]
                if before is None or time_to[end] - time_to[start] > limit:
                    continue
                largest = max(before[0], cost_to[end] - cost_to[start])
                if after[end] is None or largest <= after[end][0]:  # type: ignore[index]
                    after[end] = (largest, (*before[1], start))
        best = after
    found = best[count]
    assert found is not None
    ends = (*found[1][1:], count)
    return [range(start, end) for start, end in zip(found[1], ends, strict=True)], found[0]


def matmul_parameters(model: ModelConfig) -> int:
    """Active parameters that multiply a token: `active` without the embedding's look-up, norms and biases.

    The head counts whether or not it shares the embedding's weights.
    """
    counts = parameter_counts(model)
    q_width, kv_width = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    biases = model.num_hidden_layers * (q_width + 2 * kv_width + model.hidden_size) if model.attention_bias else 0
    head = model.vocab_size * model.hidden_size
    return counts.active - counts.embedding - counts.head + head - counts.norms - biases


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Floating-point operations of forward and backward for one token of a sequence of `seq_length` tokens.

        6 * N + 12 * L * H * C * S

    N = `matmul_parameters` (2 operations per weight forward, 4 backward), L layers, H heads of width C, S
    tokens. The attention term is that of the PaLM paper (Chowdhery et al. 2022, appendix B): scores and
    weighted sum, 2 products of 2*H*C*S operations forward and twice that backward. Causality and document
    masks are not credited, as is usual for model FLOP utilisation, and recomputation is not counted.
    """
    width = model.num_attention_heads * model.head_size
    return 6 * matmul_parameters(model) + 12 * model.num_hidden_layers * width * seq_length


def expert_share(model: ModelConfig, seq_length: int) -> float:
    """Part of `flops_per_token` that routed experts do, 0..1."""
    return 6 * parameter_counts(model).active_experts / flops_per_token(model, seq_length)
