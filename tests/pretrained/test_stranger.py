"""A stranger's way: a folder saved by `transformers`, twenty steps on two ranks, an export, a pipeline of text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.dist, pytest.mark.slow]

MAKE = """
import sys
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

texts = [path.read_text("utf-8") for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:40]]
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
special = {"special_tokens": ["<eos>", "<pad>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, **special))
own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
own.save_pretrained("tiny-moe")
sizes = {"vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
sizes |= {"num_key_value_heads": 2, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, max_position_embeddings=512)).save_pretrained("tiny-moe")
"""
USE = """
from transformers import pipeline
print(pipeline("text-generation", "tuned-hf")("def main(", max_new_tokens=12, do_sample=False)[0]["generated_text"])
"""


def test_the_readmes_way(tmp_path: Path) -> None:
    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr + done.stdout

    pytest.importorskip("transformers")
    run(sys.executable, "-c", "import json" + MAKE)
    start = ("model.from_pretrained=tiny-moe", "train.output_dir=tuned", "train.max_steps=20", "parallel.ep_size=2")
    said = run(str(BIN / "moe-dist"), "train", str(ROOT / "configs" / "demo.yaml"), *start, "monitor.progress=plain")
    assert "is not the tokenizer of tiny-moe; its own is taken" in said
    assert "step: 20/20" in said
    said = run(str(BIN / "moe-dist"), "export", "tuned", "--to", "hf", "--output", "tuned-hf", "--dtype", "bf16")
    assert "exported" in said
    assert (tmp_path / "tuned-hf" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "tuned-hf" / "config.json").read_text())["vocab_size"] == 600
    assert run(sys.executable, "-c", USE).splitlines()[-1].startswith("def main(")
