"""`moe-dist upcycle`: dense folders as folders with experts: the same function at first, and it trains at once."""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from patches import Replace
from safetensors.torch import load_file, save_file
from saved import TEXTS
from torch import Tensor

from launcher.cli import commands
from moe_dist.models.huggingface import to_huggingface
from moe_dist.pretrained import safetensors_files, upcycled_weights
from moe_dist.train import MoETrainer

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 3,
}
DENSE: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 10, "rms_norm_eps": 1e-6},
    "llama": {"model_type": "llama", "rope_theta": 5000.0, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False},
}
FAMILY = {"qwen3": "qwen3_moe", "llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe"}


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def differences(self) -> list[float]:
        line = self.out.split("relative difference from the dense model's: ")[1].splitlines()[0]
        return [float(number) for number in re.findall(r"\d\.\de[-+]\d\d", line)]


Say = Callable[..., Said]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["moe-dist", "upcycle", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            code = commands.run()
        except SystemExit as end:
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return call


def dense_model(kind: str, **changes: Any) -> Any:
    """As large as it takes for every part to matter."""
    config = transformers.AutoConfig.for_model(**{**SIZES, **DENSE[kind], **changes})
    torch.manual_seed(4)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


def dense_folder(place: Path, kind: str, **changes: Any) -> Path:
    dense_model(kind, **changes).save_pretrained(place / kind)
    return place / kind


@pytest.mark.parametrize("options", ["", "--granularity 4 --top-k 1", "--granularity 3 --experts 12"])
@pytest.mark.parametrize("kind", DENSE)
def test_the_first_pass_equals_the_dense_models(kind: str, options: str, tmp_path: Path, say: Say) -> None:
    """Seen red with the scale of slices left out, with routers that are not tied in groups, and with slices of the
    shared expert at full weight in routed experts too."""
    folder = dense_folder(tmp_path, kind)
    (folder / "tokenizer.json").write_text("{}")
    said = say(folder, "-o", tmp_path / "moe", "--max-shard-size", "40KB", *options.split())
    assert said.code == 0, said
    assert len(said.differences) == 4
    assert max(said.differences) < 1e-5
    assert f"{FAMILY[kind]}, " in said.out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", experts_implementation="eager")
    assert model.config.model_type == FAMILY[kind]
    assert model.config.eos_token_id == 3
    ids = torch.arange(40)[None]
    with torch.no_grad():
        dense = transformers.AutoModelForCausalLM.from_pretrained(folder)
        expected, found = dense(ids).logits, model.eval()(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    written = {path.name for path in (tmp_path / "moe").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "README.md", "model.safetensors.index.json"} <= written
    assert f"| made of | {kind}: {kind}," in (tmp_path / "moe" / "README.md").read_text()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_shared_expert_of_some_slices(kind: str, shared: int, tmp_path: Path, say: Say) -> None:
    folder = dense_folder(tmp_path, kind)
    said = say(folder, "-o", tmp_path / "moe", "--granularity", 4, "--shared", shared)
    assert said.code == 0, said
    assert max(said.differences) < 1e-5
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (config["model_type"], config["shared_expert_intermediate_size"]) == ("qwen2_moe", 12 * shared)


def test_half_precision_stays_exact_where_scales_are_powers_of_two(tmp_path: Path, say: Say) -> None:
    """Seen red with the square root of the scale in up and down: 2.8e-03 with 2 slices."""
    dense_model("qwen3").bfloat16().save_pretrained(tmp_path / "dense")
    said = say(tmp_path / "dense", "-o", tmp_path / "two", "--granularity", "2")
    assert said.code == 0, said
    assert max(said.differences) < 1e-5
    assert {tensor.dtype for tensor in load_file(tmp_path / "two" / "model.safetensors").values()} == {torch.bfloat16}
    said = say(tmp_path / "dense", "-o", tmp_path / "three", "--granularity", "3", "--experts", 12)
    assert said.code == 0
    assert "(bfloat16 rounds weights times 3; --dtype fp32 does not)" in said.out
    assert max(said.differences) > 1e-5
    said = say(tmp_path / "dense", "-o", tmp_path / "exact", "--granularity", "3", "--experts", 12, "--dtype", "fp32")
    assert max(said.differences) < 1e-5
    said = say(tmp_path / "exact", "-o", tmp_path / "again")
    assert (said.code, "qwen3_moe with 12 experts; give a dense model" in said.err) == (2, True)


def test_a_softmax_over_all_is_scaled_by_experts_over_top_k(tmp_path: Path, say: Say) -> None:
    """The rule holds to rounding where the router says nothing yet; with a router that speaks the difference is told.
    Seen red with the scale of weights that sum to 1."""
    words = ["--no-norm-topk-prob", "--experts", 24, "--top-k", 3]
    said = say(dense_folder(tmp_path, "qwen3"), "-o", tmp_path / "loud", *words)
    assert said.code == 0, said
    assert "(weights of a softmax over all experts do not sum to 1)" in said.out
    assert max(said.differences) > 1e-3
    folder = tmp_path / "qwen3"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"initializer_range": 1e-8}))
    said = say(folder, "-o", tmp_path / "silent", *words)
    assert max(said.differences) < 1e-5
    # Groups must be told apart for every slice to be there once: logits of about 5e-4.
    (folder / "config.json").write_text(json.dumps(config | {"initializer_range": 1e-4}))
    said = say(folder, "-o", tmp_path / "slices", "--granularity", 2, *words)
    assert max(said.differences) < 3e-3
    assert say(folder, "-o", tmp_path / "one", "--no-norm-topk-prob", "--top-k", 1).code == 0


