"""Configurations that load: numbers, spellings, overrides, inheritance, and the way back to a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_files import complaint, get, load

from moe_dist.config import (
    ALIASES,
    FIELDS,
    HOMES,
    Config,
    ConfigError,
    config_difference,
    config_reference,
    dump_config,
    load_config,
    load_mapping,
    parse_yaml,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1e6", 1e6),
        ("1.5E+2", 150.0),
        (".5", 0.5),
        ("2", 2.0),
        ("'1e-4'", 1e-4),
        ("1_000", 1000.0),
    ],
)
def test_numbers_are_yaml_1_2(tmp_path: Path, text: str, value: float) -> None:
    assert load(tmp_path, f"optimizer: {{learning_rate: {text}}}")[0].optimizer.learning_rate == value


def test_words_stay_words_and_whole_floats_are_counts(tmp_path: Path) -> None:
    text = "train: {sample_prompt: no, output_dir: 2026-11-21, max_steps: 1e3, seed: 010}"
    train = load(tmp_path, text)[0].train
    assert (train.sample_prompt, str(train.output_dir), train.max_steps, train.seed) == (
        "no",
        "2026-11-21",
        1000,
        10,
    )


ALIASED = """
ddp_backend: nccl  =>  launch.backend=nccl
min_lr: 1e-5  =>  optimizer.min_learning_rate=1e-5
train: {save_steps: 7}  =>  checkpoint.save_steps=7
training: {warmup_steps: 1000}  =>  optimizer.warmup_steps=1000
load_balancing: {loss_coef: 0.1}  =>  balance.router_aux_loss_coef=0.1
moe: {use_auxiliary_loss: false}  =>  balance.use_auxiliary_loss=false
moe: {freeze_router: true}  =>  balance.freeze_router=true
validation: {validation_split: 0.1}  =>  data.validation_split=0.1
advanced: {torch_compile: true}  =>  train.torch_compile=true
advanced: {use_cpu_offload: false}  =>  parallel.cpu_offload=false
distributed: {expert_parallel_size: 4}  =>  parallel.ep_size=4
logging: {logging_steps: 50}  =>  monitor.logging_steps=50
max_seq_length: 64  =>  data.max_seq_length=64
"""
SPELLINGS = [line.split("  =>  ") for line in ALIASED.strip().splitlines()]
for alias, full in ALIASES.items():
    if alias not in ("ddp_backend", "min_lr", "resume_from_checkpoint", "use_cpu_offload") and "from_" not in full:
        values = {
            "parallel.pp_size": 1,
            "lora.dropout": 0.5,
            "lora.rslora": "true",
            "lora.target_modules": "all-linear",
        }
        value = values.get(full, 4)
        SPELLINGS += [[f"{full.split('.')[0]}: {{{alias}: {value}}}", f"{full}={value}"]]


@pytest.mark.parametrize(("text", "meaning"), SPELLINGS, ids=[text for text, _ in SPELLINGS])
def test_other_spellings_are_read_with_a_notice(tmp_path: Path, text: str, meaning: str) -> None:
    config, notices = load(tmp_path, text)
    key, _, value = meaning.partition("=")
    assert get(config, key) == parse_yaml(value)
    assert [f" is read as {key}" in notice for notice in notices] == [True]


VALUES = """
train: {mixed_precision: bf16}  =>  train.bf16=true  =>  train.mixed_precision=bf16 is read as train.bf16=true
training: {mixed_precision: true}  =>  train.bf16=true  =>  training.mixed_precision=true is read as train.bf16=true
mixed_precision: no  =>  train.bf16=false  =>  mixed_precision=no is read as train.bf16=false
resume_from_checkpoint: true  =>  checkpoint.resume=auto  =>  read as checkpoint.resume=auto
resume_from_checkpoint: false  =>  checkpoint.resume=never  =>  read as checkpoint.resume=never
train: {resume_from_checkpoint: 500}  =>  checkpoint.resume="500"  =>  is read as checkpoint.resume
train: {resume_from_checkpoint: a/b}  =>  checkpoint.resume=a/b  =>  is read as checkpoint.resume
attn_implementation: flash_attention_2  =>  model.attn_implementation=sdpa  =>  model.attn_implementation=sdpa
optimizer: {warmup_steps: 0.03}  =>  optimizer.warmup_ratio=0.03  =>  is read as optimizer.warmup_ratio
gradient_checkpointing: true  =>  train.gradient_checkpointing=full  =>  is read as train.gradient_check
moe: {log_expert_metrics: true}  =>  train.seed=42  =>  always recorded
"""


@pytest.mark.parametrize("line", VALUES.strip().splitlines())
def test_values_other_trainers_write(tmp_path: Path, line: str) -> None:
    text, meaning, notice = line.split("  =>  ")
    config, notices = load(tmp_path, text)
    key, _, value = meaning.partition("=")
    assert get(config, key) == parse_yaml(value)
    assert [notice in said for said in notices] == [True]


def test_the_notice_is_exact_and_its_own_spelling_needs_none(tmp_path: Path) -> None:
    expected = ["model.experts_per_token is read as model.num_experts_per_tok"]
    assert load(tmp_path, "model: {experts_per_token: 2}")[1] == expected
    assert load(tmp_path, "model: {experts_per_token: 2, num_experts_per_tok: 2}")[1] == expected
    assert load(tmp_path, "model: {num_experts_per_tok: 2}\ndata:\nlogging:")[1] == []


def test_notices_go_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("lr: 1e-3")
    load_config(tmp_path / "run.yaml")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "note: lr is read as optimizer.learning_rate\n")


def test_override_forms(tmp_path: Path) -> None:
    overrides = (
        "train.seed=1",
        "--model.num_experts=8",
        "--parallel.ep_size",
        "4",
        "learning_rate=1e-4",
        "--weight-decay=0.2",
        "--train.max_steps",
        "-1",
        "data.path=*.txt",
        "data.source=text",
        "model.mlp_only_layers=[0, 1]",
        "data.limit=",
        "train.seed=2",
    )
    config, notices = load(tmp_path, "train: {seed: 0}\ndata: {limit: 5}", overrides)
    assert (config.train.seed, config.model.num_experts, config.parallel.ep_size) == (2, 8, 4)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (1e-4, 0.2)
    assert (config.data.path, config.model.mlp_only_layers, config.data.limit) == ("*.txt", [0, 1], None)
    assert notices == [
        "learning_rate is read as optimizer.learning_rate",
        "weight_decay is read as optimizer.weight_decay",
    ]


def test_inheritance(tmp_path: Path) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "root.yaml").write_text("model: {num_layers: 2, mlp_only_layers: [0, 1]}\nlr: 1e-2")
    (tmp_path / "presets" / "mid.yaml").write_text("base: root.yaml\nmodel: {mlp_only_layers: [1]}\ntrain: {seed: 3}")
    (tmp_path / "other.yaml").write_text("train: {seed: 4}")
    text = "base: [presets/mid.yaml, other.yaml]\noptimizer: {weight_decay: 0.5}"
    config, _ = load(tmp_path, text, ("model.hidden_size=64",))
    assert (config.model.num_hidden_layers, config.model.mlp_only_layers, config.model.hidden_size) == (
        2,
        [1],
        64,
    )
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay, config.train.seed) == (
        1e-2,
        0.5,
        4,
    )
    (tmp_path / "other.yaml").write_text("train: {seed: -4}")
    assert "other.yaml)" in complaint(tmp_path, text)


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(max_size=20),
    rate=st.floats(1e-12, 1e3),
    resume=st.sampled_from(["1e4", "yes", "null", "1_000", "010", "<<", "=", "~", "0x1F", "2026-11-21", "a: b", "-"]),
    layers=st.lists(st.integers(0, 7), max_size=3),
)
def test_a_dump_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, rate: float, resume: str, layers: list[int]
) -> None:
    config = Config()
    config.train.sample_prompt, config.checkpoint.resume = prompt, resume
    config.optimizer.learning_rate, config.model.mlp_only_layers = rate, layers
    again, notices = load(tmp_path_factory.getbasetemp(), dump_config(config))
    assert (again, notices, config_difference(config, again)) == (config, [], [])


def test_config_difference() -> None:
    other = Config.model_validate({"train": {"seed": 7}, "model": {"rope_theta": 1e6}})
    assert config_difference(Config(), other) == [("model.rope_theta", 10000.0, 1e6), ("train.seed", 42, 7)]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_run_files_load_without_a_notice_and_are_short(file: Path, tmp_path: Path) -> None:
    notices: list[str] = []
    config = load_config(file, notice=notices.append)
    assert notices == []
    assert len(file.read_text().splitlines()) < 40
    assert load(tmp_path, dump_config(config))[0] == config


def test_every_key_has_one_home_and_a_meaning() -> None:
    assert len(HOMES) == len(FIELDS)
    assert not ALIASES.keys() & HOMES.keys()
    assert set(ALIASES.values()) <= FIELDS.keys()
    assert all(field.description for field in FIELDS.values())


def test_the_manual_is_up_to_date() -> None:
    manual = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    assert config_reference() in manual, "run the command at the end of docs/configuration.md"


def test_a_group_of_keys_inside_a_section(tmp_path: Path) -> None:
    """`monitor.prometheus.port` from the command line, from a file in two ways, and over a base file, key by key."""
    (tmp_path / "base.yaml").write_text("monitor: {prometheus: {port: 9100, host: 0.0.0.0}}")
    config, notices = load(tmp_path, "base: base.yaml", ("monitor.prometheus.port=9400", "prometheus.per_expert=top"))
    found = config.monitor.prometheus
    assert (found.port, found.host, found.per_expert, notices) == (9400, "0.0.0.0", "top", [])
    assert config_difference(Config(), config) == [
        ("monitor.prometheus.port", None, 9400),
        ("monitor.prometheus.host", "127.0.0.1", "0.0.0.0"),
        ("monitor.prometheus.per_expert", "full", "top"),
    ]
    assert load(tmp_path, dump_config(config))[0] == config
    for text, words in (
        ("monitor: {prometheus: 9400}", "monitor.prometheus=9400: a group of keys; allowed: monitor.prometheus."),
        (
            "monitor: {prometheus: {prot: 1}}",
            "monitor.prometheus.prot=1: unknown key; nearest: monitor.prometheus.",
        ),
        (
            "monitor: {prometheus: {port: 70000}}",
            "monitor.prometheus.port=70000: a whole number, 0 or more and at",
        ),
        ("monitor: {prometheus: {port: true}}", "monitor.prometheus.port=true: a whole number"),
        ("monitor: {prometheus: {per_expert: all}}", "monitor.prometheus.per_expert='all': one of full, layer, top"),
    ):
        assert complaint(tmp_path, text).startswith(words)


@pytest.mark.parametrize(
    ("name", "rate", "decay", "accumulation", "epochs"),
    [("conservative", 1e-4, 0.1, 32, 5), ("balanced", 2e-4, 0.01, 16, 3), ("aggressive", 3e-4, 0.001, 8, 2)],
)
def test_presets(name: str, rate: float, decay: float, accumulation: int, epochs: int) -> None:
    """Seen to fail with rates up to 1e-3, and 16 micro-batches and one epoch as the careful choice."""
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (rate, decay)
    assert (config.train.gradient_accumulation_steps, config.train.num_train_epochs) == (accumulation, epochs)


def test_off_is_a_word_though_other_readers_of_yaml_say_false() -> None:
    config = load_mapping({"parallel": {"expert_placement": False}, "balance": {"act": False}})
    assert (config.parallel.expert_placement, config.balance.act) == ("off", "off")
    with pytest.raises(ConfigError, match=r"parallel\.expert_placement=true"):
        load_mapping({"parallel": {"expert_placement": True}})
