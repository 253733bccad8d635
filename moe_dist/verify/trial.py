"""A few training steps on global batches that are hard on a trainer, and what comes of them in logical tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.data.batch import Batch, Pairs
from moe_dist.models.precision import in_dtype
from moe_dist.parallel.dtensor_layout import like_parameter, local_offset
from moe_dist.parallel.engines.optimizer import local
from moe_dist.parallel.engines.registry import build_engine
from moe_dist.parallel.mesh import Mesh
from moe_dist.train import schedule
from moe_dist.train.balance import Balancer
from moe_dist.train.build import build_model
from moe_dist.train.evaluation import evaluate
from moe_dist.train.placing import Placing
from moe_dist.train.step import TrainStep
from moe_dist.verify.features import Batches
from moe_dist.verify.injected_bugs import planted
from moe_dist.verify.scenarios import COMPARED, NUM_STEPS, Precision

ROWS = 2
RATES = {"float64": 1e-2, "float32": 1e-2, "bfloat16": 1e-3}
"""Learning rates. AdamW makes full steps out of gradients that are only rounding: in bfloat16 smaller ones."""
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}


def micro_batches(config: Config, count: int, step: int = 0, kind: Batches | None = None) -> list[Batch]:
    """`count` micro-batches of one global batch: uneven valid labels, packed documents, padding, one all padding; or
    with `kind.even` nothing of that.
    """
    kind = kind or Batches()
    vocabulary, length = config.model.vocab_size, config.data.max_seq_length
    batches = []
    for index in range(count):
        generator = torch.Generator().manual_seed(1000 * step + index)
        ids = torch.randint(0, vocabulary, (ROWS, length), generator=generator)
        labels = torch.randint(0, vocabulary, (ROWS, length), generator=generator)
        domains = None
        if kind.num_domains:
            domains = torch.randint(0, kind.num_domains, (ROWS, length), generator=generator, dtype=torch.uint8)
        if kind.even:
            sizes = (labels.numel(), labels.numel(), [index], index)
            pairs = _pairs(torch.zeros(ROWS, length, dtype=torch.int32)) if kind.pairs else None
            batches.append(Batch(ids, labels, None, None, *sizes, domain_ids=domains, pairs=pairs))
            continue
        # A different share of valid labels in each micro-batch: 1, 1/2, 1/3, ...
        labels[torch.rand(ROWS, length, generator=generator) > 1.0 / (index + 1)] = -100
        documents = torch.zeros(ROWS, length, dtype=torch.int32)
        cut = length // 3 + index % 3  # no micro-batch has the positions of the one before
        if not kind.pairs or index % 4 != 3:  # of preferences one pair here, two elsewhere, and none in padding
            documents[:, cut:] = 1
        if index % 3 == 1:
            documents[1, length // 2 :] = -1
        if index == 2:
            documents[:] = -1
        labels[documents < 0] = -100
        positions = torch.arange(length).expand(ROWS, length).clone()
        positions[:, cut:] -= cut
        num_valid, num_tokens = int((labels >= 0).sum()), int((documents >= 0).sum())
        pairs = _pairs(documents) if kind.pairs else None
        batches.append(Batch(ids, labels, positions, documents, num_valid, num_tokens, [index], index, domains, pairs))
    return batches


def _pairs(documents: Tensor) -> Pairs:
    """Preferences of which document p of the first row is the chosen and that of the second the rejected answer."""
    count = int(documents.max()) + 1
    sequences = 2 * documents.long() + torch.arange(ROWS)[:, None]
    return Pairs(sequences.masked_fill(documents < 0, 2 * count), torch.arange(count))


HELD_OUT = 99
"""Number of the step whose batch is evaluated."""
BUCKET_MB = 0.004
"""Gradients of the small models here still travel in many buckets, so that their order matters."""
_Piece = tuple[tuple[int, ...], tuple[int, ...], Tensor]
"""Part of a logical tensor: its whole shape, where the part begins, the part."""


class Trial:
    """Everything a training step needs, built for one rank."""

    def __init__(self, config: Config, mesh: Mesh, num_domains: int = 0) -> None:
        few = config.parallel.model_copy(update={"bucket_cap_mb": BUCKET_MB})
        config = config.model_copy(update={"parallel": few})
        self.config, self.mesh = config, mesh
        self.model = build_model(config, mesh)
        self.engine: Any = build_engine(self.model, config, mesh)
        self.balancer = Balancer(self.model, mesh, config.balance.bias_update_rate, num_domains)
        self.placing = Placing(config, mesh, self.model, self.engine, self.balancer, lambda text: None)
        copy_experts(self.placing)
        self.step = TrainStep(self.model, mesh, self.engine, self.balancer, config)
        self.start: dict[tuple[int, int], Tensor] = {}
        """By step and micro-batch: log-probabilities of its pairs under the first weights."""

    def share(self, batches: list[Batch]) -> list[Batch]:
        """This rank's micro-batches: number a * dp + r belongs to replica r, as in `GlobalLoader`."""
        return batches[self.mesh.dp_rank :: self.mesh.layout.dp_size]

    def global_batch(self, count: int, step: int, kind: Batches) -> list[Batch]:
        """This rank's share of that of `step`, with what the start says of it where that has been measured."""
        found = self.share(micro_batches(self.config, count, step, kind))
        if not self.start:
            return found
        return [one.with_reference(self.start[step, one.index]) for one in found]

    def measure_start(self, count: int, steps: Sequence[int], kind: Batches) -> None:
        """Of preferences whose reference is the start."""
        if self.step.dpo is None or self.config.dpo_reference != "start":
            return
        for step in steps:
            for batch in self.share(micro_batches(self.config, count, step, kind)):
                measured = self.step.dpo.measured(batch.to(self.mesh.device)).pairs
                assert measured is not None
                assert measured.reference is not None
                self.start[step, batch.index] = measured.reference

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logical tensors of the whole model, in host memory: this rank's pieces, those of its `ep` and `pp` peers, and
        of others only what none of these hold.
        """
        held, stacked = self.engine.held_parameters(), self.model.stacked_names()
        placed = {n: like_parameter(t.detach(), held[n], n in stacked, self.mesh) for n, t in tensors.items()}
        return whole_tensors(placed, self.mesh)

    def _of_all_stages(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of all ranks of a pipeline; no name may be on two of them."""
        parts = self.mesh.from_all(tensors, "pp")
        gathered = {name: tensor for part in parts for name, tensor in part.items()}
        assert len(gathered) == sum(map(len, parts))
        return gathered

    @property
    def weights(self) -> dict[str, Tensor]:
        with self.placing.at_home():
            return self.whole(dict(self.model.named_parameters()) | self.model.masters)

    @property
    def biases(self) -> dict[str, Tensor]:
        return self._of_all_stages({str(moe.layer): moe.router.bias_E.cpu().clone() for moe in self.model.moe_layers()})

    def loads(self) -> dict[str, Tensor]:
        """What every layer has recorded since the last step, of the whole global batch, in float64."""
        loads = {
            f"{layer}.{name}": tensor.to(torch.float64)
            for layer, facts in self.balancer.facts.items()
            for name, tensor in vars(facts).items()
            if tensor is not None
        }
        if loads:  # as one tensor: every sum of its own would have all ranks wait for each other
            side_by_side = torch.cat([tensor.flatten() for tensor in loads.values()])
            parts = self.mesh.sum_over("dp", side_by_side).cpu().split([tensor.numel() for tensor in loads.values()])
            loads = {name: part.view(loads[name].shape).clone() for name, part in zip(loads, parts, strict=True)}
        return self._of_all_stages(loads)

    @contextmanager
    def unclipped(self) -> Iterator[dict[str, Tensor]]:
        """Filled, by a step inside, with the gradients as they are before clipping."""
        seen: dict[str, Tensor] = {}
        norm = self.engine.norm

        def keep() -> Tensor:
            seen.update(self.whole(self.engine.gradients()))
            return norm()

        self.engine.norm = keep
        try:
            yield seen
        finally:
            self.engine.norm = norm


