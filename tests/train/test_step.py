"""Optimizer steps in one process and on ranks: scale, agreement, zero gradients, bias, evaluation without a trace."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import mesh_of, micro_batches, tiny_config

from moe_dist.data.batch import Batch
from moe_dist.models.router import Router, TopK
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.evaluation import evaluate, sample_text
from moe_dist.train.loss import cross_entropy_sum
from moe_dist.verify.trial import Trial, difference


def merged(batches: list[Batch]) -> Batch:
    """The rows of several micro-batches as one."""
    parts = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("input_ids", "labels", "position_ids", "document_ids")
    }
    counts = {name: sum(getattr(batch, name) for batch in batches) for name in ("num_valid", "num_tokens")}
    return Batch(**parts, **counts, sample_ids=[], index=0)


def gradients_of(batches: list[Batch], *overrides: str) -> dict[str, torch.Tensor]:
    parts = Trial(tiny_config(*overrides), Mesh.single())
    with parts.unclipped() as gradients:
        parts.step(batches, 0, 0.0)
    return gradients


@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
def test_accumulation_changes_nothing(scope: str) -> None:
    """Traps 3 and 11: one batch, or its rows as four micro-batches with unequal valid tokens.

    Seen to fail with `scale` taken from the micro-batch's own valid labels, and with the load of the first
    micro-batch used for the global-batch scope (`_needs_load_first` false).
    """
    batches = micro_batches(4)
    option = f"balance.aux_loss_scope={scope}"
    assert difference(gradients_of(batches, option), gradients_of([merged(batches)], option)) < 1e-5


def test_loss_is_mean_over_valid_tokens() -> None:
    parts = Trial(tiny_config(), Mesh.single())
    batches = micro_batches(4)
    with torch.no_grad():
        parts.model.eval()
        losses = [
            cross_entropy_sum(parts.model(b.input_ids, b.position_ids, b.document_ids), b.labels) for b in batches
        ]
    result = parts.step(batches, 0, 0.0)
    expected = float(sum(losses)) / sum(batch.num_valid for batch in batches)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.num_tokens == sum(batch.num_tokens for batch in batches)


def state_hash(parts: Trial) -> str:
    digest = hashlib.sha256()
    tensors = dict(parts.model.state_dict())
    for name, key, values, _ in parts.engine.named_state():
        tensors |= {f"{name}.{key}.{i}": value for i, value in enumerate(values)}
    for layer, facts in parts.balancer.facts.items():
        tensors |= {f"facts.{layer}.{key}": getattr(facts, key) for key in ("pairs_E", "tokens", "dropped_E", "sums")}
    tensors["random state"] = torch.get_rng_state()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().numpy().tobytes())
    return digest.hexdigest() + str(parts.model.training)


def test_evaluation_leaves_no_trace() -> None:
    """Trap 29: weights, optimizer, bias, counts, random state and mode are what they were.

    Seen to fail with `evaluating` without `eval()`: load facts are counted and dropout draws random numbers.
    """
    from moe_dist.data.tokenizer import ByteTokenizer

    parts = Trial(tiny_config("model.vocab_size=300", "model.attention_dropout=0.1"), Mesh.single())
    parts.step(micro_batches(2), 0, 1e-2)
    before = state_hash(parts)
    evaluate(parts.model, micro_batches(3, step=7), parts.mesh)
    sample_text(parts.model, ByteTokenizer(), "a", 5, mesh=parts.mesh, seed=1)
    assert state_hash(parts) == before


def test_bias_moves_against_skew() -> None:
    """Trap 19: experts above the mean lose, experts below gain, by the rate, once per step."""
    parts = Trial(tiny_config("balance.router_aux_loss_coef=0"), Mesh.single())
    batches = micro_batches(4)
    parts.step(batches, 0, 0.0)
    for layer, facts in parts.balancer.facts.items():
        bias = parts.balancer.layers[layer].router.bias_E
        mean = facts.pairs_E.double().mean()
        assert torch.equal(bias, 0.01 * (mean - facts.pairs_E).sign().float())
        assert bias.abs().max() > 0


@pytest.mark.parametrize(
    "option",
    ["train.gradient_checkpointing=full", "balance.capacity_factor=0.5", "balance.aux_loss_scope=global_batch"],
)
def test_bias_does_not_depend_on(option: str) -> None:
    """Trap 19: recomputation counts nothing twice, drops do not hide demand, the first pass leaves no count."""

    def bias(*overrides: str) -> dict[str, torch.Tensor]:
        parts = Trial(tiny_config("balance.router_aux_loss_coef=0.1", *overrides), Mesh.single())
        parts.step(micro_batches(4), 0, 0.0)
        return parts.biases | {f"n{k}": v.pairs_E.clone() for k, v in parts.balancer.facts.items()}

    # One layer sees the same inputs with and without drops only where nothing dropped below it.
    plain, changed = (
        bias("model.num_hidden_layers=1", "model.mlp_only_layers=[]"),
        bias("model.num_hidden_layers=1", "model.mlp_only_layers=[]", option),
    )
    assert all(torch.equal(plain[key], changed[key]) for key in plain)


def test_counts_are_exact_integers() -> None:
    """Trap 18: 64 x (600..700) pairs; in bfloat16 the sums lose units and flip the direction of the bias."""
    parts = Trial(tiny_config(), Mesh.single())
    (facts, *_) = parts.balancer.facts.values()
    wanted = torch.zeros(8, dtype=torch.int64)
    for part in range(64):
        counts = 600 + (torch.arange(8) * 37 + part * 11) % 101
        facts.pairs_E += counts
        wanted += counts
    assert torch.equal(parts.balancer.global_pairs()[0], wanted)
    assert not torch.equal(wanted.bfloat16().long(), wanted)
    parts.balancer.update_bias()
    (moe, *_) = parts.balancer.layers.values()
    assert torch.equal(moe.router.bias_E.sign(), (wanted.sum() - 8 * wanted).sign().float())


def global_pairs_twice() -> tuple[list, list]:
    parts = Trial(tiny_config("parallel.ep_size=2"), mesh_of(2))
    for facts in parts.balancer.facts.values():
        facts.pairs_E += 600 + dist.get_rank()
    first, second = parts.balancer.global_pairs(), parts.balancer.global_pairs()
    return first.tolist(), second.tolist()


@pytest.mark.dist
def test_reducing_counts_leaves_local_counts() -> None:
    """Trap 13: an in-place all-reduce of the facts themselves would count peers twice the second time.

    Seen to fail with `torch.stack` replaced by views of the facts.
    """
    for first, second in run_ranks(global_pairs_twice, 4):
        assert first == second
        assert first[0][0] == 4 * 600 + 6


def everything_to_one_expert(ep_size: int) -> dict:
    from moe_dist.models.router import Router

    parts = Trial(tiny_config(f"parallel.ep_size={ep_size}"), mesh_of(ep_size))
    for module in parts.model.modules():
        if isinstance(module, Router):
            module.bias_E[:2] = 100.0  # every token chooses experts 0 and 1; other ranks get nothing
    mine = micro_batches(4)[parts.mesh.dp_rank :: parts.mesh.layout.dp_size]
    parts.step(mine, 0, 1e-2)
    assert all(parameter.grad is not None for parameter in parts.model.parameters())
    steps = {name: float(values[0]) for name, key, values, _ in parts.engine.named_state() if key == "step"}
    assert set(steps.values()) == {1.0}
    return parts.weights


@pytest.mark.dist
@pytest.mark.parametrize("ep_size", [1, 4])
def test_experts_without_tokens_are_trained_too(ep_size: int) -> None:
    """Trap 4: their gradient is zero, not None; weight decay and optimizer state move as in one process.

    Seen to fail with an optimizer that leaves parameters with an all-zero gradient out of its step.
    """
    wanted = everything_to_one_expert(1)
    for found in run_ranks(everything_to_one_expert, 4, ep_size):
        assert difference(found, wanted) < 1e-5


def poisoned(where: str) -> tuple[bool, bool]:
    parts = Trial(tiny_config("parallel.ep_size=2"), mesh_of(2))
    mine = micro_batches(8)[parts.mesh.dp_rank :: parts.mesh.layout.dp_size]
    before = parts.weights
    if dist.get_rank() == 1:
        parameter = list(parts.model.parameters())[3]
        if where == "gradient":
            parameter.register_hook(lambda gradient: gradient * float("nan"))
        else:
            mine[0] = replace(mine[0], input_ids=mine[0].input_ids.clone())
            parts.model.lm_head.register_forward_hook(lambda *args: args[2] * float("inf"))
    result = parts.step(mine, 0, 1e-2)
    after = parts.weights
    return result.skipped, all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.dist
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_all_ranks_agree_on_a_bad_step(where: str) -> None:
    """A NaN on one rank: every rank skips the update, no weight moves anywhere."""
    assert run_ranks(poisoned, 4, where) == [(True, True)] * 4


def no_experts_in_one_layer(ep_size: int) -> list[float]:
    parts = Trial(
        tiny_config(
            f"parallel.ep_size={ep_size}",
            "model.num_hidden_layers=5",
            "model.decoder_sparse_step=2",
            "model.mlp_only_layers=[3]",
        ),
        mesh_of(ep_size),
    )
    mine = micro_batches(8)[parts.mesh.dp_rank :: parts.mesh.layout.dp_size]
    return [parts.step(mine, step, 1e-2).loss for step in range(2)]


@pytest.mark.dist
def test_alternating_dense_and_expert_layers() -> None:
    """Trap 25: collectives come in the same order on every rank, whatever the pattern of layers."""
    wanted = no_experts_in_one_layer(1)
    for ep_size in (1, 2, 4):
        for found in run_ranks(no_experts_in_one_layer, 4, ep_size):
            assert found == pytest.approx(wanted, rel=1e-5)


class InnerRouter(Router):
    """A person's own router, whose weights are those of a module inside it."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts)
        self.weight = None
        self.gate = torch.nn.Linear(hidden_size, num_experts)

    def forward(self, x_TD: torch.Tensor) -> TopK:
        assert x_TD.dtype == torch.float32
        return self.select_experts(self.gate(x_TD).softmax(-1))


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
def test_own_routers_compute_in_float32_too(precision: str) -> None:
    """Trap 17. Seen to fail with autocast left on around them, and with the parameters of inner modules in bfloat16."""
    parts = Trial(tiny_config("model.router=test_step:InnerRouter", f"train.{precision}=true"), Mesh.single())
    seen = []
    for moe in parts.model.moe_layers():
        assert moe.router.gate.weight.dtype == torch.float32
        moe.router.gate.register_forward_hook(lambda _, __, logits: seen.append(logits.dtype))
    parts.step(micro_batches(1), 0, 0.0)
    assert set(seen) == {torch.float32}


