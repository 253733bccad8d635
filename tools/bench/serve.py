"""Chats answered a second by `moe-dist serve` and by `transformers serve`, the same random model, one after the other.

    python tools/bench/serve.py --requests 200 --at-once 32 --max-tokens 32

Needs the extra `serve` and what `transformers[serving]` asks for. Prints a line for each server and the ratio.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def make_folder(folder: Path) -> None:
    """Four layers of eight experts, and a tokenizer of bytes with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*letters, "<eos>"])}, []))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 32, "moe_intermediate_size": 128, "num_experts": 8}
    sizes |= {"num_experts_per_tok": 2, "vocab_size": 257, "max_position_embeddings": 2048, "eos_token_id": 256}
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).save_pretrained(folder)


@contextmanager
def served(command: list[str], ready: str, log: Path) -> Iterator[int]:
    """The process id of a server whose output says that it is ready."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not _answers(ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[0]} does not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield process.pid
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    import httpx

    try:
        return httpx.get(url, timeout=2).status_code < 500
    except httpx.TransportError:
        return False


def load(url: str, model: str, arguments: argparse.Namespace, pid: int) -> tuple[float, str]:
    """Tokens a second, and all there is to say."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)

    def one(number: int) -> tuple[float, int]:
        begun = time.monotonic()
        said: Any = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "x" * (1 + number % 60)}],
            max_tokens=arguments.max_tokens,
            temperature=0,
        )
        return time.monotonic() - begun, said.usage.completion_tokens

    one(0)
    begun = time.monotonic()
    with ThreadPoolExecutor(arguments.at_once) as pool:
        found = list(pool.map(one, range(arguments.requests)))
    seconds = time.monotonic() - begun
    times, tokens = sorted(time for time, _ in found), sum(count for _, count in found)
    memory = int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) // 1024
    half, last = times[len(times) // 2], times[-1]
    text = f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s, answers {half:.2f} s (median) {last:.2f} s (last)"
    return tokens / seconds, f"{text}, {memory:,} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--port", type=int, default=18500)
    parser.add_argument("--theirs", default="", help="options of transformers serve, such as --continuous-batching")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, port = Path(place) / "model", arguments.port
        make_folder(folder)
        theirs = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--port", str(port + 1)]
        theirs += [*arguments.theirs.split(), str(folder)]
        ours = [sys.executable, "-m", "launcher", "serve", str(folder), "--port", str(port), "--name", str(folder)]
        rates = []
        for name, command, probe, here in (
            ("moe-dist serve", ours, "readyz", port),
            ("transformers serve", theirs, "health", port + 1),
        ):
            url = f"http://127.0.0.1:{here}"
            with served(command, f"{url}/{probe}", Path(place) / "log") as pid:
                rate, text = load(url, str(folder), arguments, pid)
            rates.append(rate)
            print(f"{name:18}  {text}", flush=True)
        print(f"ratio               {rates[0] / rates[1]:.2f}")


if __name__ == "__main__":
    main()
