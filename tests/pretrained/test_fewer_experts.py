"""`moe-dist export --drop-experts`: the busiest experts by the run's own log, renumbered; what it costs is said."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from folders import EVERY
from patches import Replace
from safetensors.torch import load_file
from saved import TEXTS
from torch import Tensor

from launcher.cli import commands
from moe_dist.config import load_config, load_mapping
from moe_dist.models.router import Router
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.pretrained.loading import load_pretrained
from moe_dist.train import MoETrainer
from moe_dist.train.build import build_model, build_validation
from moe_dist.train.held_out import NUM_SEQUENCES
from moe_dist.train.loss import cross_entropy_sum

pytest.importorskip("transformers")

MODEL = EVERY["qwen3_moe-0"].model_copy(update={"initializer_range": 0.2})
TRAINING: dict[str, Any] = {
    "max_seq_length": 32,
    "max_steps": 3,
    "save_steps": 2,
    "logging_steps": 1,
    "progress": "none",
    "tensorboard": False,
    "validation_split": 0.0,
    "bias_update_rate": 0.0,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
}


class Said(NamedTuple):
    code: int
    out: str
    err: str


Say = Callable[..., Said]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["moe-dist", "export", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            code = commands.run()
        except SystemExit as end:
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of text files, with held-out data; checkpoints of steps 2 and 3."""
    place = tmp_path_factory.mktemp("runs")
    for number, text in enumerate(TEXTS):
        (place / f"{number}.txt").write_text(text)
    data = {"source": "text", "path": str(place / "*.txt"), "validation_split": 0.3}
    config = {"model": MODEL.model_dump(), "data": data}
    MoETrainer(config, training_config={**TRAINING, "validation_split": 0.3}, output_dir=place / "run").train()
    return place / "run"


def loads(run: Path, last_step: int) -> Tensor:
    """(L, E), of all records up to a step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train" and row["step"] <= last_step]
    return torch.tensor([[layer["tokens_per_expert"] for layer in row["layers"]] for row in rows]).sum(0)


def loaded(folder: Path) -> Transformer:
    config = load_mapping({"model": {"from_pretrained": str(folder)}, "data": {"max_seq_length": 32}})
    model = build_model(config, Mesh.single())
    load_pretrained(model, config.model, Mesh.single())
    return model.eval()


def loss_on_held_out(model: Transformer, run: Path) -> float:
    """Nats a token, of as many sequences, each document by itself."""
    samples = build_validation(load_config(run / "config.yaml"))
    assert samples is not None
    assert len(samples) > NUM_SEQUENCES
    total, count = 0.0, 0
    for number in range(NUM_SEQUENCES):
        sample = {key: torch.from_numpy(values) for key, values in samples.sample(number).items()}
        for document in sample["document_ids"].unique():
            mine = sample["document_ids"] == document
            ids, labels = sample["input_ids"][mine], sample["labels"][mine]
            total += float(cross_entropy_sum(model(ids[None]), labels[None]))
            count += int((labels >= 0).sum())
    return total / count


@pytest.mark.parametrize("step", [2, 3])
def test_the_busiest_stay_and_compute_what_they_did(
    step: int, run: Path, tmp_path: Path, say: Say, replace: Replace
) -> None:
    """The same as all experts with the logits of the others at -inf, and the loss that is told is the loss. Seen red
    with the idlest kept, with rows of the router left in their order, and with records of later steps counted."""
    assert say(run, "-o", tmp_path / "all", "--step", step).code == 0
    said = say(run, "-o", tmp_path / "few", "--step", step, "--drop-experts", 4)
    assert said.code == 0, said
    busy = loads(run, step)
    kept = busy.topk(4, dim=1).indices.sort(dim=1).values
    one, few = (load_file(tmp_path / name / "model.safetensors") for name in ("all", "few"))
    for layer, experts in enumerate(kept.tolist()):
        start = f"model.layers.{layer}.mlp"
        assert torch.equal(few[f"{start}.gate.weight"], one[f"{start}.gate.weight"][experts])
        for new, old in enumerate(experts):
            name = "down_proj.weight"
            assert torch.equal(few[f"{start}.experts.{new}.{name}"], one[f"{start}.experts.{old}.{name}"])
    assert "2 experts of each layer, those with the fewest tokens" in (tmp_path / "few" / "README.md").read_text()
    assert f"which had {float(busy.gather(1, kept).sum() / busy.sum()):.1%} of the load" in said.out
    whole, fewer = loaded(tmp_path / "all"), loaded(tmp_path / "few")
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        losses = [loss_on_held_out(model, run) for model in (whole, fewer)]
        found = fewer(ids)
        routers = [module for module in whole.modules() if isinstance(module, Router)]
        plain = Router.logits

        def masked(self: Router, x_TD: Tensor) -> Tensor:
            stays = torch.zeros(6, dtype=torch.bool)
            stays[kept[routers.index(self)]] = True
            return plain(self, x_TD).masked_fill(~stays, -torch.inf)

        replace(Router, "logits", masked)
        expected = whole(ids)
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    told = re.search(r"^loss +([\d.]+) with all, ([\d.]+) \(", said.out, re.MULTILINE)
    assert told is not None, said.out
    assert [float(told[1]), float(told[2])] == pytest.approx(losses, abs=1e-4)


def test_other_data_is_not_taken_for_the_runs(run: Path, tmp_path: Path, say: Say) -> None:
    """Seen red with whatever the files hold today measured as the run's."""
    files = sorted(run.parent.glob("*.txt"))
    before = [file.read_text() for file in files]
    try:
        for file, text in zip(files, before, strict=True):
            file.write_text(text.replace("return", "yield"))
        said = say(run, "-o", tmp_path / "few", "--drop-experts", 4)
    finally:
        for file, text in zip(files, before, strict=True):
            file.write_text(text)
    assert said.code == 0
    assert "not measured (the held-out data is not what the run evaluated); logits of random prompts move" in said.out


