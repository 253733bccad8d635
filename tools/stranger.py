"""A stranger's way, timed: installed with pip, a folder saved by `transformers`, trained on two ranks, exported, used.

    python tools/stranger.py [--keep DIR]

In a temporary folder, in an environment of its own. Prints each command as it is typed, and its seconds.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAKE = """
import json
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
text = pipeline("text-generation", "tuned-hf")("def main(", max_new_tokens=12, do_sample=False)[0]["generated_text"]
print(repr(text))
"""
TRAIN = (
    "moe-dist init runs",
    "moe-dist train runs/demo.yaml from_pretrained=tiny-moe output_dir=tuned max_steps=20 ep_size=2 progress=plain",
    "moe-dist export tuned --to hf --output tuned-hf --dtype bf16",
)


def way(binaries: Path, folder: Path, *, is_shown: bool = False) -> list[str]:
    """What each command said, from the model made to the text: run in `folder` with the programs of `binaries`.

    Raises SystemExit with all that a command said where it fails.
    """
    (folder / "make.py").write_text(MAKE)
    (folder / "use.py").write_text(USE)
    commands = ["python make.py", *TRAIN, "python use.py"]
    return [timed(command, binaries, folder, is_shown=is_shown) for command in commands]


def timed(command: str, binaries: Path, folder: Path, *, is_shown: bool) -> str:
    """One command with those programs first; what it said, all of it or, on show, with its seconds before."""
    began = time.perf_counter()
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [binaries / shlex.split(command)[0], *shlex.split(command)[1:]],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout}")
    if is_shown:
        print(f"{time.perf_counter() - began:7.1f} s  $ {command.replace(str(ROOT), 'CHECKOUT')}", flush=True)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a folder that stays, instead of a temporary one")
    asked = parser.parse_args()
    os.environ.pop("PYTHONPATH", None)  # what is installed, and nothing else
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        began, binaries = time.perf_counter(), folder / "venv" / "bin"
        timed("python -m venv venv", Path(sys.executable).parent, folder, is_shown=True)
        timed(f"pip install --quiet -c {ROOT / 'constraints.txt'} {ROOT}", binaries, folder, is_shown=True)
        said = way(binaries, folder, is_shown=True)
        print(f"{time.perf_counter() - began:7.1f} s  from nothing to {said[-1].splitlines()[-1]}")


if __name__ == "__main__":
    main()
