"""Configurations: what loads, under which names, and the one line that everything else ends with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.config import Config
from moe_dist.config_loading import (
    ALIASES,
    FIELDS,
    HOMES,
    ConfigError,
    config_difference,
    config_reference,
    dump_config,
    load_config,
    parse_yaml,
)

ROOT = Path(__file__).parent.parent
QWEN3: dict[str, object] = json.loads("""{
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "torch_dtype": "bfloat16",
    "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": true, "mlp_only_layers": [1],
    "max_position_embeddings": 512, "rope_theta": 1e6, "rope_scaling": null, "rms_norm_eps": 1e-6,
    "router_aux_loss_coef": 0.002, "sliding_window": 4096, "use_sliding_window": false, "qkv_bias": false,
    "use_qk_norm": true}""")
MIXTRAL: dict[str, object] = json.loads("""{
    "model_type": "mixtral", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 1024, "rope_theta": 1e6,
    "router_aux_loss_coef": 0.02, "router_jitter_noise": 0.1, "sliding_window": null}""")


def load(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> tuple[Config, list[str]]:
    """The configuration in `text`, and the notices on the way."""
    file = folder / "run.yaml"
    file.write_text(text)
    notices: list[str] = []
    return load_config(file, overrides, notice=notices.append), notices


def get(config: Config, key: str) -> object:
    section, _, leaf = key.partition(".")
    return getattr(getattr(config, section), leaf)


def complaint(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1200
    return message


# A bad file a line (⏎ new line, → tab), and pieces its error must hold: key, value, what is allowed.
BAD = """
model: {num_expert: 4}  =>  model.num_expert=4: unknown key; nearest: model.num_experts (  &  run.yaml)
train: {learning_rat: 1}  =>  train.learning_rat=1  &  nearest: optimizer.learning_rate
modle: {num_experts: 4}  =>  modle: unknown section; nearest: model;  &  model, data, parallel
lora: {r: 16}  =>  lora: unknown section  &  allowed: model, data
train: {use_cpu_offload: true}  =>  train.use_cpu_offload=true: unknown key
zzzz: 1  =>  zzzz=1: unknown key  &  allowed: the sections model
launch: {zzzz: 1}  =>  launch.zzzz=1  &  allowed in launch: nproc_per_node
model: {name: some/model}  =>  model.name='some/model': unknown key  &  nearest: data.name
advanced: {auto_find_batch_size: true}  =>  advanced.auto_find_batch_size=true  &  unknown key
1: 2  =>  1=2: unknown key
model: {num_experts: many}  =>  model.num_experts='many': a whole number, 0 or more (  &  run.yaml)
model: {hidden_size: 12.5}  =>  model.hidden_size=12.5: a whole number above 0
model: {hidden_size: [1, 2]}  =>  model.hidden_size=[1, 2]: a whole number above 0
model: {hidden_size: {a: 1}}  =>  model.hidden_size={'a': 1}: a whole number above 0
model: {hidden_size: true}  =>  model.hidden_size=true: a whole number above 0
model: {hidden_size: null}  =>  model.hidden_size=null: a whole number above 0
model: {mlp_only_layers: 3}  =>  model.mlp_only_layers=3: a list, each entry a whole number, 0 or more
model: {mlp_only_layers: [true]}  =>  model.mlp_only_layers=[True]: a list
monitor: {tensorboard: yes}  =>  monitor.tensorboard='yes': true or false
monitor: {tensorboard: on}  =>  monitor.tensorboard='on': true or false
monitor: {tensorboard: 1}  =>  monitor.tensorboard=1: true or false
data: {tokenizer: 5}  =>  data.tokenizer=5: text
data: {path: 5}  =>  data.path=5: text or a list, each entry text or null
optimizer: {learning_rate: fast}  =>  optimizer.learning_rate='fast': a number above 0
optimizer: {learning_rate: true}  =>  optimizer.learning_rate=true: a number above 0
train: 5  =>  train=5: a section, with its keys indented under it
model: big  =>  model='big': a section
checkpoint: {resume: true}  =>  checkpoint.resume=true: text
model: {num_hidden_layers: -1}  =>  model.num_hidden_layers=-1: a whole number above 0
train: {per_device_train_batch_size: 0}  =>  train.per_device_train_batch_size=0  &  above 0
optimizer: {learning_rate: .nan}  =>  optimizer.learning_rate=nan: a number above 0
train: {max_grad_norm: .inf}  =>  train.max_grad_norm=inf: a number, 0 or more
optimizer: {learning_rate: 1e999}  =>  optimizer.learning_rate=inf: a number above 0
optimizer: {adam_beta2: 1.0}  =>  optimizer.adam_beta2=1.0: a number, 0 or more and below 1
train: {label_smoothing_factor: 2}  =>  train.label_smoothing_factor=2  &  at most 1
train: {max_steps: 0}  =>  train.max_steps=0: a positive number, or -1
train: {max_steps: -2}  =>  train.max_steps=-2: a whole number, -1 or more
optimizer: {optim: adam}  =>  optimizer.optim='adam': one of adamw_torch_fused, adamw_torch, adafactor, sgd
train: {fp16: true}  =>  train.fp16=true: only false  &  use bf16
train: {mixed_precision: fp16}  =>  train.fp16=true: only false  &  use bf16
train: {mixed_precision: fp8}  =>  train.mixed_precision='fp8': one of bf16, no
parallel: {pp_size: 2}  =>  parallel.pp_size=2: only 1  &  one stage
parallel: {zero_stage: true}  =>  parallel.zero_stage=true: only 0
parallel: {pipeline_parallel_size: 4}  =>  parallel.pp_size=4: only 1
model: {attn_implementation: flash}  =>  model.attn_implementation='flash': one of sdpa, eager
moe: {monitor_expert_usage: false}  =>  moe.monitor_expert_usage=false: only true  &  always recorded
model: {num_experts: 4, top_k: 5}  =>  model.num_experts_per_tok=5: at most num_experts=4
model: {num_experts_per_tok: 1}  =>  model.norm_topk_prob=true  &  set norm_topk_prob=false
model: {num_key_value_heads: 3}  =>  model.num_key_value_heads=3  &  =8 (allowed: 1, 2, 4, 8)
model: {hidden_size: 100}  =>  model.hidden_size=100: not divisible by num_attention_heads=8
model: {head_dim: 33}  =>  model.head_dim=33: must be even
model: {mlp_only_layers: [8]}  =>  model.mlp_only_layers=[8]  &  past num_hidden_layers=8
model: {n_group: 3}  =>  model.n_group=3: must divide num_experts=16
data: {max_seq_length: 9999}  =>  data.max_seq_length=9999: at most model.max_position_embeddings=4096
parallel: {ep_size: 3}  =>  parallel.ep_size=3: must divide model.num_experts=16 (allowed: 1, 2, 4, 8, 16)
model: {num_experts: 0}⏎parallel: {ep_size: 2}  =>  parallel.ep_size=2: the model has no expert layer
data: {source: jsonl}  =>  data.path=null: source=jsonl needs data.path
data: {source: huggingface}  =>  data.name=null
data: {streaming: true}  =>  data.streaming=true: only for source=huggingface
train: {bf16: true, pure_bf16: true}  =>  train.pure_bf16=true: choose one
train: {early_stopping_patience: 3}  =>  train.early_stopping_patience: needs train.eval_steps
optimizer: {lr: 1e-4, min_lr: 1e-3}  =>  optimizer.min_learning_rate=0.001: at most learning_rate=0.0001
launch: {backend: nccl, device: cpu}  =>  launch.backend=nccl  &  use gloo
model: {num_layers: 2, num_hidden_layers: 3}  =>  model.num_layers=2 and model.num_hidden_layers=3: both mean
lr: 1⏎optimizer: {learning_rate: 2}  =>  lr=1 and optimizer.learning_rate=2: both mean optimizer.learning_rate
model: {hidden_size: x, num_experts: y, head_dim: -1}  =>  model.hidden_size='x'  &  (and 2 more)
- 1⏎- 2  =>  [1, 2] instead of a mapping
just text  =>  'just text' instead of a mapping
model: {a: 1  =>  run.yaml:1: not valid YAML  &  flow mapping
model:⏎→hidden_size: 1  =>  run.yaml:2: not valid YAML  &  cannot start any token
train: {seed: 1}⏎model: {}⏎train: {}  =>  run.yaml:3: key 'train' again, first on line 1
train:⏎  seed: 1⏎  seed: 2  =>  run.yaml:3: key 'seed' again, first on line 2
a: 1⏎---⏎b: 2  =>  run.yaml:2: not valid YAML  &  single document
model: !!python/object:os.system {}  =>  run.yaml:1: not valid YAML  &  python/object
? [a, b]⏎: 1  =>  run.yaml:1: a key that is a list or a mapping
a: &a [*a]  =>  run.yaml:1: an alias that refers to itself
model: {hidden_size: !!int abc}  =>  run.yaml:1: not valid YAML
monitor: {tensorboard: !!bool 1}  =>  run.yaml:1: not valid YAML
base: nowhere.yaml  =>  base='nowhere.yaml' (  &  no such file; nearest: run.yaml
base: run.yaml  =>  base='run.yaml' (  &  in a circle (run.yaml -> run.yaml)
base: 5  =>  base=5: the path of a YAML file
model: {from: nowhere/config.json}  =>  model.from='nowhere/config.json': no such file
model: {from: 7}  =>  model.from=7: a config.json, or the folder it is in
"""
BAD_FILES = [
    line.replace("⏎", "\n").replace("→", "\t").split("  =>  ") for line in BAD.strip().splitlines()
] + [
    ["", "an empty file; allowed: sections"],
    ["a: " + "[" * 5000, "run.yaml:1: nested too deep"],
    ["train: {seed: " + "9" * 5000 + "}", "run.yaml:1: not valid YAML"],
    ["# " + "x" * 1_000_001, "run.yaml: over 1,000,000 bytes"],
    ['base: "a\\0b"', "null byte"],
]


@pytest.mark.parametrize(("text", "pieces"), BAD_FILES, ids=[pieces[:40] for _, pieces in BAD_FILES])
def test_a_bad_configuration_ends_with_one_clear_line(tmp_path: Path, text: str, pieces: str) -> None:
    message = complaint(tmp_path, text)
    for piece in pieces.split("  &  "):
        assert piece in message


@pytest.mark.parametrize(
    ("overrides", "piece"),
    [
        (("model.num_experts=-4",), "model.num_experts=-4: a whole number, 0 or more (command line)"),
        (("parallel.ep_size=5",), "parallel.ep_size=5: must divide model.num_experts=16"),
        (("train.sed=1",), "train.sed=1: unknown key; nearest: train.seed (command line)"),
        (("seed",), "'seed': not an override; allowed: section.key=value"),
        (("--train.seed",), "'--train.seed': an override without a value"),
        (("--train.seed", "--train.bf16"), "'--train.seed': an override without a value"),
        (("model..x=1",), "'model..x=1': not a key"),
        (("base=x.yaml",), "`base` only inside a file"),
        (("data.path=[a",), "data.path='[a': not valid YAML"),
        (("train.seed.deep=1",), "train.seed={'deep': 1}: a whole number"),
    ],
)
def test_bad_overrides(tmp_path: Path, overrides: tuple[str, ...], piece: str) -> None:
    assert piece in complaint(tmp_path, "train: {seed: 1}", overrides)


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    levels = ["a0: &a0 [1, 2]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    assert "over 10,000 values once aliases are written out" in complaint(tmp_path, "\n".join(levels))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("train: {seed: 1}")
    for path, piece in (
        (tmp_path / "dmeo.yaml", "no such file; nearest: demo.yaml"),
        (tmp_path / "none" / "x.yaml", "no such file, and no folder"),
        (tmp_path, "a folder; name a file in it (demo.yaml)"),
    ):
        with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
            load_config(path)
        assert piece in str(caught.value)
    (tmp_path / "latin.yaml").write_bytes(b"train: {output_dir: caf\xe9}")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(tmp_path / "latin.yaml")


def test_a_longer_circle_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: run.yaml")
    assert "(run.yaml -> a.yaml -> b.yaml -> run.yaml)" in complaint(tmp_path, "base: a.yaml")


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
distributed: {expert_parallel_size: 4}  =>  parallel.ep_size=4
logging: {logging_steps: 50}  =>  monitor.logging_steps=50
max_seq_length: 64  =>  data.max_seq_length=64
"""
SPELLINGS = [line.split("  =>  ") for line in ALIASED.strip().splitlines()]
for alias, full in ALIASES.items():
    if alias not in ("ddp_backend", "min_lr", "resume_from_checkpoint"):
        value = 1 if full == "parallel.pp_size" else 4
        SPELLINGS += [[f"{full.split('.')[0]}: {{{alias}: {value}}}", f"{full}={value}"]]


@pytest.mark.parametrize(("text", "meaning"), SPELLINGS, ids=[text for text, _ in SPELLINGS])
def test_other_spellings_are_read_with_a_notice(tmp_path: Path, text: str, meaning: str) -> None:
    config, notices = load(tmp_path, text)
    key, _, value = meaning.partition("=")
    assert get(config, key) == parse_yaml(value)
    assert [f" is read as {key}" in notice for notice in notices] == [True]


VALUES = """
train: {mixed_precision: bf16}  =>  train.bf16=true  =>  train.mixed_precision=bf16 is read as train.bf16=true
mixed_precision: no  =>  train.bf16=false  =>  mixed_precision=no is read as train.bf16=false
resume_from_checkpoint: true  =>  checkpoint.resume=auto  =>  read as checkpoint.resume=auto
resume_from_checkpoint: false  =>  checkpoint.resume=never  =>  read as checkpoint.resume=never
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
    (tmp_path / "presets" / "root.yaml").write_text(
        "model: {num_layers: 2, mlp_only_layers: [0, 1]}\nlr: 1e-2"
    )
    (tmp_path / "presets" / "mid.yaml").write_text(
        "base: root.yaml\nmodel: {mlp_only_layers: [1]}\ntrain: {seed: 3}"
    )
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


def hugging(folder: Path, contents: dict[str, object]) -> str:
    (folder / "hf").mkdir(exist_ok=True)
    (folder / "hf" / "config.json").write_text(json.dumps(contents))
    return "model: {from: hf}"


def test_qwen3_config_json(tmp_path: Path) -> None:
    model = load(tmp_path, hugging(tmp_path, QWEN3))[0].model
    for key in QWEN3.keys() & type(model).model_fields.keys():
        assert getattr(model, key) == QWEN3[key]
    assert model.qk_norm
    renamed = {
        **QWEN3,
        "num_local_experts": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    del renamed["num_experts"], renamed["rope_theta"], renamed["rope_scaling"]
    assert load(tmp_path, hugging(tmp_path, renamed))[0].model == model
    del renamed["norm_topk_prob"]
    own = "model: {from: hf/config.json, num_hidden_layers: 2}\nbalance: {router_aux_loss_coef: 0.5}"
    hugging(tmp_path, renamed)
    config, _ = load(tmp_path, own, ("model.mlp_only_layers=[]",))
    assert (config.model.num_hidden_layers, config.model.mlp_only_layers) == (2, [])
    assert (config.balance.router_aux_loss_coef, config.model.norm_topk_prob) == (0.5, False)


def test_mixtral_config_json(tmp_path: Path) -> None:
    config = load(tmp_path, hugging(tmp_path, MIXTRAL))[0]
    model = config.model
    assert (model.num_experts, model.moe_intermediate_size, model.qk_norm, model.norm_topk_prob) == (
        8,
        128,
        False,
        True,
    )
    assert (model.rms_norm_eps, model.head_size) == (1e-5, 16)
    assert (config.balance.router_aux_loss_coef, config.balance.router_jitter) == (0.02, 0.1)


@pytest.mark.parametrize(
    ("contents", "piece"),
    [
        ({**QWEN3, "model_type": "llama"}, "model_type='llama'"),
        ({**QWEN3, "model_type": ["mixtral"]}, "allowed: mixtral, qwen3_moe"),
        (
            {**QWEN3, "rope_scaling": {"rope_type": "yarn", "factor": 4}},
            "rope_scaling.rope_type='yarn': only",
        ),
        ({**QWEN3, "use_sliding_window": True}, "sliding_window=4096: only null"),
        ({**MIXTRAL, "sliding_window": 4096}, "sliding_window=4096: only null"),
        ({**QWEN3, "layer_types": ["full_attention", "sliding_attention"]}, "only full_attention"),
        ({**QWEN3, "attention_bias": True}, "attention_bias=true: only false"),
        ({**QWEN3, "kv_lora_rank": 5}, "kv_lora_rank=5: unknown key in a qwen3_moe model"),
        ({**QWEN3, "hidden_act": "gelu"}, "model.hidden_act='gelu': only silu"),
        ({k: v for k, v in QWEN3.items() if k != "hidden_size"}, "has no hidden_size"),
        ({k: v for k, v in MIXTRAL.items() if k != "rope_theta"}, "has no rope_theta"),
        ({**QWEN3, "num_experts_per_tok": 9}, "model.num_experts_per_tok=9: at most num_experts=8"),
    ],
)
def test_config_json_of_another_model(tmp_path: Path, contents: dict[str, object], piece: str) -> None:
    message = complaint(tmp_path, hugging(tmp_path, contents))
    assert piece in message
    assert "config.json" in message


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(max_size=20),
    rate=st.floats(1e-12, 1e3),
    resume=st.sampled_from(
        ["1e4", "yes", "null", "1_000", "010", "<<", "=", "~", "0x1F", "2026-11-21", "a: b", "-"]
    ),
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