@pytest.mark.parametrize("name", ["mixtral-3", "qwen2_moe-0", "glm4_moe-0", "deepseek_v3-0", "gpt_oss-0"])
def test_every_family(name: str, tmp_path: Path, say: Say) -> None:
    """What `transformers` loads is the checkpoint's, selection biases and stacks with biases too; no held-out data."""
    model = EVERY[name]
    if model.n_group > 1:
        model = model.model_copy(update={"n_group": 1, "topk_group": 1})
    biased = model.scoring_func == "sigmoid"
    training = TRAINING | {"max_steps": 1, "save_steps": 1, "bias_update_rate": 0.5 if biased else 0.0}
    trainer = MoETrainer({"model": model.model_dump()}, training_config=training, output_dir=tmp_path / "run")
    trainer.train(TEXTS)
    number = model.num_experts - 1
    said = say(tmp_path / "run", "-o", tmp_path / "few", "--drop-experts", number)
    assert said.code == 0, said
    assert "all" in said.out
    assert "not measured (data.source=memory" in said.out
    assert re.search(rf"move by \d.* with {number} of {number + 1} experts", said.out)
    if not biased:
        return
    few = load_file(tmp_path / "few" / "model.safetensors")
    bias = dict(trainer.model.named_buffers())["layers.1.moe.router.bias_E"]
    kept = loads(tmp_path / "run", 1)[0].topk(number).indices.sort().values
    assert torch.equal(few["model.layers.1.mlp.gate.e_score_correction_bias"], bias[kept])
    assert bias.abs().min() > 0


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (6, "--drop-experts 6: not fewer than the 6 there are; it says how many stay"),
        (1, "--drop-experts 1: a token goes to 2 experts; keep at least so many"),
    ],
)
def test_numbers_that_cannot_be(number: int, reason: str, run: Path, tmp_path: Path, say: Say) -> None:
    said = say(run, "-o", tmp_path / "few", "--drop-experts", number)
    assert (said.code, reason in said.err, list(tmp_path.iterdir())) == (2, True, [])


def test_no_record_of_load(run: Path, tmp_path: Path, say: Say) -> None:
    shutil.copytree(run, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    late = [line for line in lines if '"step": 1,' not in line and '"step": 2,' not in line]
    log.write_text("".join(late))
    words = (tmp_path / "run" / "checkpoint-2", "-o", tmp_path / "few", "--drop-experts", 4)
    assert f"{tmp_path / 'run'} has no load of experts up to step 2" in say(*words).err
    thin = [json.dumps(json.loads(line) | {"layers": []}) + "\n" if '"train"' in line else line for line in lines]
    log.write_text("".join(thin))
    assert "has no load of experts up to step 2" in say(*words).err
    log.unlink()
    said = say(*words)
    assert (said.code, "has no load of experts up to step 2" in said.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_groups_are_not_torn(tmp_path: Path, say: Say) -> None:
    model = EVERY["glm4_moe-3"].model_dump()
    trainer = MoETrainer({"model": model}, training_config=TRAINING | {"max_steps": 1}, output_dir=tmp_path / "run")
    trainer.train(TEXTS)
    said = say(tmp_path / "run", "-o", tmp_path / "few", "--drop-experts", 4)
    assert (said.code, "experts stand in 2 groups, which would be others" in said.err) == (2, True)
