"""`moe-dist generate`: the same answers from a run, its checkpoint and its export; files of prompts; conversations."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import Say
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from launcher.rank.chat import Chat
from moe_dist.checkpoint.storage.encryption import Keys
from moe_dist.checkpoint.tools.inspecting import Tensors
from moe_dist.config import ModelConfig, load_config
from moe_dist.data.tokenizer import HuggingFaceTokenizer
from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.generate.options import SamplingOptions
from moe_dist.models.int8 import to_int8
from moe_dist.models.transformer import Transformer
from moe_dist.pretrained.inference import find_model, open_model
from moe_dist.train import MoETrainer

MODEL = {
    "vocab_size": 264,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
OPTIONS = {
    "max_seq_length": 32,
    "max_steps": 2,
    "save_steps": 1,
    "progress": "none",
    "tensorboard": False,
    "validation_split": 0.0,
    "sample_tokens": 24,
    "seed": 3,
}
TEXTS = [f"def f{i}(x):\n    return x * {i}\n" * 12 for i in range(8)]
SHORT = ("--max-tokens", 12, "--ignore-eos")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps from random weights: its text is noise, of many different bytes."""
    place = tmp_path_factory.mktemp("runs") / "run"
    MoETrainer({}, model_config=MODEL, training_config=OPTIONS, output_dir=place).train(TEXTS)
    return place


def test_a_run_its_checkpoint_and_its_export_say_the_same(run: Path, tmp_path: Path, say: Say) -> None:
    assert say("export", run, "--output", tmp_path / "hf", "--no-logits").code == 0
    said = {}
    for place in (run, run / "checkpoint-2", tmp_path / "hf"):
        said[place] = say("generate", place, "-p", "def ", *SHORT, "data.tokenizer=bytes")
        assert said[place].code == 0, said[place]
        assert said[place].out.startswith("def ")
        assert len(said[place].out) > len("def ")
    assert len({one.out for one in said.values()}) == 1
    assert str(find_model(str(run), step=1)) == str(run / "checkpoint-1")


def test_what_is_opened_is_what_was_saved(run: Path) -> None:
    source = find_model(str(run))
    assert source.checkpoint is not None
    saved = Tensors(source.checkpoint, source.checkpoint.storage.manifest(2), Keys())
    model, _ = open_model(source)
    for name, values in model.state_dict().items():
        assert torch.equal(values, saved.read(f"model.{name}")), name
    assert not model.training
    half, _ = open_model(find_model(str(run), dtype="bf16"))
    kinds = {name: parameter.dtype for name, parameter in half.named_parameters()}
    assert {kinds[name] for name in kinds if "router" not in name} == {torch.bfloat16}
    assert {kinds[name] for name in kinds if "router" in name} == {torch.float32}


