"""What `gpu.py` measures, part by part: each runs in a process of its own, and returns rows of its table."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    more = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"}
    return os.environ | more | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def moe_dist(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe_dist", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True, **options)


def verify(device: str, small: bool, out: Path) -> dict[str, Any]:
    """One rank with the device's own backend, then four ranks that share it."""
    few = "ep1-zero0,ep1-zero0-acc2"
    alone = proven(out / "verify-1.txt", 1, few if small else "quick", f"launch.device={device}")
    sharing = (f"launch.device={device}", "launch.backend=gloo")
    return {"rows": [alone, proven(out / "verify-4.txt", 4, "ep2-zero1" if small else "quick", *sharing)]}


def proven(log: Path, ranks: int, layouts: str, *overrides: str) -> dict[str, Any]:
    """How many cases of `moe-dist verify` pass."""
    told = moe_dist("verify", "configs/demo.yaml", "-n", str(ranks), "--layouts", layouts, "--json", *overrides)
    log.write_text(told.stdout + told.stderr)
    start = told.stdout.find("{")
    if start < 0:
        return {"ranks": ranks, "passed": "-", "of": "-", "worst": told.stderr.strip()[-300:]}
    report = json.loads(told.stdout[start:])
    failed = [row["name"] for row in report["layouts"] if not row["passed"]]
    passed = len(report["layouts"]) - len(failed)
    return {"ranks": ranks, "passed": passed, "of": len(report["layouts"]), "failed": ", ".join(failed)}