def copy_experts(placing: Placing) -> None:
    """Others than before on every rank, where experts may have copies: of the first layer 0 and 3, then 1 and 4, ...,
    so that all ranks come to own some, and none."""
    num_experts = placing.num_experts
    for_layer = {layer: placing.copied.get(layer) or (layer - 1, layer + 2) for layer in placing.layers}
    if placing.num_copies:
        placing.copy({layer: [(one + 1) % num_experts for one in before] for layer, before in for_layer.items()})


def move_experts(placing: Placing) -> None:
    """Every expert to the next rank of its group and to another place there (collective), where experts may move; and
    copies of others."""
    copy_experts(placing)
    if placing.placement is not None:
        slots, ep_size = placing.placement.slots, placing.mesh.layout.ep_size
        shift = {layer: len(of_slot) // ep_size + 1 for layer, of_slot in slots.items()}
        placing.placement.move({layer: [*of[shift[layer] :], *of[: shift[layer]]] for layer, of in slots.items()})


def whole_tensors(placed: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Logical tensors of the whole model out of every rank's parts, as `Trial.whole` gives them (collective)."""
    mine: dict[str, _Piece] = {}
    for name, tensor in placed.items():
        mine[name] = (tuple(tensor.shape), local_offset(tensor), local(tensor).detach().cpu().clone())
    pieces, rank, layout = mesh.from_all(mine), mesh.rank, mesh.layout
    _, edp, _ = layout.coordinates(rank)
    found: dict[str, Tensor] = {}
    for other in sorted(range(len(pieces)), key=lambda r: (layout.coordinates(r)[1] == edp, r == rank)):
        for name, (shape, offset, piece) in pieces[other].items():
            whole = found.setdefault(name, piece.new_full(shape, float("nan")))
            whole[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))] = piece
    return dict(sorted(found.items()))


