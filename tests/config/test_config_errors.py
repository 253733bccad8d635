"""Bad files and overrides: each ends with one line that says key, value, what is allowed and where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_files import complaint

from moe_dist.config import ALIASES, FIELDS, HOMES, SECTIONS, ConfigError, load_config
from moe_dist.config.not_offered import instead_of

# A bad file a line (⏎ new line, → tab), and pieces its error must hold: key, value, what is allowed.
BAD = """
model: {num_expert: 4}  =>  model.num_expert=4: unknown key; nearest: model.num_experts (  &  run.yaml)
train: {learning_rat: 1}  =>  train.learning_rat=1  &  nearest: optimizer.learning_rate
modle: {num_experts: 4}  =>  modle: unknown section; nearest: model;  &  model, data, parallel
use_peft: true  =>  use_peft=true: not offered yet; there is: lora.r above 0 trains adapters
wand: {project: x}  =>  wand: unknown section  &  allowed: model, data
train: {report_to: wandb}  =>  train.report_to='wandb': not offered yet; there is: monitor.tensorboard  &  run.yaml
lora: {r: 8, target_modules: [q_prj]}  =>  lora.target_modules=['q_prj']: q_prj: did you mean q_proj?
lora: {r: 8, target_modules: [w1]}  =>  lora.target_modules=['w1']: w1 is a matrix of every expert: say experts
lora: {r: 8, target_modules: []}  =>  lora.target_modules=[]: nothing would be trained
{lora: {r: 8}, balance: {bias_update_rate: 0.1}}  =>  balance.bias_update_rate=0.1: moves a selection bias
{lora: {r: 8, target_modules: [gate]}, balance: {freeze_router: true}}  =>  balance.freeze_router=true: lora
{lora: {r: 8, target_modules: [lm_head]}, parallel: {pp_size: 2}}  =>  lora.target_modules=[lm_head]: with
lora: {merge_and_save: true}  =>  lora.merge_and_save=true: r=0 trains no adapters
{lora: {r: 8, merge_and_save: true}, checkpoint: {save_at_end: false}}  =>  lora.merge_and_save=true: adds the adapters
lora: {from_adapter: there}  =>  lora.from_adapter=
load_in_4bit: true  =>  load_in_4bit=true: not offered yet; there is: lora.quantize=nf4 or int8
lora: {quantize: nf4}  =>  lora.quantize=nf4: r=0 trains all weights, and only frozen ones can be in few bits
{lora: {r: 8, quantize: int8}, parallel: {zero_stage: 3}}  =>  lora.quantize=int8: parallel.engine=torch, zero_stage=3
{lora: {r: 8, quantize: int8}, train: {torch_compile: true}}  =>  lora.quantize=int8: train.torch_compile=true cannot
lora: {r: 8, quantize: int8, use_dora: true}  =>  lora.quantize=int8: lengths of rows would be
tp_size: 2  =>  tp_size=2: not offered yet; there is: parallel.ep_size
data: {format: preference}  =>  format=preference: source=stdlib has texts; set data.source=jsonl or parquet
{data: {format: preference, source: memory}, dpo: {reference: base}}  =>  dpo.reference=base: that is the model without
{data: {format: preference, source: memory}, train: {label_smoothing_factor: 0.1}}  =>  set dpo.label_smoothing
{data: {format: preference, source: memory, document_mask: false}}  =>  data.document_mask=false: answers of
{data: {format: preference, source: memory, streaming: true}, train: {max_steps: 9}}  =>  data.streaming=true: not with
{data: {format: preference, source: memory}, model: {router: expert_choice}}  =>  model.router=expert_choice: what
{data: {format: preference, source: memory}, balance: {router_temperature_steps: 9}}  =>  balance.router_temp
dpo: {beta: 0}  =>  dpo.beta=0: a number above 0
dpo: {loss_type: ipo}  =>  dpo.loss_type='ipo': only sigmoid
dpo: {label_smoothing: 0.5}  =>  dpo.label_smoothing=0.5
data: {format: chats}  =>  data.format='chats': one of auto, text, chat, prompt_completion
data: {format: chat}  =>  format=chat: source=stdlib has texts; set data.source=jsonl or parquet
sample_packing: true  =>  not offered yet; there is: data.packing
push_to_hub: true  =>  push_to_hub=true: not offered yet; there is: moe-dist export RUN --push ORG/NAME
train: {use_cpu_offload: true}  =>  parallel.cpu_offload=true: needs parallel.zero_stage=3
zzzz: 1  =>  zzzz=1: unknown key  &  allowed: the sections model
launch: {zzzz: 1}  =>  launch.zzzz=1  &  allowed in launch: nproc_per_node
model: {path: some/model}  =>  model.path='some/model': unknown key  &  nearest: data.path
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
data: {path: c/*.txt}  =>  data.path=c/*.txt: source=stdlib reads no files; set data.source=text  &  data.path=null
data: {path: {a: c/*.jsonl.gz, b: d.txt}}  =>  source=stdlib reads no files; set data.source=jsonl
data: {path: c/*.txt, source: huggingface, name: x}  =>  data.path=c/*.txt: source=huggingface reads no files
data: {name: x}  =>  data.name=x: source=stdlib has none; set data.source=huggingface, or data.name=null
data: {config_name: x, source: text, path: c}  =>  data.config_name=x: source=text has none
data: {streaming: true, source: huggingface, name: x}  =>  train.max_steps=-1: data.streaming=true has no length
data: {streaming: true, source: memory}⏎train: {max_steps: 9, eval_steps: 3}  =>  nothing is held out of a stream
data: {validation_split: 0}⏎train: {eval_steps: 3}  =>  train.eval_steps=3: nothing is held out; set data
model: {router: expert_choice, n_group: 2, topk_group: 2}  =>  model.router=expert_choice  &  not with n_group=2
model: {router: expert_choice, scoring_func: sigmoid}  =>  model.router=expert_choice  &  not with scoring_func=sigmoid
{model: {router: expert_choice}, balance: {bias_update_rate: 0.1}}  =>  balance.bias_update_rate=0.1: with model.router
{model: {router: expert_choice}, balance: {capacity_factor: 1.5}}  =>  balance.capacity_factor=1.5: with model.router
{model: {router: expert_choice}, balance: {fallback_expert: 1}}  =>  balance.fallback_expert=1: with model.router
balance: {fallback_expert: 16}  =>  balance.fallback_expert=16: below model.num_experts=16
balance: {router_temperature: 0}  =>  balance.router_temperature=0: a number above 0
data: {tokenizer: 5}  =>  data.tokenizer=5: a path or name
data: {path: 5}  =>  data.path=5: a path or name or a list, each entry a path or name or a mapping or null
optimizer: {learning_rate: fast}  =>  optimizer.learning_rate='fast': a number above 0
optimizer: {learning_rate: true}  =>  optimizer.learning_rate=true: a number above 0
train: 5  =>  train=5: a section, with its keys indented under it
model: big  =>  model='big': a section
checkpoint: {resume: true}  =>  checkpoint.resume=true: a path or name
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
train: {mixed_precision: fp16}  =>  train.fp16=true (written as mixed_precision): only false  &  use bf16
train: {mixed_precision: fp8}  =>  train.mixed_precision='fp8': one of bf16, no
parallel: {pp_size: 0}  =>  parallel.pp_size=0: a whole number above 0
parallel: {stages: [4, 4]}  =>  parallel.stages=[4, 4]: needs parallel.pp_size above 1
parallel: {pp_size: 2, stages: [4, 2, 2]}  =>  parallel.stages=[4, 2, 2]: 3 stages, parallel.schedule=1f1b  &  has 2
parallel: {pp_size: 2, stages: [4, 5]}  =>  parallel.stages=[4, 5]: 9 layers, model.num_hidden_layers=8
parallel: {pp_size: 2, stages: [8, 0]}  =>  parallel.stages=[8, 0]: a list, each entry a whole number above 0
parallel: {pp_size: 2, schedule: 1F1B}  =>  parallel.schedule='1F1B': one of gpipe, 1f1b
parallel: {pp_size: 9}  =>  parallel.pp_size=9: parallel.schedule=1f1b has 9 stages  &  model.num_hidden_layers=8
parallel: {pp_size: 5, schedule: dualpipe_v}  =>  has 10 stages of at least one layer
parallel: {zero_stage: true}  =>  parallel.zero_stage=true: one of 0, 1, 2, 3
parallel: {pipeline_parallel_size: 4}  =>  parallel.pp_size=4 ranks needs at least 4 micro-batches
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
train: {torch_compile: true, gradient_checkpointing: full}  =>  train.torch_compile=true: nothing is compiled where
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
BAD_FILES = [line.replace("⏎", "\n").replace("→", "\t").split("  =>  ") for line in BAD.strip().splitlines()] + [
    ["", "an empty file; allowed: sections"],
    ["a: " + "[" * 1200, "run.yaml:1: nested too deep"],
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


def test_data_in_an_object_store_is_not_a_pattern(tmp_path: Path) -> None:
    """Seen red: `matches no file: the folder '.' holds ...`, from every rank."""
    for text in ("path: 's3://bucket/a/*.jsonl'", "path: {a: ['s3://bucket/a/*.jsonl']}"):
        message = complaint(tmp_path, f"data: {{source: jsonl, {text}}}")
        assert message.startswith("data.path=s3://bucket/a/*.jsonl: files are read from this machine's folders")


def test_no_key_of_ours_is_said_to_be_missing() -> None:
    for name in (*SECTIONS, *HOMES, *ALIASES, *(full.rpartition(".")[2] for full in FIELDS)):
        assert instead_of(name) is None, name