def resume(device: str, small: bool, out: Path) -> dict[str, Any]:
    """The same 50 steps twice, once with a SIGKILL after a checkpoint."""
    steps, every = (10, 4) if small else (50, 10)
    losses = {}
    for name in ("straight", "killed"):
        folder = out / name
        command = [
            *("train", "configs/demo.yaml", f"train.output_dir={folder}", f"launch.device={device}"),
            *("launch.nproc_per_node=1", "launch.max_restarts=0", "parallel.ep_size=1", "checkpoint.resume=auto"),
            *(f"train.max_steps={steps}", "train.max_time=null", f"checkpoint.save_steps={every}"),
            *("train.eval_steps=0", "train.sample_tokens=0", "train.deterministic=true"),
            *("monitor.logging_steps=1", "monitor.progress=none"),
        ]
        if name == "killed":
            process = subprocess.Popen(
                [sys.executable, "-m", "moe_dist", *command], cwd=ROOT, env=environment(), start_new_session=True
            )
            saved = folder / f"checkpoint-{every}" / "manifest.json"
            while process.poll() is None and not saved.exists():
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        done = moe_dist(*command)
        if done.returncode:
            raise SystemExit(f"{name}: exit code {done.returncode}: {done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = {row["step"]: row["loss"] for row in lines if row.get("kind") == "train"}
    told = moe_dist("checkpoint", "diff", *(str(out / name / f"checkpoint-{steps}") for name in losses))
    equal = losses["straight"] == losses["killed"] and len(losses["straight"]) == steps
    differ = re.search(r"(\d+) of (\d+) tensors differ", told.stdout)
    row = {"steps": steps, "losses bitwise equal": equal, "tensors that differ": differ[0] if differ else told.stderr}
    if not equal or differ is None or differ[1] != "0":
        raise SystemExit(f"not the same run: {row}")
    return {"rows": [row]}


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def layer(device: str, small: bool, out: Path) -> dict[str, Any]:
    """`moe_layer.py` at the shapes of Mixtral, OLMoE, Qwen3-30B and Qwen3-235B."""
    import torch
    from moe_layer import Cell, measure

    bf16 = torch.bfloat16
    shapes = [(8, 2, 4096, 14336), (64, 8, 2048, 1024), (128, 8, 2048, 768), (128, 8, 4096, 1536)]
    cells = [Cell(*shape, bf16, tokens) for shape in shapes for tokens in (4096, 16384)]
    if small:
        cells = [Cell(16, 2, 64, 32, bf16, 128)]
    rows = []
    for cell in cells:
        times = measure(cell, 5, clock_of(device), torch.device(device), without=("hf_eager", "our_loop"))
        rows.append(
            {
                "experts": f"{cell.experts} top-{cell.top_k}, {cell.hidden} -> {cell.width}",
                "tokens": cell.tokens,
                "ours ms": round(1e3 * times["ours"], 2),
                "grouped_mm / ours": round(times["hf_grouped_mm"] / times["ours"], 2),
                "dense limit / ours": round(times["limit"] / times["ours"], 2),
            }
        )
    return {"rows": rows}


def kernels(device: str, small: bool, out: Path) -> dict[str, Any]:
    """`row_kernels.py`, then cases of the proof in which a training by Triton's kernels is held against PyTorch's."""
    from row_kernels import measure

    from moe_dist.config import ConfigError
    from moe_dist.models.kernel_choice import require_kernels

    try:
        require_kernels("triton", device)
    except ConfigError as why:
        return {"rows": [{"not measured": str(why)}]}
    rows = measure(device, small, clock_of(device))
    if device == "cuda":
        cases = "ep1-zero0,ep1-zero0-float32,ep1-zero0-bf16"
        overrides = (f"launch.device={device}", "train.kernels=triton")
        rows.append({"what": "moe-dist verify", **proven(out / "verify-kernels.txt", 1, cases, *overrides)})
    return {"rows": rows}


def float8(device: str, small: bool, out: Path) -> dict[str, Any]:
    """`float8_experts.py`."""
    from float8_experts import products, training

    (batch,) = batches(True, device, 1)
    rows = products(device, small, clock_of(device))
    return {"rows": [*rows, training(device, SMALL, batch, 5 if small else 50)]}


def graphs(device: str, small: bool, out: Path) -> dict[str, Any]:
    """`cuda_graphs.py`: a layer that waits for no device, captured and not."""
    if device != "cuda":
        return {"rows": [{"not measured": "CUDA graphs are captured on a GPU; take --device cuda"}]}
    from cuda_graphs import measure

    return {"rows": measure(clock_of(device))}


def clock_of(device: str) -> Callable[[], float]:
    """Seconds, once the device has done what it was given."""
    import torch

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock if device == "cuda" else time.perf_counter


def step(device: str, small: bool, out: Path) -> dict[str, Any]:
    """Four layers of Qwen3-30B-A3B in pure bfloat16 with AdamW and float32 masters, 8,192 tokens a step."""
    rows = [training_step(device, small, compiled) for compiled in (False, True)]
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
    return {"rows": [*rows, *passes(device, small)]}


SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
LARGE = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def model_keys(small: bool) -> dict[str, int]:
    return SMALL if small else LARGE


def batches(small: bool, device: str, count: int) -> list[Any]:
    import torch

    from moe_dist.data.batch import Batch

    length, vocabulary = (32 if small else 4096), model_keys(small)["vocab_size"]
    made = []
    for index in range(count):
        ids = torch.randint(0, vocabulary, (1, length + 1), generator=torch.Generator().manual_seed(index)).to(device)
        made.append(Batch(ids[:, :-1], ids[:, 1:], None, None, length, length, [index], index))
    return made


def training_step(device: str, small: bool, compiled: bool) -> dict[str, Any]:
    import torch

    from moe_dist.config import load_mapping
    from moe_dist.models.counts import flops_per_token
    from moe_dist.monitor.devices import peak_flops
    from moe_dist.parallel.engines.registry import build_engine
    from moe_dist.parallel.mesh import Mesh
    from moe_dist.train.balance import Balancer
    from moe_dist.train.build import build_model
    from moe_dist.train.step import TrainStep

    made = batches(small, device, 2)
    length = made[0].num_tokens
    train = {"pure_bf16": True, "torch_compile": compiled, "gradient_accumulation_steps": 2}
    config = load_mapping({"model": model_keys(small), "data": {"max_seq_length": length}, "train": train})
    mesh = Mesh.single(device)
    model = build_model(config, mesh)
    run = TrainStep(model, mesh, build_engine(model, config, mesh), Balancer(model, mesh, 1e-3), config)
    clock, times = clock_of(device), []
    for number in range(4 if small else 9):
        started = clock()
        run(made, number, 1e-4)
        times.append(clock() - started)
    seconds = statistics.median(times[2:])
    tokens = 2 * length
    flops = flops_per_token(config.model, length) * tokens / seconds
    peak = peak_flops(torch.cuda.get_device_name(), bf16=True) if device == "cuda" else None
    return {
        "what": f"training step{', torch.compile' if compiled else ''}",
        "ms": round(1e3 * seconds, 1),
        "tokens/s": round(tokens / seconds),
        "TFLOP/s": round(flops / 1e12, 1),
        "MFU": f"{flops / peak:.1%}" if peak else "-",
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1) if device == "cuda" else "-",
    }


