"""Direct preference optimization: its loss and gradients by the formula and as `trl` has them, and its reference."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folders import BASE, FAMILIES
from ranks import run_ranks
from tiny import mesh_of, tiny_config
from torch import Tensor

from moe_dist.config import load_mapping
from moe_dist.data import ByteTokenizer, documents_from, pack
from moe_dist.data.batch import Batch, collate
from moe_dist.data.chat_template import ChatEncoder
from moe_dist.models.huggingface import from_huggingface, huggingface_config
from moe_dist.models.lora import adapters_off
from moe_dist.models.precision import in_dtype
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.engines.registry import build_engine
from moe_dist.parallel.engines.weights_hash import weights_hash
from moe_dist.train.build import build_model
from moe_dist.train.dpo import Dpo, dpo_losses
from moe_dist.train.loss import head_log_probs
from moe_dist.train.passes import model_inputs

LENGTH = 26
ROWS = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "five"},
    {"prompt": "say it", "chosen": " now", "rejected": " never mind"},
    {"prompt": "?", "chosen": "a longer one", "rejected": "b"},
]
LORA = {"r": 3, "alpha": 6, "init": "random", "target_modules": ["q_proj", "experts", "gate", "lm_head"]}


@cache
def batch_of(packing: bool = True) -> Batch:
    encoder = ChatEncoder(ByteTokenizer(), LENGTH)
    samples = pack(
        documents_from(ROWS, format="preference", chat=encoder), ByteTokenizer(), max_seq_length=LENGTH, packed=packing
    )
    return collate([samples.sample(index) for index in range(len(samples))], list(range(len(samples))), 0)


def model_of(lora: dict[str, Any] | None = None, **keys: Any) -> tuple[Transformer, Any]:
    tree = {"model": BASE | FAMILIES["mixtral"][0] | {"model_type": "mixtral"} | keys, "lora": lora or {}}
    tree |= {"data": {"format": "preference", "source": "memory", "max_seq_length": LENGTH}}
    options = ["dpo.beta=0.3", "dpo.label_smoothing=0.1", "balance.router_aux_loss_coef=0"]
    config = load_mapping(tree, options, notice=lambda text: None)
    with torch.device("meta"):
        model = Transformer(config.model, config.balance)
        model.add_adapters(config.lora)
    model.initialize(3)
    return model, config


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize("learns", ["both", "hidden", "weight"])
def test_log_probabilities_in_chunks_are_those_of_all_logits(chunk: int, learns: str) -> None:
    """Values and both gradients, with a gradient of its own for each token. Seen red: the weight's written over."""
    with in_dtype(torch.float64):
        generator = torch.Generator().manual_seed(0)
        hidden, weight = torch.randn(2, 9, 6, generator=generator), torch.randn(13, 6, generator=generator)
        labels = torch.randint(0, 13, (2, 9), generator=generator)
        labels[0, :4] = -100
        upstream = torch.randn(2, 9, generator=generator)
        found = []
        for tokens in (chunk, 0):
            leaves = [hidden.clone(), weight.clone()]
            for leaf, name in zip(leaves, ("hidden", "weight"), strict=True):
                leaf.requires_grad_(learns in ("both", name))
            log_probs = head_log_probs(*leaves, labels, chunk_tokens=tokens)
            (log_probs * upstream).sum().backward()
            found.append([log_probs.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
        by_hand = F.log_softmax(hidden @ weight.T, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        assert torch.allclose(found[0][0], by_hand * (labels >= 0), atol=1e-12)
        for one, other in zip(*found, strict=True):
            assert one is not None
            assert other is not None
            assert torch.allclose(one, other, atol=1e-12)


def formula(model: Transformer, reference: Transformer, beta: float, smoothing: float) -> Tensor:
    """The paper's, answer by answer, without packing, padding or chunks; mean over pairs."""
    losses = []
    for row in ROWS:
        ratios = []
        for name in ("chosen", "rejected"):
            prompt, answer = ByteTokenizer().encode(row["prompt"]), ByteTokenizer().encode(row[name])
            ids = torch.tensor([[*map(int, prompt), *map(int, answer), ByteTokenizer.eos_id]])

            def log_prob(one: Transformer, ids: Tensor = ids, begin: int = len(prompt)) -> Tensor:
                each = one(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
                return each[begin - 1 :].sum()

            with torch.no_grad():
                against = log_prob(reference)
            ratios.append(log_prob(model) - against)
        margin = beta * (ratios[0] - ratios[1])
        losses.append(-(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin))
    return torch.stack(losses).mean()


def our_loss(model: Transformer, config: Any, packing: bool) -> Tensor:
    dpo, batch = Dpo(model, config, torch.device("cpu")), batch_of(packing)
    batch = dpo.with_reference(batch)
    return model(**model_inputs(batch), head_function=dpo.loss_of(batch, 1 / batch.num_terms))


@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_gradients_are_the_papers(packing: bool) -> None:
    """In float64, of every adapter, with the reference without them. Seen red: prompts counted, adapters left on."""
    with in_dtype(torch.float64):
        model, config = model_of(LORA)
        base, _ = model_of()
        base.load_state_dict(model.state_dict(), strict=False)
        assert batch_of(packing).input_ids.shape[0] == (4 if packing else 6)
        found, wanted = [], []
        for gradients, loss in ((found, our_loss(model, config, packing)), (wanted, formula(model, base, 0.3, 0.1))):
            model.zero_grad()
            loss.backward()
            gradients += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        assert len(found) == len(wanted) > 6
        assert abs(float(found[0]) - 0.693) > 0.01
        for one, other in zip(found, wanted, strict=True):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_without_its_adapters_a_model_is_what_it_was() -> None:
    """Bit for bit, and afterwards they are where they were, also after an error."""
    model, _ = model_of(LORA | {"target_modules": "all-linear"})
    base, _ = model_of()
    base.load_state_dict(model.state_dict(), strict=False)
    model.eval(), base.eval()
    ids, names = batch_of().input_ids, [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        before = model(ids)
        with adapters_off(model):
            assert torch.equal(model(ids), base(ids))
        with suppress(ZeroDivisionError), adapters_off(model):
            raise ZeroDivisionError
        assert torch.equal(model(ids), before)
        assert not torch.equal(before, base(ids))
    assert [name for name, _ in model.named_parameters()] == names


def trainer_of_trl(trl: Any, model: Any, reference: Any, folder: Path) -> Any:
    """Its trainer for these two; the tokenizer and the rows are only there because it wants some."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"t0": 0, "t1": 1, "t2": 2}, unk_token="t0"))
    options = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    return trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(output_dir=str(folder), beta=0.3, loss_type="sigmoid", **options),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t2"),
    )


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")
def test_trl_computes_the_same(tmp_path: Path) -> None:
    """Loss, rewards, and the gradient of every weight of a Mixtral to 1e-5, the reference another model.

    Seen red: with the prompts counted, and with its loss of balancing left in.
    """
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install -e '.[dev]'")
    from transformers import AutoConfig, AutoModelForCausalLM

    (model, config), (before, _) = model_of(), model_of()
    config.dpo.label_smoothing = 0.0  # its sigmoid loss has none
    architecture = AutoConfig.for_model(**huggingface_config(model.config))
    theirs, reference = (
        AutoModelForCausalLM.from_config(architecture, experts_implementation="eager") for _ in range(2)
    )
    model.load_state_dict(from_huggingface(theirs.state_dict(), model.config))
    before.load_state_dict(from_huggingface(reference.state_dict(), model.config))
    batch = Dpo(before, config, torch.device("cpu")).measured(batch_of(packing=False))
    dpo = Dpo(model, config, torch.device("cpu"))
    loss = model(**model_inputs(batch), head_function=dpo.loss_of(batch, 1 / batch.num_terms))
    loss.backward()
    chosen, rejected, accuracy = (dpo.take_sums() / batch.num_terms).tolist()

    sides = []
    for row in ROWS:
        ids = {name: [int(token) for token in ByteTokenizer().encode(text)] for name, text in row.items()}
        ends = {f"{name}_ids": [*ids[name], ByteTokenizer.eos_id] for name in ("chosen", "rejected")}
        sides.append({"prompt_ids": ids["prompt"], **ends})
    trainer = trainer_of_trl(trl, theirs, reference, tmp_path)
    trainer.aux_loss_enabled = False  # that of balancing is not what is compared
    wanted = trainer._compute_loss(trainer.model, trainer.data_collator(sides), return_outputs=False)
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    told = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("rewards")}
    assert [chosen, rejected] == pytest.approx([told["rewards/chosen"], told["rewards/rejected"]], abs=1e-5)
    assert accuracy == pytest.approx(told["rewards/accuracies"])
    gradients = from_huggingface({name: p.grad for name, p in theirs.named_parameters()}, model.config)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name


def test_a_pair_the_wrong_way_round_costs_more() -> None:
    """By hand: margins of 2 beta and -2 beta."""
    log_probs, reference = torch.tensor([[-1.0, -3.0], [-3.0, -1.0]]), torch.zeros(2, 2)
    right, wrong = dpo_losses(log_probs, reference, 0.5).tolist()
    assert right == pytest.approx(0.313262, abs=1e-6)
    assert wrong == pytest.approx(1.313262, abs=1e-6)
    smoothed = dpo_losses(log_probs, reference, 0.5, 0.25).tolist()
    assert smoothed == pytest.approx([0.75 * right + 0.25 * wrong, 0.25 * right + 0.75 * wrong])


def hash_in(ep_size: int, *overrides: str) -> str:
    """Of the first weights in this layout, with one of them a little otherwise where `seed` is given."""
    config = tiny_config(f"parallel.ep_size={ep_size}", *overrides)
    mesh = mesh_of(ep_size)
    model = build_model(config, mesh)
    engine = build_engine(model, config, mesh)
    return weights_hash(model, engine, model.stacked_names(), model.masters, mesh)


def test_the_hash_of_weights_sees_one_number_and_two_that_changed_places() -> None:
    config = tiny_config()
    mesh, model = mesh_of(1), build_model(config, mesh_of(1))
    engine = build_engine(model, config, mesh)

    def found() -> str:
        return weights_hash(model, engine, model.stacked_names(), model.masters, mesh)

    first, seen = found(), set()
    weight = model.layers["0"].attention.q_proj.weight.data  # type: ignore[union-attr]
    kept = weight.clone()
    weight[3, 5] = weight[3, 5].nextafter(torch.tensor(9.0))
    seen.add(found())
    weight.copy_(kept)
    weight[[0, 1]] = kept[[1, 0]]
    seen.add(found())
    weight.copy_(kept.flip(1))
    seen.add(found())
    weight.copy_(kept)
    model.layers["0"].moe.router.bias_E[2] += 1  # type: ignore[union-attr]
    seen.add(found())
    model.layers["0"].moe.router.bias_E[2] -= 1  # type: ignore[union-attr]
    assert found() == first
    assert len(seen | {first}) == 5


@pytest.mark.dist
def test_the_hash_of_weights_is_the_same_in_every_layout() -> None:
    alone = hash_in(1)
    for ep_size, overrides in ((2, ()), (1, ("parallel.zero_stage=3",)), (2, ("parallel.zero_stage=1",))):
        assert set(run_ranks(hash_in, 2, ep_size, *overrides)) == {alone}, (ep_size, overrides)