def test_noise_draws_some_units_of_each_expert_anew(tmp_path: Path, say: Say) -> None:
    folder = dense_folder(tmp_path, "llama")
    said = say(folder, "-o", tmp_path / "moe", "--experts", 4, "--noise", 0.25, "--seed", 7)
    assert said.code == 0, said
    assert "(--noise 0.25 draws units anew)" in said.out
    assert min(said.differences) > 1e-2
    moe, dense = (load_file(place / "model.safetensors") for place in (tmp_path / "moe", folder))
    changed: list[Tensor] = []
    for expert in range(4):
        start = f"model.layers.1.block_sparse_moe.experts.{expert}"
        rows = []
        for name, theirs, dim in (("w1", "gate", 1), ("w3", "up", 1), ("w2", "down", 0)):
            new, old = moe[f"{start}.{name}.weight"], dense[f"model.layers.1.mlp.{theirs}_proj.weight"]
            rows.append((new != old).any(dim))
            drawn = new[rows[-1]] if dim else new[:, rows[-1]]
            assert 0.5 < float(drawn.std() / old.std()) < 2.0
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows[0], rows[2])
        assert int(rows[0].sum()) == 12  # of 48
        changed.append(rows[0])
    assert not torch.equal(changed[0], changed[1])
    assert say(folder, "-o", tmp_path / "same", "--experts", 4, "--noise", 0.25, "--seed", 7).code == 0
    again = load_file(tmp_path / "same" / "model.safetensors")
    assert all(torch.equal(again[name], moe[name]) for name in moe)


@pytest.mark.parametrize(
    ("kind", "changes", "options", "reason"),
    [
        ("qwen3", {}, "--granularity 5 --experts 10", "--granularity 5: must divide the MLP's width, 48"),
        ("qwen3", {}, "--granularity 3", "--experts 16: must be a multiple of --granularity 3"),
        ("qwen3", {}, "--granularity 4 --top-k 5", "a token goes to 20 experts, and there are 16"),
        ("qwen3", {}, "--top-k 1", "the router never learns"),
        ("qwen2", {}, "--shared 2", "--shared 2: the MLP is cut into --granularity 1 slices"),
        ("qwen2", {}, "--shared 0", "qwen2 with such experts: no Hugging Face family is this model"),
        ("qwen3", {}, "--shared 1", "qwen3 with such experts: no Hugging Face family is this model"),
        ("llama", {"attention_bias": True}, "", "has attention_bias=false instead of true"),
        ("llama", {}, "--no-norm-topk-prob", "has norm_topk_prob=true instead of false"),
        ("llama", {"mlp_bias": True}, "", "mlp_bias=true: only false"),
    ],
)
def test_what_does_not_fit_is_refused(
    kind: str, changes: dict[str, Any], options: str, reason: str, tmp_path: Path, say: Say
) -> None:
    folder = dense_folder(tmp_path, kind, **changes)
    said = say(folder, "-o", tmp_path / "new" / "moe", *options.split())
    assert said.code == 2, said
    assert reason in said.err
    assert said.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [kind]


def test_damaged_folders_and_taken_names(tmp_path: Path, say: Say) -> None:
    folder = dense_folder(tmp_path, "qwen3")
    (tmp_path / "taken").mkdir()
    assert "is there already" in say(folder, "-o", tmp_path / "taken").err
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = say(folder, "-o", tmp_path / "moe")
    assert (said.code, "experts.0.up_proj.weight: a value that is not finite" in said.err) == (2, True)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = say(folder, "-o", tmp_path / "moe")
    assert (said.code, "model.layers.1.mlp.up_proj.weight: missing" in said.err) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen3", "taken"]


