r"""Everything worth knowing of a GPU in one command of nine minutes, for whoever has one for a moment.

    python tools/bench/gpu.py --out FOLDER [--device cuda|cpu] [--small] [--only PART,...]

Needs torch, transformers and the small dependencies of this project, which need not be installed itself:

    pip install --no-deps pydantic pydantic-core annotated-types typing-inspection blake3 plotly datasets dill \
        multiprocess

Each part runs in a process of its own, with a time limit; one that fails is noted and the next one goes on. `gpu.json`
and `gpu.md` in FOLDER are written anew after every part. `--device cpu --small` runs all of it in sizes for a laptop,
which shows that it works, not how fast anything is.

verify    `moe-dist verify` quick: one rank with NCCL, four ranks with gloo that share the GPU
resume    50 steps with checkpoints, killed in the middle, gone on: losses bitwise those of an undisturbed run
layer     one layer, forward and backward, beside `transformers`' grouped_mm and the limit of dense matmuls
kernels   Triton's kernels for rows and gated units beside PyTorch's, and `moe-dist verify` with them; without Triton
          or on a CPU, why there is nothing to measure
float8    experts in float8 beside bfloat16, and losses of a short training with either
graphs    a layer with fixed places (`parallel.dispatcher: static`) as CUDA graphs, beside the same eagerly
step      whole training steps: seconds, MFU, peak memory, with and without torch.compile; forward and backward beside
          `transformers`' whole model
experts   rows per second through the experts alone, forward and backward (hidden 1024, as hivemind's benchmark)
profile   `moe-dist profile`, its page in FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, environment

MINUTES = {
    "verify": 3.0,
    "resume": 1.5,
    "layer": 1.5,
    "kernels": 1.5,
    "float8": 1.0,
    "graphs": 1.0,
    "step": 2.0,
    "experts": 0.5,
    "profile": 1.0,
}
"""Time limit of each part; in the order of what is learned from it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default=",".join(MINUTES))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--slack", type=float, default=1.0, help="multiplies every time limit")
    wanted = parser.parse_args()
    if wanted.part:
        found = PARTS[wanted.part](wanted.device, wanted.small, wanted.out)
        (wanted.out / f"{wanted.part}.json").write_text(json.dumps(found))
        return 0
    unknown = [name for name in wanted.only.split(",") if name not in MINUTES]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: parts are {', '.join(MINUTES)}")
    wanted.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"versions": versions(wanted.device), "parts": {}}
    for part in wanted.only.split(","):
        results["parts"][part] = in_a_process(part, wanted)
        (wanted.out / "gpu.json").write_text(json.dumps(results, indent=1))
        (wanted.out / "gpu.md").write_text(as_markdown(results))
        print(section(part, results["parts"][part]), flush=True)
    return int(any("error" in found for found in results["parts"].values()))


def versions(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__, "device": device}
    if device == "cuda" and torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def in_a_process(part: str, wanted: argparse.Namespace) -> dict[str, Any]:
    """What the part has found, or `error`; and its seconds."""
    command = [sys.executable, __file__, "--part", part, "--out", str(wanted.out), "--device", wanted.device]
    started, log = time.monotonic(), wanted.out / f"{part}.log"
    answer = wanted.out / f"{part}.json"
    answer.unlink(missing_ok=True)
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, *(["--small"] if wanted.small else [])],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
        try:
            process.wait(60 * MINUTES[part] * wanted.slack)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = round(time.monotonic() - started, 1)
    if process.returncode == 0 and answer.is_file():
        return json.loads(answer.read_text()) | {"seconds": seconds}
    tail = log.read_text(errors="replace").strip().splitlines()[-8:]
    why = "out of time" if process.returncode == -signal.SIGKILL else f"exit code {process.returncode}"
    return {"error": f"{why}: {' | '.join(tail)}", "seconds": seconds}


def as_markdown(results: dict[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    return "\n\n".join([f"# One GPU\n\n{facts}", *(section(*item) for item in results["parts"].items())]) + "\n"


def section(part: str, found: dict[str, Any]) -> str:
    """A table of what the part has found, or why it has found nothing."""
    head = f"## {part} ({found['seconds']} s)"
    if "error" in found:
        return f"{head}\n\nFailed: {re.sub(r'[`|]', ' ', found['error'])}"
    names = list(dict.fromkeys(name for row in found["rows"] for name in row))
    lines = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in found["rows"])]
    return f"{head}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