def passes(device: str, small: bool) -> list[dict[str, Any]]:
    """Forward and backward of whole models with one cross-entropy, in turn."""
    import torch
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe_dist.config import load_mapping
    from moe_dist.parallel.mesh import Mesh
    from moe_dist.train.balance import Balancer
    from moe_dist.train.build import build_model
    from moe_dist.train.loss import cross_entropy_sum

    (batch,) = batches(small, device, 1)
    mesh = Mesh.single(device)
    config = load_mapping({"model": model_keys(small), "data": {"max_seq_length": batch.num_tokens}})
    mine = build_model(config, mesh)
    Balancer(mine, mesh, 0.0)
    theirs_config = Qwen3MoeConfig(**model_keys(small), norm_topk_prob=True, output_router_logits=False)
    theirs_config._experts_implementation = "grouped_mm"
    theirs_config._attn_implementation = "sdpa"
    with torch.device(device):
        theirs = Qwen3MoeForCausalLM(theirs_config)
    models = {"ours": mine.bfloat16().train(), "transformers": theirs.bfloat16().train()}
    clock = clock_of(device)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(3 if small else 7):
        for name, model in models.items():
            model.zero_grad(set_to_none=True)
            started = clock()
            logits = model(batch.input_ids)
            logits = logits if isinstance(logits, torch.Tensor) else logits.logits
            (cross_entropy_sum(logits, batch.labels) / batch.num_valid).backward()
            times[name].append(clock() - started)
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    return [
        {
            "what": f"forward and backward, {name}",
            "ms": round(1e3 * seconds[name], 1),
            "tokens/s": round(batch.num_tokens / seconds[name]),
            "ratio": round(seconds[name] / seconds["ours"], 2),
        }
        for name in models
    ]


def experts(device: str, small: bool, out: Path) -> dict[str, Any]:
    """Rows that arrive evenly at 16 experts."""
    import torch

    from moe_dist.models.experts import Experts

    hidden, count = (64, 16) if small else (1024, 16)
    clock, rows = clock_of(device), []
    for dtype in (torch.float32, torch.bfloat16):
        for size in (256,) if small else (2048, 32768):
            module = Experts(count, hidden, 2 * hidden)
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            module = module.to(device, dtype)
            x = torch.randn(size, hidden, device=device, dtype=dtype, requires_grad=True)
            sizes = torch.full((count,), size // count, device=device)
            times: dict[str, list[float]] = {"forward": [], "forward and backward": []}
            for _ in range(5 if small else 30):
                started = clock()
                result = module(x, sizes)
                middle = clock()
                result.sum().backward()
                times["forward"].append(middle - started)
                times["forward and backward"].append(clock() - started)
            name = str(dtype).removeprefix("torch.")
            row: dict[str, Any] = {"batch": size, "dtype": name}
            rows.append(row | {f"{what}, rows/s": round(size / statistics.median(t[2:])) for what, t in times.items()})
    return {"rows": rows}


def profile(device: str, small: bool, out: Path) -> dict[str, Any]:
    told = moe_dist(
        *("profile", "configs/demo.yaml", "--compute", "--memory", "--steps", "3", "--report", str(out / "profile")),
        *(f"launch.device={device}", "launch.nproc_per_node=1", "parallel.ep_size=1"),
    )
    (out / "profile.txt").write_text(told.stdout + told.stderr)
    if told.returncode:
        raise SystemExit(told.stderr[-2000:])
    return {"rows": [{"page": str(next((out / "profile").glob("*.html")).name), "said": last_line(told.stdout)}]}


PARTS: dict[str, Callable[[str, bool, Path], dict[str, Any]]] = {
    "verify": verify,
    "resume": resume,
    "layer": layer,
    "kernels": kernels,
    "float8": float8,
    "graphs": graphs,
    "step": step,
    "experts": experts,
    "profile": profile,
}
