"""Time per token beside `transformers.generate` on the same weights, in one interleaved run.

    python tools/bench/generate.py [--new-tokens 64] [--rounds 5] [--batches 1,8]

Makes a Qwen3-MoE with random float32 weights, opens it with both, and lets both go on greedily from the same prompts of
equal length, in turns, on one thread. The time of a token is that of a whole answer less that of its first token, by
the tokens between, in CPU seconds of the process, so that what else the machine does changes little. Figures are the
best of all rounds; a ratio above 1: ours is faster. Both must say the same tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PROMPT, VOCAB = 64, 8192
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "rope_theta": 1e6,
    "torch_dtype": "float32",
}
Answers = list[list[int]]


def make(folder: Path) -> None:
    """A folder of random weights."""
    from moe_dist.config.huggingface import model_of, read_huggingface
    from moe_dist.models.tensor_names import Names

    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = Names(model_of(read_huggingface(folder / "config.json", "the benchmark")))
    torch.manual_seed(0)
    weights = {name: torch.randn(part.shape) * 0.05 + ("norm" in name) for name, part in names.parts().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def ours(folder: Path) -> Callable[[Answers, int], Answers]:
    from moe_dist.generate.engine import MoEInferenceEngine
    from moe_dist.generate.options import SamplingOptions
    from moe_dist.pretrained.inference import find_model, open_model

    engine = MoEInferenceEngine(open_model(find_model(str(folder)))[0])
    return lambda prompts, count: [one.tokens for one in engine.generate(prompts, SamplingOptions(count))]


def theirs(folder: Path) -> Callable[[Answers, int], Answers]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(prompts: Answers, count: int) -> Answers:
        ids = torch.tensor(prompts)
        settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, ids.shape[1] :].tolist()

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="1,8")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        contenders = {"moe-dist": ours(Path(folder)), "transformers": theirs(Path(folder))}
    for size in map(int, arguments.batches.split(",")):
        prompts = torch.randint(1, VOCAB, (size, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
        said = [generate(prompts, 8) for generate in contenders.values()]  # warm
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for name, generate in contenders.items():
                took = {}
                for count in (1, arguments.new_tokens):
                    started = time.process_time()
                    generate(prompts, count)
                    took[count] = time.process_time() - started
                seconds[name].append((took[arguments.new_tokens] - took[1]) / (arguments.new_tokens - 1))
        best = {name: min(times) for name, times in seconds.items()}
        each = "  ".join(f"{name} {1000 * value:.2f} ms" for name, value in best.items())
        ratio = best["transformers"] / best["moe-dist"]
        same = "the same tokens" if said[0] == said[1] else "OTHER TOKENS"
        print(f"batch {size}: {each} a step, {ratio:.2f}x; {same}", flush=True)


if __name__ == "__main__":
    main()