def without_scale(*arguments: Any) -> float:
    return 1.0


def untied(self: Any, part: Any) -> Tensor:
    return torch.randn(part.shape, generator=torch.Generator().manual_seed(1))


write_file = safetensors_files.write_file


def writes_a_wrong_byte(path: Path, *arguments: Any) -> None:
    write_file(path, *arguments)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


PLANTED: dict[str, tuple[Any, str, Any, str]] = {
    "scale-left-out": (upcycled_weights.Recipe, "scale", without_scale, "logits of prompt 0: relative difference"),
    "routers-not-tied": (
        upcycled_weights.UpcycledWeights,
        "_router",
        untied,
        "logits of prompt 0: relative difference",
    ),
    "wrong-byte": (safetensors_files, "write_file", writes_a_wrong_byte, "not as the dense model gives them"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_seen_and_leave_nothing(bug: str, tmp_path: Path, say: Say, replace: Replace) -> None:
    owner, name, planted, seen = PLANTED[bug]
    folder = dense_folder(tmp_path, "qwen3")
    replace(owner, name, planted)
    said = say(folder, "-o", tmp_path / "moe", "--granularity", 4)
    assert said.code == 1, said
    assert seen in said.out
    assert [path.name for path in tmp_path.iterdir()] == ["qwen3"]


def test_memory_is_that_of_a_layers_mlp(tmp_path: Path, say: Say, replace: Replace) -> None:
    """Seen red with every tensor kept: 151 MB above the start, of which a layer has 4.7."""
    sizes = {"hidden_size": 256, "intermediate_size": 1536, "num_hidden_layers": 12, "head_dim": 8}
    folder = dense_folder(tmp_path, "qwen3", **sizes)
    layer = 3 * 256 * 1536 * 4
    seen: list[int] = []

    def read(self: Any, name: str) -> Tensor:
        tensor = plain_read(self, name)
        seen.append(int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024)
        return tensor

    plain_read = upcycled_weights.UpcycledWeights.read
    replace(upcycled_weights.UpcycledWeights, "read", read)
    words = ["--experts", 4, "--granularity", 2, "--no-logits"]
    assert say(folder, "-o", tmp_path / "warm", *words).code == 0
    seen.clear()
    ctypes.CDLL(None).malloc_trim(0)
    assert say(folder, "-o", tmp_path / "moe", *words).code == 0
    assert len(seen) > 2 * 12 * 4 * 3
    assert max(seen) - seen[0] < 4 * layer  # of twelve


@pytest.mark.parametrize(("kind", "options"), [("qwen3", ""), ("llama", "--granularity 2")])
def test_it_trains_at_once(kind: str, options: str, tmp_path: Path, say: Say) -> None:
    """The first loss is the dense model's, of the same batch; each expert gets gradients, and copies part."""
    folder = dense_folder(tmp_path, kind)
    words = ["--experts", 4, *options.split()]
    assert say(folder, "-o", tmp_path / "moe", *words).code == 0
    losses = {}
    for name, start in (("dense", folder), ("moe", tmp_path / "moe")):
        training = {"max_seq_length": 64, "max_steps": 3, "progress": "none", "tensorboard": False, "seed": 3}
        training |= {"validation_split": 0.0, "learning_rate": 1e-2, "weight_decay": 0.0, "logging_steps": 1}
        config = {"model": {"from_pretrained": str(start)}, "balance": {"router_aux_loss_coef": 0.0}}
        trainer = MoETrainer(config, training_config=training, output_dir=tmp_path / f"run-{name}")
        trainer.train(TEXTS)
        rows = map(json.loads, (tmp_path / f"run-{name}" / "metrics.jsonl").read_text().splitlines())
        losses[name] = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses["moe"][0] == pytest.approx(losses["dense"][0], rel=1e-5)
    assert losses["moe"][-1] < losses["moe"][0]
    before = load_file(tmp_path / "moe" / "model.safetensors")
    after = to_huggingface(trainer.model, trainer.model.config)
    matrices = [name for name in before if ".experts." in name]
    assert len(matrices) == 2 * 4 * 3
    for name in matrices:
        assert not torch.equal(after[name], before[name]), name  # without weight decay only a gradient moves it
        copy = name.replace(".experts.3.", ".experts.1.")  # of the same slice
        if copy != name:
            assert torch.equal(before[name], before[copy])
            assert not torch.equal(after[name], after[copy])