@dataclass
class TrialResult:
    """What a trial tells. `gradients` are those of the first step, before clipping; `loads` by step, layer and fact."""

    initial: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    loads: dict[str, Tensor] = field(default_factory=dict)
    evaluation: list[float] = field(default_factory=list)


def run_trial(
    config: Config,
    mesh: Mesh,
    num_micro_batches: int,
    plant: str | None = None,
    kind: Batches | None = None,
    precision: Precision = "float32",
) -> TrialResult:
    """Train on this rank's share of fixed global batches; every rank returns the same if replicas agree."""
    kind, rate = kind or Batches(), RATES[precision]
    settings = config.optimizer.model_copy(update={"learning_rate": rate, "min_learning_rate": rate / 10})
    with planted(plant) if plant else nullcontext(), in_dtype(DTYPES[precision]):
        trial = Trial(config, mesh, kind.num_domains)
        trained = TrialResult(initial=trial.weights)
        trial.measure_start(num_micro_batches, (*range(NUM_STEPS), HELD_OUT), kind)
        for step in range(NUM_STEPS):
            if step == NUM_STEPS - 1:  # and then train on: an evaluation must leave no trace
                held_out = trial.global_batch(num_micro_batches, HELD_OUT, kind)
                found = evaluate(
                    trial.model,
                    held_out,
                    mesh,
                    bf16=config.train.bf16,
                    document_mask=config.data.document_mask,
                    loss_chunk_tokens=config.train.loss_chunk_tokens,
                    dpo=trial.step.dpo,
                )
                assert found is not None
                trained.evaluation.append(found.loss)
            with trial.unclipped() if step == 0 else nullcontext(trained.gradients) as trained.gradients:
                batches = trial.global_batch(num_micro_batches, step, kind)
                result = trial.step(batches, step, schedule.learning_rate(settings, step, NUM_STEPS))
            move_experts(trial.placing)
            trained.losses.append(result.loss)
            trained.norms.append(result.grad_norm)
            trained.loads |= {f"{step}.{name}": facts for name, facts in trial.loads().items()}
            if result.rewards is not None and precision == "float64" and step:  # before, rounding may be all there is
                trained.loads[f"{step}.rewards"] = torch.tensor(astuple(result.rewards))
        trained.weights, trained.biases = trial.weights, trial.biases
    return trained


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest relative difference (L2) of any tensor; infinite when names or shapes differ."""
    if found.keys() != wanted.keys():
        return float("inf")
    worst = 0.0
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            return float("inf")
        relative = float((found[name].cpu() - tensor.cpu()).norm() / tensor.norm().cpu().clamp(min=1e-12))
        worst = max(worst, relative) if relative == relative else float("inf")
    return worst


def deviations(found: TrialResult, wanted: TrialResult, precision: Precision = "float64") -> dict[str, float]:
    """Largest relative differences by what was compared; `digits` in bfloat16 only."""
    worst = {
        name: difference(getattr(found, name), getattr(wanted, name))
        for name in ("initial", "gradients", "weights", "biases", "loads")
    }
    for name in ("losses", "norms", "evaluation"):
        pairs = zip(getattr(found, name), getattr(wanted, name), strict=True)
        worst[name] = max(abs(a - b) / max(abs(b), 1e-12) if a == a else float("inf") for a, b in pairs)
    worst = {name: worst[name] for name in COMPARED}
    if precision == "bfloat16":
        shares = [(_share_in_half(_dense(one.gradients)), _share_in_half(one.weights)) for one in (found, wanted)]
        worst["digits"] = max(abs(one - other) for one, other in zip(*shares, strict=True))
    return worst


def _dense(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Not experts: what rows of several ranks do to them may be one product, where one process sums several."""
    return {name: tensor for name, tensor in tensors.items() if ".experts." not in name}


def _share_in_half(tensors: dict[str, Tensor]) -> float:
    """Of all values but zeros the share that bfloat16 can hold: sums in full precision have more digits."""
    values = torch.cat([tensor.flatten().cpu() for tensor in tensors.values()])
    values = values[values != 0]
    return float((values == values.bfloat16()).float().mean()) if len(values) else 0.0
