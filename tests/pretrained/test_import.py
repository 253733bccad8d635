"""`model.from_pretrained`: the weights of the folder, all of them, or one line that names what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import MODELS, random_weights, write_folder
from patches import Replace
from run_files import complaint, load
from safetensors.torch import load_file, save_file
from saved import TEXTS, found_at
from torch import Tensor

from moe_dist.checkpoint.reading import read_trainer_state
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.config import Config, ConfigError, dump_config, load_mapping
from moe_dist.models.huggingface import to_huggingface
from moe_dist.models.transformer import Transformer
from moe_dist.monitor.report.page import write_report
from moe_dist.parallel.mesh import Mesh
from moe_dist.pretrained import loading
from moe_dist.pretrained.loading import load_pretrained
from moe_dist.train import MoETrainer
from moe_dist.train.build import build_model

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


def loaded(folder: Path) -> Transformer:
    config = load_mapping({"model": {"from_pretrained": str(folder)}}, notice=lambda text: None)
    model = build_model(config, Mesh.single())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # what nothing sets stays so
    load_pretrained(model, config.model, Mesh.single())
    return model


@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_the_folders(name: str, dtype: torch.dtype, fused: bool, tmp_path: Path) -> None:
    """Bit by bit, from one file or three."""
    config = MODELS[name]
    weights = random_weights(config, dtype, fused)
    model = loaded(write_folder(tmp_path / "hf", config, weights, 1 if dtype == torch.float16 else 3))
    back = to_huggingface(model, config, fused=fused)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key].float()) for key in weights)
    if config.tie_word_embeddings:
        assert model.lm_head is not None
        assert model.embed_tokens is not None
        assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves(name: str, tmp_path: Path) -> None:
    """Logits too: here the file's names, layout and configuration are theirs, not ours."""
    transformers = pytest.importorskip("transformers")
    write_folder(tmp_path / "start", MODELS[name], random_weights(MODELS[name]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "start", attn_implementation="eager")
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    model = loaded(tmp_path / "hf")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        expected, found = theirs(ids).logits, model(ids)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def change(name: str, values: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """Replace a tensor of the file that holds it; None takes it out."""

    def damage(folder: Path) -> None:
        file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
        tensors = load_file(file)
        new = values(tensors.pop(name))
        save_file(tensors if new is None else tensors | {name: new.contiguous()}, file)

    return damage


def edit_index(edit: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        edit(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def in_first(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / FIRST).write_bytes(edit((folder / FIRST).read_bytes())) and None


def spoil(values: Tensor) -> Tensor:
    values.view(-1)[3] = float("nan")
    return values


UP, DOWN = "model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.experts.3.down_proj.weight"
GATE = "model.layers.0.mlp.gate.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (change(UP, lambda tensor: None), f"{UP}: missing"),
    "transposed": (change(DOWN, lambda tensor: tensor.T), f"{DOWN}: [12, 16] instead of [16, 12]"),
    "another-type": (change(GATE, lambda tensor: tensor.to(torch.int8)), f"{GATE}: type I8"),
    "nan": (change(DOWN, spoil), f"{DOWN}: a value that is not finite"),
    "truncated": (in_first(lambda content: content[:-7]), f"{FIRST}: damaged"),
    "empty": (in_first(lambda content: b""), f"{FIRST}: not a safetensors file: 0 bytes"),
    "header-larger-than-file": (
        in_first(lambda content: b"\xff\xff\xff\0\0\0\0\0" + content[8:]),
        "a header of 16777215",
    ),
    "no-file": (lambda folder: (folder / FIRST).unlink(), f"{FIRST}: [Errno 2]"),
    "index-elsewhere": (edit_index(lambda names: names.update({UP: FIRST, DOWN: FIRST})), f"in {INDEX} {FIRST}"),
    "index-outside": (edit_index(lambda names: names.update({UP: "../x.safetensors"})), "'../x.safetensors' is no saf"),
    "not-in-index": (edit_index(lambda names: names.pop(UP)), f"in {INDEX} not at all"),
    "index-no-json": (lambda folder: (folder / INDEX).write_text("{"), f"{INDEX}: cannot be read"),
    "twice": (
        lambda folder: save_file({UP: torch.zeros(12, 16), **load_file(folder / FIRST)}, folder / FIRST),
        f"{UP}: twice",
    ),
    "pickled": (
        lambda folder: [(folder / "pytorch_model.bin").touch(), *(f.unlink() for f in folder.glob("model*"))],
        "pytorch_model.bin is pickled, and loading it would run what it says; convert it",
    ),
    "no-weights": (lambda folder: [f.unlink() for f in folder.glob("model*")], "neither model.safetensors nor"),
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("folders") / "qwen"
    return write_folder(place, MODELS["qwen"], random_weights(MODELS["qwen"]), 3)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named_and_nothing_is_trained(damage: str, qwen: Path, tmp_path: Path) -> None:
    do, said = DAMAGES[damage]
    shutil.copytree(qwen, tmp_path / "hf")
    do(tmp_path / "hf")
    with pytest.raises(ValueError) as caught:
        loaded(tmp_path / "hf")
    assert said in str(caught.value)
    assert str(tmp_path / "hf") in str(caught.value)
    if damage in ("truncated", "empty", "header-larger-than-file", "no-file"):  # not each of the tensors in it, too
        assert "missing" not in str(caught.value)


def test_of_a_damaged_file_the_file_is_named(tmp_path: Path) -> None:
    """Seen red: the twenty tensors that were named as missing hid it."""
    write_folder(tmp_path / "hf", MODELS["qwen"], random_weights(MODELS["qwen"]))
    os.truncate(tmp_path / "hf" / "model.safetensors", 10_000)
    with pytest.raises(ValueError) as caught:
        loaded(tmp_path / "hf")
    assert "model.safetensors: damaged" in str(caught.value)
    assert "missing" not in str(caught.value)


def test_all_that_is_wrong_is_in_one_message(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, tmp_path / "hf")
    for damage in ("transposed", "another-type", "missing"):
        DAMAGES[damage][0](tmp_path / "hf")
    change("model.norm.weight", spoil)(tmp_path / "hf")
    with pytest.raises(ValueError) as caught:
        loaded(tmp_path / "hf")
    for name in (UP, DOWN, GATE, "model.norm.weight: a value that is not finite"):
        assert name in str(caught.value)


def test_a_head_of_its_own_in_a_tied_model(tmp_path: Path) -> None:
    config = MODELS["qwen-tied-dense-layer"]
    weights = random_weights(config)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    loaded(write_folder(tmp_path / "same", config, weights | head))
    head["lm_head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match="differs from the embedding"):
        loaded(write_folder(tmp_path / "other", config, weights | head))


def test_a_wrong_half_would_be_seen(qwen: Path, replace: Replace) -> None:
    """The comparison above can fail: gate and up of one expert exchanged while reading."""
    right, where = loading.SliceReader.read, json.loads((qwen / INDEX).read_text())["weight_map"]

    def swaps(self: Any, entry: Any, first: int, count: int) -> Tensor:
        name = entry.name.replace("1.mlp.experts.3.gate_proj", "1.mlp.experts.3.up_proj")
        return right(self, entry._replace(name=name, file=where[name]), first, count)

    replace(loading.SliceReader, "read", swaps)
    back = to_huggingface(loaded(qwen), MODELS["qwen"])
    weights = random_weights(MODELS["qwen"])
    assert [name for name in weights if not torch.equal(back[name], weights[name])] == [
        "model.layers.1.mlp.experts.3.gate_proj.weight"
    ]


# ---- the configuration


def test_the_section_is_the_folders(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, tmp_path / "hf")
    config, _ = load(tmp_path, "model: {from_pretrained: hf}")
    assert config.model.from_pretrained == str(tmp_path / "hf")  # relative to the file, and full from then on
    said = {"from_pretrained": str(tmp_path / "hf"), "model_type": "qwen3_moe"}
    same = MODELS["qwen"].model_copy(update=said)
    assert config.model == same
    # Keys of base files are replaced, as by model.from; on the command line in any order.
    (tmp_path / "base.yaml").write_text("model: {num_experts: 64, hidden_size: 8}")
    assert load(tmp_path, "base: base.yaml\nmodel: {from_pretrained: hf}")[0].model == same
    folder = f"from_pretrained={tmp_path / 'hf'}"
    assert load(tmp_path, "model: {num_experts: 64}", ("num_experts=6", folder))[0].model == same
    assert load(tmp_path, "model: {from_pretrained: hf, num_experts: 6, rope_theta: 5e4}")[0].model == same
    other = load(tmp_path, "model: {from_pretrained: hf, attention_dropout: 0.1, expert: swiglu_loop}")[0].model
    assert (other.attention_dropout, other.expert, other.num_experts) == (0.1, "swiglu_loop", 6)
    # A dump says all and needs the folder no more; but what it says must still be what a folder there says.
    dump = dump_config(config)
    assert load(tmp_path, dump)[0].model == same
    shutil.rmtree(tmp_path / "hf")
    assert load(tmp_path, dump)[0].model == same
    assert "from_pretrained='hf': no such file" in complaint(tmp_path, "model: {from_pretrained: hf}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {from_pretrained: hf, num_experts: 8}", "num_experts=8 instead of 6"),
        ("model: {from_pretrained: hf, rope_theta: 1e6, head_dim: 8}", "head_dim=8 instead of 6, rope_theta=1000000.0"),
        ("model: {from_pretrained: hf, scoring_func: sigmoid}", "scoring_func='sigmoid' instead of 'softmax'"),
        ("model: {from_pretrained: hf, router: expert_choice}", "router='expert_choice' instead of 'topk'"),
        ("model: {from_pretrained: hf, shared_expert_intermediate_size: 8}", "shared_expert_intermediate_size=8"),
        ("model: {from_pretrained: hf, from: hf}", "model.from and model.from_pretrained: both take a whole model"),
        ("model: {from_pretrained: 'nowhere://bucket/hf'}", "cannot be read: Protocol not known: nowhere"),
        ("model: {from_pretrained: 7}", "a folder with config.json and weights, org/name, or a URL"),
        ("model: {from_pretrained: quantised}", "its weights are quantised"),
        ("model: {from_pretrained: nowhere}", "from_pretrained='nowhere': no such file"),
    ],
)
def test_what_does_not_agree_is_refused_by_name(text: str, said: str, qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, tmp_path / "hf")
    write_folder(tmp_path / "quantised", MODELS["qwen"], {}, quantization_config={"quant_method": "fp8"})
    assert said in complaint(tmp_path, text)


def test_a_program_cannot_give_another_model_either(qwen: Path) -> None:
    config = Config.model_validate({"model": {"from_pretrained": str(qwen), "num_experts": 6}})
    with pytest.raises(ValueError, match=r"the run's model is another: .*hidden_size=512 instead of 16"):
        load_pretrained(Transformer(config.model), config.model, Mesh.single())


def test_the_tokenizer_is_the_folders_unless_said_otherwise(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, tmp_path / "hf")
    assert load(tmp_path, "model: {from_pretrained: hf}")[0].data.tokenizer == "bytes"
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert load(tmp_path, "model: {from_pretrained: hf}")[0].data.tokenizer == str(tmp_path / "hf")
    said = "model: {from_pretrained: hf}\ndata: {tokenizer: bytes}"
    assert load(tmp_path, said)[0].data.tokenizer == "bytes"
    # Seen red: configs/demo.yaml says bytes, and a model of 2,000 words was trained on bytes without a word about it.
    (tmp_path / "base.yaml").write_text("data: {tokenizer: bytes}")
    config, notices = load(tmp_path, "base: base.yaml\nmodel: {from_pretrained: hf}")
    assert config.data.tokenizer == str(tmp_path / "hf")
    assert any("data.tokenizer='bytes'" in line and "its own is taken" in line for line in notices), notices
    start = f"from_pretrained={tmp_path / 'hf'}"
    assert load(tmp_path, "data: {tokenizer: bytes}", (start,))[0].data.tokenizer == str(tmp_path / "hf")
    for both in ((start, "data.tokenizer=bytes"), ("data.tokenizer=bytes", start)):
        assert load(tmp_path, "{}", both)[0].data.tokenizer == "bytes"


# ---- a run


def test_a_run_starts_from_it_and_needs_it_no_more(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, tmp_path / "hf")
    options = {"max_seq_length": 32, "max_steps": 1, "save_steps": 1, "progress": "none", "tensorboard": False}
    options |= {"validation_split": 0.0, "learning_rate": 1e-30, "lr_scheduler_type": "constant", "folder": None}
    run = tmp_path / "run"

    def train(config: Any, **options: Any) -> Transformer:
        trainer = MoETrainer(config, training_config=options, output_dir=run)
        trainer.train(TEXTS)
        return trainer.model

    train({"model": {"from_pretrained": str(tmp_path / "hf")}}, **options)
    found = found_at(run, 1)
    manifest = found.storage.manifest(1)
    assert manifest.pretrained is not None
    assert manifest.pretrained.keys() == {"config.json", *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))}
    shutil.rmtree(tmp_path / "hf")
    model = train(run / "config.yaml", max_steps=2)
    weights = random_weights(MODELS["qwen"])
    back = to_huggingface(model, MODELS["qwen"])
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    again = found.storage.manifest(2)
    assert again.pretrained == manifest.pretrained
    state = read_trainer_state(found_at(run, 2), again, Keys())
    assert state["pretrained"]["folder"] == str(tmp_path / "hf")
    page = write_report([run]).read_text()
    assert f"Weights of step 0: {tmp_path / 'hf'}" in page
    assert all(f"{file}</th><td>{digest}</td>" in page for file, digest in state["pretrained"]["files"].items())
    with pytest.raises(ConfigError, match="no such file"):
        train(run / "config.yaml", max_steps=3, resume="never")
