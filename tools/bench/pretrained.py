"""Reading a Hugging Face folder beside `transformers`, in one interleaved run.

    python tools/bench/pretrained.py [--gigabytes 1] [--rounds 3] [--folder DIR]

Makes a Qwen3-MoE of random bf16 weights (as `transformers` saves it: one matrix per expert, files of 200 MB), then each
contender reads it in processes of its own, in turns: `AutoModelForCausalLM.from_pretrained`, and ours at world sizes
1, 2 and 4 with as many groups of experts. Figures are medians: seconds from before the model is built to weights in
place, on the slowest rank; peak memory of a rank beyond what it had before, beside its own weights in float32; bytes of
values that a rank reads. A ratio above 1: ours is faster. The page cache is warm for all: what is compared is the work,
not the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXPERTS, HIDDEN, WIDTH, VOCAB = 32, 512, 512, 8192


def config_of(gigabytes: float) -> dict[str, Any]:
    """Keys of a model of about so many bytes in bf16: layers are added."""
    per_layer = 2 * EXPERTS * 3 * HIDDEN * WIDTH
    layers = max(2, round(gigabytes * 1e9 / per_layer))
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": WIDTH,
        "moe_intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
    }


def make(folder: Path, gigabytes: float) -> None:
    import torch
    from safetensors.torch import save_file

    from moe_dist.config.huggingface import model_of, read_huggingface
    from moe_dist.models.tensor_names import Names

    (folder / "config.json").write_text(json.dumps(config_of(gigabytes)))
    names = Names(model_of(read_huggingface(folder / "config.json", "the benchmark")))
    index: dict[str, str] = {}
    batch: dict[str, torch.Tensor] = {}
    size = number = 0

    def flush() -> None:
        nonlocal number, size
        file = f"model-{number:05d}.safetensors"
        save_file(batch, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(batch, file))
        number, size = number + 1, 0
        batch.clear()

    for name, part in names.parts().items():
        batch[name] = (torch.randn(part.shape) * 0.02).bfloat16()
        size += batch[name].nbytes
        if size > 2e8:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Most resident anonymous memory inside the block beyond that before it, in bytes; files that are mapped do not
    count, the kernel takes them back. Looked at every few milliseconds."""
    most, done = [0], threading.Event()
    before = _anonymous()

    def look() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], _anonymous() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def _anonymous() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


def theirs(folder: str) -> dict[str, float]:
    import torch
    import transformers

    with peak_memory() as most:
        began = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        seconds = time.perf_counter() - began
    held = sum(parameter.nbytes for parameter in model.parameters())
    return {"seconds": seconds, "peak": most[0], "held": held, "read": held / 2}


def ours(folder: str) -> dict[str, float]:
    import torch.distributed as dist

    from moe_dist.config import load_mapping
    from moe_dist.parallel.layout import Layout
    from moe_dist.parallel.mesh import Mesh
    from moe_dist.pretrained.loading import load_pretrained
    from moe_dist.train.build import build_model

    world = int(os.environ["WORLD_SIZE"])
    tree = {"model": {"from_pretrained": folder}, "parallel": {"ep_size": world}}
    config = load_mapping(tree, notice=lambda text: None)
    if world > 1:
        dist.init_process_group("gloo")
        import torch

        mesh = Mesh.create(Layout.of(config, world), torch.device("cpu"))
        dist.barrier()
    else:
        mesh = Mesh.single()
    with peak_memory() as most:
        began = time.perf_counter()
        model = build_model(config, mesh)
        read = load_pretrained(model, config.model, mesh).bytes_read[mesh.rank]
        seconds = time.perf_counter() - began
    held = sum(parameter.nbytes for parameter in model.parameters())
    return {"seconds": seconds, "peak": most[0], "held": held, "read": read}


def run(contender: str, folder: Path, world: int) -> list[dict[str, float]]:
    """What each rank says."""
    surroundings = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    surroundings |= {"MASTER_PORT": str(20000 + os.getpid() % 20000), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, "--contender", contender, "--folder", str(folder)]
    ranks = [
        subprocess.Popen(command, env=surroundings | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    said = [rank.communicate(timeout=600)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{contender} at {world}: a rank has failed")
    return [json.loads(text.splitlines()[-1]) for text in said]


def measure(folder: Path, rounds: int) -> None:
    contenders = [("theirs", 1), ("ours", 1), ("ours", 2), ("ours", 4)]
    found: dict[tuple[str, int], list[list[dict[str, float]]]] = {key: [] for key in contenders}
    for _ in range(rounds):
        for key in contenders:
            found[key].append(run(key[0], folder, key[1]))
    base = statistics.median(max(rank["seconds"] for rank in ranks) for ranks in found["theirs", 1])
    print(f"{'':24}{'seconds':>9}{'ratio':>8}{'peak MB':>10}{'held MB':>10}{'read MB':>10}")
    for (contender, world), every in found.items():
        seconds = statistics.median(max(rank["seconds"] for rank in ranks) for ranks in every)
        last = max(every[-1], key=lambda rank: rank["peak"])
        name = "transformers" if contender == "theirs" else f"moe-dist, {world} rank{'s' if world > 1 else ''}"
        numbers = "".join(f"{last[key] / 1e6:>10,.0f}" for key in ("peak", "held", "read"))
        print(f"{name:24}{seconds:>9.2f}{base / seconds:>8.2f}{numbers}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--contender", choices=("theirs", "ours"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.contender:
        print(json.dumps((theirs if asked.contender == "theirs" else ours)(str(asked.folder))))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = asked.folder or Path(place)
        if not (folder / "config.json").exists():
            make(folder, asked.gigabytes)
        measure(folder, asked.rounds)


if __name__ == "__main__":
    main()