def test_pure_bf16_keeps_float32_masters() -> None:
    """Updates too small for bfloat16 still add up; routers stay in float32."""
    parts = Trial(tiny_config("train.pure_bf16=true", "train.max_grad_norm=0"), Mesh.single())
    kinds = {name: parameter.dtype for name, parameter in parts.model.named_parameters()}
    assert {kind for name, kind in kinds.items() if "router" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "router" not in name} == {torch.bfloat16}
    masters = {name: master.clone() for name, master in parts.model.masters.items()}
    for step in range(3):
        parts.step(micro_batches(2, step), step, 1e-6)
    moved = [not torch.equal(masters[name], parts.model.masters[name]) for name in masters]
    assert all(moved)
    parameters = dict(parts.model.named_parameters())
    for name, master in parts.model.masters.items():
        assert torch.equal(parameters[name], master.bfloat16())


def test_bf16_stays_near_fp32() -> None:
    """Autocast gradients point the same way as float32 ones."""
    wanted = gradients_of(micro_batches(4))
    for option in ("train.bf16=true", "train.pure_bf16=true"):
        found = gradients_of(micro_batches(4), option)
        for name, gradient in wanted.items():
            cosine = torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.95 or gradient.norm() < 1e-3, f"{option} {name}: {cosine}"


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"])
def test_optimizers_learn_and_decay_matrices_only(optim: str) -> None:
    parts = Trial(tiny_config(f"optimizer.optim={optim}"), Mesh.single())
    batches = micro_batches(2)
    losses = [parts.step(batches, step, 1e-2).loss for step in range(8)]
    assert losses[-1] < losses[0]
    for group in parts.engine.optimizer.optimizer.param_groups:
        smallest = min(parameter.ndim for parameter in group["params"])
        assert (group["weight_decay"] > 0) == (smallest >= 2)
