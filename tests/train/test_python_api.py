"""`MoETrainer` from Python: what it is given, and where it trains."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from moe_dist.config import ConfigError, LaunchConfig, ModelConfig, load_config, load_mapping
from moe_dist.data.packing import PackedDataset
from moe_dist.models.experts import Expert
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.device import choose_backend
from moe_dist.train import MoETrainer
from moe_dist.train.build import build_datasets
from moe_dist.train.trainer import TrainingResult

TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * 12 for i in range(24)]
MODEL = {
    "vocab_size": 272,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "moe_intermediate_size": 32,
    "num_experts": 4,
}
TRAINING: dict[str, Any] = {
    "max_seq_length": 32,
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "progress": "none",
    "tensorboard": False,
    "save_at_end": False,
    "logging_steps": 1,
    "device": "cpu",
}


def records(folder: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@dataclass
class Arguments:
    """As `transformers.TrainingArguments`: fields that `__post_init__` fills in, so that no default is left alone."""

    output_dir: str = "trainer_output"
    num_train_epochs: float = 3.0
    max_steps: int = -1
    learning_rate: float = 5e-5
    warmup_steps: float = 0
    gradient_checkpointing: bool = False
    save_strategy: str = "steps"
    save_steps: float = 500
    eval_strategy: str = "no"
    eval_steps: float | None = None
    report_to: Any = "none"
    fp16: bool = False
    bf16: bool = False
    dataloader_pin_memory: bool = True
    ddp_timeout: int = 1800
    push_to_hub: bool = False
    disable_tqdm: bool | None = None
    accelerator_config: dict | None = None
    debug: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.disable_tqdm = False if self.disable_tqdm is None else self.disable_tqdm
        self.report_to = [] if self.report_to == "none" else [self.report_to]
        self.accelerator_config = {"split_batches": False} | (self.accelerator_config or {})


def real_arguments() -> type:
    """The class itself, where its package can make one."""
    pytest.importorskip("accelerate", reason="transformers.TrainingArguments needs accelerate, which is not installed")
    from transformers import TrainingArguments

    return TrainingArguments


@pytest.fixture(params=["alike", pytest.param("transformers", marks=pytest.mark.slow)])
def arguments(request: pytest.FixtureRequest) -> type:
    """A class that behaves alike, and the real one, whose import takes ten seconds and more."""
    return Arguments if request.param == "alike" else real_arguments()


def test_training_arguments_are_taken_as_they_are(tmp_path: Path, arguments: type) -> None:
    """All values that have a key here, those nobody has chosen too; what has none is refused by name once it is chosen.

    Seen to fail with values equal to their defaults left out (3 epochs became 1, 5e-5 became 3e-4), and with the
    fields' own defaults to compare with: what __post_init__ had filled in was refused.
    """

    def config_of(**chosen: Any) -> Any:
        given = arguments(output_dir=str(tmp_path), **chosen)
        return MoETrainer(model_config=MODEL, training_config=given).config

    config = config_of()
    assert (config.train.num_train_epochs, config.optimizer.learning_rate) == (3.0, 5e-5)
    assert (config.checkpoint.save_steps, config.train.eval_steps) == (500, 0)
    assert config.train.output_dir == tmp_path
    assert config.model.num_experts == 4
    assert config.launch.timeout == 120.0  # nobody has chosen ddp_timeout
    config = config_of(max_steps=7, warmup_steps=0.1, gradient_checkpointing=True, save_strategy="no", ddp_timeout=60)
    assert (config.train.max_steps, config.optimizer.warmup_ratio, config.launch.timeout) == (7, 0.1, 60.0)
    assert (config.train.gradient_checkpointing, config.checkpoint.save_steps) == ("full", 0)
    config = config_of(eval_strategy="steps", eval_steps=20, report_to="tensorboard")
    assert (config.train.eval_steps, config.monitor.tensorboard) == (20, True)
    with pytest.raises(ConfigError, match="push_to_hub=true: not offered yet; there is: moe-dist export"):
        config_of(push_to_hub=True)
    with pytest.raises(ConfigError, match="accelerator_config"):
        config_of(accelerator_config={"split_batches": True})


@pytest.mark.slow
def test_a_run_with_training_arguments(tmp_path: Path) -> None:
    """The real class, a whole run."""
    given = real_arguments()(output_dir=str(tmp_path / "run"), max_steps=2, logging_steps=1, use_cpu=True)
    trainer = MoETrainer({"data": {"max_seq_length": 32}}, model_config=MODEL, training_config=given)
    assert trainer.train(TEXTS).steps == 2


def test_a_file_and_changes_to_it(tmp_path: Path) -> None:
    """Both mappings count over each kind of `config`. Seen to fail with them dropped over a file and a `Config`."""
    file = tmp_path / "run.yaml"
    file.write_text("train: {max_steps: 3, seed: 5}\nmodel: {hidden_size: 64, num_experts: 8}\n")
    for config in (file, str(file), load_config(file), {"train": {"max_steps": 3, "seed": 5}, "hidden_size": 64}):
        trainer = MoETrainer(
            config,
            model_config={"num_experts": 4},
            training_config={"max_steps": 9, "learning_rate": 0.25},
            output_dir=tmp_path / "out",
        )
        found = trainer.config
        assert (found.model.hidden_size, found.model.num_experts) == (64, 4)
        assert (found.train.max_steps, found.train.seed, found.optimizer.learning_rate) == (9, 5, 0.25)
        trainer.config.train.per_device_train_batch_size = 2  # and may still be changed
        assert trainer.config.train.per_device_train_batch_size == 2
    with pytest.raises(ConfigError, match="num_expertz"):
        MoETrainer(file, model_config={"num_expertz": 4})
    with pytest.raises(ConfigError, match="training_config=5: a mapping"):
        MoETrainer(file, training_config=5)


def test_keys_are_attributes_of_the_configuration(tmp_path: Path) -> None:
    """As the guide writes it, between the making of a trainer and `train`; checked as in a file.

    Seen to fail with pydantic's `ValidationError`: no such attribute.
    """
    trainer = MoETrainer(model_config=MODEL, training_config=TRAINING, output_dir=tmp_path)
    trainer.config.batch_size = 16
    trainer.config.gradient_checkpointing = True
    trainer.config.mixed_precision = True
    trainer.config.load_balance_loss_coef = 0.1
    trainer.config.expert_parallel_size = 2
    config = trainer.config
    assert (config.train.per_device_train_batch_size, config.train.gradient_checkpointing) == (16, "full")
    assert (config.train.bf16, config.balance.router_aux_loss_coef, config.parallel.ep_size) == (True, 0.1, 2)
    read = (config.batch_size, config.mixed_precision, config.load_balance_loss_coef, config.num_experts)
    assert read == (16, "bf16", 0.1, 4)
    config.mixed_precision = "no"
    assert config.train.bf16 is False
    for name, value, said in [
        ("batchsize", 3, "batchsize=3: unknown key; nearest: train.per_device_train_batch_size"),
        ("batch_size", 0, r"train\.per_device_train_batch_size=0 \(written as batch_size\): a whole number above 0"),
        ("expert_parallel_size", 3, r"parallel\.ep_size=3: must divide model\.num_experts=4"),
        ("mixed_precision", "fp16", "use bf16"),
    ]:
        with pytest.raises(ConfigError, match=said):
            setattr(config, name, value)
    assert (config.batch_size, config.parallel.ep_size) == (16, 2)
    with pytest.raises(AttributeError, match="no section and no key 'batchsize'"):
        _ = config.batchsize


def test_the_guides_call_and_its_folder(tmp_path: Path) -> None:
    """Seen to fail without `output_dir/checkpoints`."""
    output_dir = tmp_path / "run"
    trainer = MoETrainer(
        model_config=MODEL, training_config=TRAINING | {"save_at_end": True, "num_epochs": 1}, output_dir=output_dir
    )
    result = trainer.train(TEXTS)
    assert result.final_loss < result.initial_loss
    assert (output_dir / "checkpoints").exists()
    assert [path.name for path in (output_dir / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
    again = MoETrainer(model_config=MODEL, training_config=TRAINING | {"max_steps": 4}, output_dir=output_dir)
    assert len(again.train(TEXTS).losses) == 1


def test_a_model_and_arguments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the guide calls it; the model's own weights are trained. Seen to end with a TypeError."""
    model = Transformer(ModelConfig(**MODEL))
    model.initialize(7)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    output_dir = str(tmp_path / "run")
    trainer = MoETrainer(
        model=model,
        args=Arguments(output_dir=output_dir, fp16=True, dataloader_pin_memory=True, gradient_checkpointing=True),
    )
    config = trainer.config
    assert (config.train.bf16, config.data.dataloader_pin_memory) == (True, True)
    assert config.train.gradient_checkpointing == "full"
    assert "TrainingArguments.fp16 is read as bf16" in caplog.text
    for name, value in TRAINING.items():
        setattr(config, name, value)
    config.learning_rate = 1e-2
    result = trainer.train(TEXTS)
    assert result.final_loss < result.initial_loss
    after = dict(model.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert all(parameter is after[name] for name, parameter in trainer.model.named_parameters())
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    again = MoETrainer(model=ModelConfig(**MODEL), args=TRAINING)
    assert again.config.model.num_experts == 4
    with pytest.raises(ConfigError, match="model and model_config are two names of one thing"):
        MoETrainer(model=model, model_config=MODEL)
    with pytest.raises(ConfigError, match="model=Linear: a moe_dist Transformer"):
        MoETrainer(model=nn.Linear(2, 2))


@pytest.mark.parametrize("layout", [{"ep_size": 2}, {"pp_size": 2, "gradient_accumulation_steps": 2}], ids=str)
def test_a_layout_that_one_process_cannot_have_is_refused(tmp_path: Path, layout: dict) -> None:
    """Seen to fail with one rank whatever is asked for, as it was."""
    trainer = MoETrainer(model_config=MODEL, training_config=TRAINING | layout, output_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"world_size=1: not a multiple .* run `moe-dist train`, .* torchrun"):
        trainer.train(TEXTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_the_device_asked_for_is_the_one(tmp_path: Path) -> None:
    trainer = MoETrainer(model_config=MODEL, training_config=TRAINING | {"device": "cuda"}, output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"launch\.device=cuda: this machine has no CUDA device"):
        trainer.train(TEXTS)


def test_a_single_document_is_trained_on_and_nothing_is_evaluated(caplog: pytest.LogCaptureFixture) -> None:
    """Seen to end with `nothing to pack: the corpus has no token`, which was the validation set."""
    config = load_mapping({"model": MODEL, "data": {"max_seq_length": 32, "validation_split": 0.5}})
    with caplog.at_level(logging.WARNING, logger="moe_dist"):
        datasets = build_datasets(config, [TEXTS[0]])
    assert datasets.validation is None
    assert len(datasets.train) > 0
    assert "data.validation_split=0.5: there is but one document with text" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_nccl_needs_cuda_and_says_so() -> None:
    """Seen to end in the words of torch: `device_id parameter must be an accelerator with an index`."""
    with pytest.raises(ValueError, match=r"launch\.backend=nccl: this machine has no CUDA device; set .*=gloo"):
        choose_backend(LaunchConfig(backend="nccl"), torch.device("cpu"))


def train_here(folder: str, batch: int, ep_size: int) -> list[float]:
    training = TRAINING | {"per_device_train_batch_size": batch, "ep_size": ep_size}
    return MoETrainer(model_config=MODEL, training_config=training, output_dir=folder).train(TEXTS).losses


@pytest.mark.dist
def test_ranks_that_are_connected_train_together(tmp_path: Path) -> None:
    """Seen to fail with one process as the default: each rank trained alone, and the second found the folder taken."""
    alone = train_here(str(tmp_path / "one"), 8, 1)
    for found in run_ranks(train_here, 2, str(tmp_path / "two"), 4, 2):
        assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
@pytest.mark.dist
def test_a_program_started_by_torchrun(tmp_path: Path) -> None:
    program = f"from test_python_api import train_here; train_here({str(tmp_path / 'run')!r}, 4, 2)"
    (tmp_path / "program.py").write_text(program)
    root = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (root, root / "tests", Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONFAULTHANDLER"] = "1"  # it has been seen to abort at its end, once
    subprocess.run([*command, str(tmp_path / "program.py")], env=environment, timeout=240, check=True)
    (info,) = records(tmp_path / "run", "run")
    assert info["world_size"] == 2
    assert len(records(tmp_path / "run", "train")) == 3


def test_data_from_the_program_is_called_so(tmp_path: Path) -> None:
    """Seen to fail with the configured source in sentence and config.yaml, which nothing was read from."""
    MoETrainer(model_config=MODEL, training_config=TRAINING, output_dir=tmp_path / "run").train(TEXTS)
    (info,) = records(tmp_path / "run", "run")
    assert "on data given by the program (" in info["sentence"]
    assert load_config(tmp_path / "run" / "config.yaml").data.source == "memory"
    with pytest.raises(ValueError, match=r"data\.source=memory: data that a program gives"):
        MoETrainer(tmp_path / "run" / "config.yaml").train()


class TwoMatrices(Expert):
    """With biases and without a gate: not as many parameters as the built-in expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.up, self.down = nn.Linear(hidden_size, intermediate_size), nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def test_own_classes_are_counted(tmp_path: Path) -> None:
    """Seen to fail with the counts of the built-in expert."""
    model = MODEL | {"expert": f"{__name__}:TwoMatrices"}
    trainer = MoETrainer(model_config=model, training_config=TRAINING | {"freeze_router": True}, output_dir=tmp_path)
    trainer.train(TEXTS)
    (info,) = records(tmp_path, "run")
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    experts, routers = 2 * 4 * (2 * 32 * 32 + 32 + 32), 2 * 4 * 32
    assert (info["total_params"], info["trainable_params"]) == (total, total - routers)
    assert info["active_params"] == total - experts // 2


@pytest.fixture
def hub_dataset(tmp_path: Path) -> Path:
    """A dataset as on the Hub: a folder with two configurations, one of them with a row that has no text."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"text": text} for text in TEXTS]
    (folder / "small.jsonl").write_text("\n".join(map(json.dumps, rows[:6])))
    (folder / "large.jsonl").write_text("\n".join(map(json.dumps, [*rows[:9], {"text": None}, *rows[9:]])))
    names = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("small", "large"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
    return folder


def from_hub(folder: Path, dataset: Path, **options: Any) -> TrainingResult:
    data = {"source": "huggingface", "name": str(dataset), "config_name": "large"}
    return MoETrainer(data | options, model_config=MODEL, output_dir=folder).train()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_dataset_of_the_hub(
    tmp_path: Path, hub_dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read whole and as a stream, the configuration by name; a stream ends, is evaluated, and tells what it left out.

    Seen to fail without the passes counted (it went on for ever), without what was skipped kept over passes, and with
    validation_path read as another dataset.
    """
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"text": TEXTS[0]}))
    small = from_hub(tmp_path / "small", hub_dataset, **TRAINING | {"config_name": "small", "max_steps": 1})
    assert small.steps == 1
    capsys.readouterr()
    options = TRAINING | {"max_steps": -1, "max_time": 600.0, "eval_steps": 4, "validation_path": str(held_out)}
    options |= {"per_device_train_batch_size": 16, "learning_rate": 3e-3}
    stream = from_hub(tmp_path / "stream", hub_dataset, **options, streaming=True)
    assert stream.reason == "the stream has been read 1 times"
    num_samples = sum(len(text) + 1 for text in TEXTS) // 32
    assert num_samples // 16 <= stream.steps <= num_samples // 16 + 2
    assert "1 documents could not be read" in capsys.readouterr().err
    evaluations = records(tmp_path / "stream", "eval")
    assert len(evaluations) >= 2
    assert evaluations[0]["tokens"] == pytest.approx(len(TEXTS[0]), abs=1)
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]


def test_held_out_files_beside_another_source(tmp_path: Path) -> None:
    """Seen to fail with the files ignored: the library was held out from itself."""
    (tmp_path / "held_out.txt").write_text("x" * 100)
    given = {"limit": 3, "validation_path": str(tmp_path / "*.txt")}
    datasets = build_datasets(MoETrainer({"data": given}, model_config=MODEL, training_config=TRAINING).config)
    assert isinstance(datasets.train, PackedDataset)
    assert datasets.train.num_tokens > 1000
    assert datasets.validation is not None
    assert datasets.validation.num_tokens == 101