def test_a_file_of_prompts(run: Path, tmp_path: Path, say: Say) -> None:
    (tmp_path / "a.txt").write_text("def f\n\nx = 1\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "def f"}\n{"prompt": "x = 1", "id": 7}\n')
    plain = say("generate", run, "--prompts", tmp_path / "a.txt", *SHORT)
    assert plain.code == 0
    rows = [json.loads(line) for line in plain.out.splitlines()]
    assert [row["prompt"] for row in rows] == ["def f", "x = 1"]
    assert [(row["index"], row["finish_reason"], row["completion_tokens"]) for row in rows] == [
        (0, "length", 12),
        (1, "length", 12),
    ]
    done = say("generate", run, "--prompts", tmp_path / "a.jsonl", "-o", tmp_path / "out", *SHORT)
    assert done.code == 0
    assert (tmp_path / "out").read_text() == plain.out
    alone = say("generate", run, "-p", "def f", *SHORT)
    assert alone.out == f"def f{rows[0]['text']}\n"


def test_what_cannot_be_is_one_line_and_two(run: Path, tmp_path: Path, say: Say) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "empty.txt").write_text("\n")
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    shard = sorted((damaged / "checkpoint-2").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    for words, part in (
        ((tmp_path / "nothing", "-p", "a"), "there is no such run"),
        ((run, "-p", "a", "--step", 9), "steps there: 1, 2"),
        ((run, "-p", "a", "--top-p", 0), "top_p=0"),
        ((run, "-p", "a", "--chat"), "one of them"),
        ((run, "--prompts", tmp_path / "bad.jsonl"), "line 2"),
        ((run, "--prompts", tmp_path / "empty.txt"), "no prompt"),
        ((run, "--prompts", tmp_path / "none.txt"), "No such file"),
        ((run, "-p", "a", "--output", "x"), "only with --prompts"),
        ((run, "-p", "a", "--prefetch"), "--prefetch: only with --expert-cache-gb"),
        ((run, "--chat", "--nproc", 2), "one process"),
        ((run, "-p", "a" * 5000), "at most"),
        ((run, "-p", "a", "model.hidden_size=nope"), "hidden_size"),
        ((run, "-p", "a", "--expert-cache-gb", 0.0), "one expert needs"),
        ((damaged, "-p", "a"), "BLAKE3"),
    ):
        said = say("generate", *words)
        assert (said.code, said.out) == (2, ""), (words, said)
        assert part in said.err, (words, said)
        assert len(said.err.splitlines()) == 1


def test_an_expert_cache_says_the_same_and_how_often_it_had_an_expert(run: Path, tmp_path: Path, say: Say) -> None:
    plain = say("generate", run, "-p", "def ", *SHORT).out
    for more in ((), ("--expert-folder", tmp_path, "--prefetch", "--cache-policy", "lfu")):
        said = say("generate", run, "-p", "def ", "--expert-cache-gb", 2e-5, *more, *SHORT)
        assert said.out == plain
        assert "hit" in said.err


def test_int8_weights_say_what_they_save(run: Path, tmp_path: Path, say: Say) -> None:
    """What is written is that of a model made int8, and an evaluation measures the same one."""
    model, tokenizer = open_model(find_model(str(run)))
    before, after = to_int8(model)
    [wanted] = MoEInferenceEngine(model, tokenizer).generate(["def "], SamplingOptions(12, ignore_eos=True))
    said = say("generate", run, "--prompts", prompts_of(tmp_path), "--int8", *SHORT)
    assert json.loads(said.out)["text"] == wanted.text
    assert said.err == f"int8: weights are {after / 1e6:,.1f} MB, not {before / 1e6:,.1f}\n"
    losses = []
    for more in ((), ("--int8",)):
        found = say("evaluate", run, "--data", tmp_path / "prompts", "--json", "-", *more)
        losses.append(json.loads(found.out)["loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_samples_of_a_training_are_what_this_command_writes(run: Path, say: Say) -> None:
    """That after training, from the checkpoint."""
    *_, summary = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    train = load_config(run / "config.yaml").train
    how = ("--temperature", 0.8, "--seed", train.seed, "--max-tokens", train.sample_tokens, "--ignore-eos")
    found = say("generate", run, "--prompts", prompts_of(run.parent, train.sample_prompt), *how)
    assert summary["sample_after"] == train.sample_prompt + json.loads(found.out)["text"]
    assert summary["sample_before"] != summary["sample_after"]


def prompts_of(folder: Path, prompt: str = "def ") -> Path:
    (folder / "prompts").write_text(prompt)
    return folder / "prompts"


def test_a_conversation(run: Path, say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = ["/undo", "hello", "/retry", "/set temperature 0.5", "/set top_k x", "/nope", f"/save {tmp_path}/talk.json"]
    lines += ["/clear", "again", "/undo", f"/save {tmp_path}/empty.json", "/exit", "not read"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    said = say("generate", run, "--chat", *SHORT)
    assert said.code == 0
    errors = said.err.splitlines()
    assert ["nothing has been asked" in errors[0], "/set top_k x" in errors[1], "/nope" in errors[2]] == [True] * 3
    talk = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in talk] == ["user", "assistant"]
    assert talk[0]["content"] == "hello"
    assert said.out.splitlines()[0] == said.out.splitlines()[1]  # asked again, answered alike
    assert talk[1]["content"] in said.out
    assert json.loads((tmp_path / "empty.json").read_text()) == []


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_conversation_by_the_template() -> None:
    """What the model reads is what `transformers` makes of the same messages."""
    import transformers

    words = Tokenizer(models.BPE({**{chr(n): n for n in range(128)}, "<eos>": 128}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", chat_template=TEMPLATE)
    model = Transformer(ModelConfig.model_validate(MODEL))
    model.initialize(1)
    engine = MoEInferenceEngine(model, HuggingFaceTokenizer(theirs, "words"))
    talk = Chat(engine, SamplingOptions(4), "be brief")
    talk.ask("hi")
    expected = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert talk.messages[:2] == expected
    assert talk.messages[2]["role"] == "assistant"
    talk.messages.pop()
    text = theirs.apply_chat_template(expected, tokenize=False, add_generation_prompt=True)
    assert text == "<system>be brief</><user>hi</><assistant>"
    assert talk.prompt() == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["ep_size=2", "pp_size=2"])
def test_two_ranks_say_what_one_says(run: Path, tmp_path: Path, layout: str, say: Say) -> None:
    (tmp_path / "a.txt").write_text("def f\nx = 1\nreturn\n")
    words = [str(word) for word in ("generate", run, "--prompts", tmp_path / "a.txt", *SHORT)]
    command = [sys.executable, "-m", "moe_dist", *words, "--nproc", "2", layout]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout == say(*words).out


def test_ctrl_c_ends_an_answer_and_not_the_conversation(run: Path) -> None:
    words = ["generate", str(run), "--chat", "--max-tokens", "1900", "--ignore-eos"]
    command = [sys.executable, "-u", "-m", "moe_dist", *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "errors": "replace"}
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) as talk:
        assert talk.stdin is not None
        assert talk.stdout is not None
        talk.stdin.write("hello\n")
        talk.stdin.flush()
        assert talk.stdout.read(1)  # the answer has begun
        talk.send_signal(signal.SIGINT)
        rest, _ = talk.communicate("/set\n/exit\n", timeout=60)
    assert talk.returncode == 0
    assert "[ended]" in rest
    assert "max_tokens" in rest.partition("[ended]")[2]
