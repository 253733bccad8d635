"""What `moe-dist plan` says, held against what is known: published counts and runs, and what is measured here.

python tools/bench/plan.py                 # everything that needs no ranks, as the tables of docs/planning.md
python tools/bench/plan.py --write         # into the page
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from moe_dist.config import Config, ModelConfig  # noqa: E402
from moe_dist.models.counts import flops_per_token  # noqa: E402
from moe_dist.plan.cluster import cluster_of  # noqa: E402
from moe_dist.plan.search import Estimate, estimate, plan  # noqa: E402
from tools.bench.published import DEEPSEEK_V3, MODELS, RUNS, Published, _of  # noqa: E402

PAGE = ROOT / "docs" / "planning.md"
GFLOP = {
    "DeepSeek-V3": (DEEPSEEK_V3, 250.4),
    "Qwen3-235B-A22B": (MODELS["Qwen3-235B-A22B"], 148.3),
    "Qwen3-30B-A3B": (MODELS["Qwen3-30B-A3B"], 23.1),
    "Mixtral-8x7B": (MODELS["Mixtral-8x7B"], 79.7),
    "Mixtral-8x22B": (_of("mixtral_8x22b"), 242.2),
}
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 96,
    "intermediate_size": 256,
    "num_experts": 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "experts": {},
    "dense": {"num_experts": 0},
    "shared expert": {"shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
}
PRECISIONS, RECOMPUTE = ("float32", "bf16", "pure_bf16"), ("none", "selective", "full")


def small(kind: str, precision: str = "float32", recompute: str = "none", **data: Any) -> Config:
    """A run file of a small model: 4 sequences of 128 tokens."""
    train: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_checkpointing": recompute}
    train |= {} if precision == "float32" else {precision: True}
    return Config.model_validate({"model": SMALL | KINDS[kind], "data": {"max_seq_length": 128} | data, "train": train})


def planned_peak(config: Config) -> float:
    """Bytes of a step above what is there between steps, by the plan."""
    memory = estimate(config, 1, cluster_of("cpu")).memory
    return memory.total - memory.weights - memory.gradients - memory.optimizer


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def flops_table() -> str:
    rows = []
    for name, (model, published) in GFLOP.items():
        found = flops_per_token(ModelConfig.model_validate(model), 4096, causal=True) / 1e9
        rows.append([name, f"{published}", f"{found:.1f}", f"{found / published - 1:+.1%}"])
    return table(["model", "published", "counted", "error"], rows)


def memory_table() -> str:
    from tools.bench.allocator import measured_step

    rows = []
    for kind, precision in itertools.product(KINDS, PRECISIONS):
        cells = [kind, precision]
        for recompute in RECOMPUTE:
            config = small(kind, precision, recompute)
            _, peak = measured_step(config)
            wanted = planned_peak(config)
            cells.append(f"{peak / 1e6:.2f} / {wanted / 1e6:.2f} ({wanted / peak - 1:+.1%})")
        rows.append(cells)
    return table(["model", "precision", *RECOMPUTE], rows)


@dataclass(frozen=True)
class Verdict:
    """A published run in the plan. `rank` of `layouts`: divisions of the model over devices, each with its best
    micro-batch and recomputation."""

    run: Published
    found: Estimate
    fits: bool
    rank: int
    layouts: int
    best: Estimate

    @property
    def in_top_quarter(self) -> bool:
        return self.fits and self.rank <= self.layouts / 4


def division(one: Estimate) -> tuple[Any, ...]:
    parallel = one.config.parallel
    shape = (parallel.schedule, parallel.stages_per_rank) if parallel.pp_size > 1 else ()
    return parallel.ep_size, parallel.pp_size, parallel.zero_stage, parallel.shard_size, *shape


def verdict(run: Published) -> Verdict:
    """Experts are forced to be balanced in these runs, so imbalance is 1."""
    cluster = cluster_of(run.device).model_copy(update=run.cluster)
    config = run.config()
    for recompute in RECOMPUTE:
        train = config.train.model_copy(update={"gradient_checkpointing": recompute})
        found = estimate(config.model_copy(update={"train": train}), run.devices, cluster, 1.0)
        if found.fits(cluster):
            break
    ranked = plan(config, run.devices, cluster, global_batch=run.sequences, imbalance=1.0).ranked
    best: dict[tuple[Any, ...], Estimate] = {}
    for one in ranked:
        best.setdefault(division(one), one)
    own = max(best[division(found)].tokens_per_second if division(found) in best else 0.0, found.tokens_per_second)
    rank = 1 + sum(one.tokens_per_second > own for one in best.values())
    return Verdict(run, found, found.fits(cluster), rank, len(best), ranked[0])


def published_table(verdicts: Sequence[Verdict] | None = None) -> str:
    rows = []
    for number, seen in enumerate(verdicts or [verdict(run) for run in RUNS], 1):
        run = seen.run
        rate = seen.found.tokens_per_second
        rows.append(
            [
                f"{number}. {run.model}",
                f"{run.devices} {run.device.upper()}, {run.precision}",
                seen.found.name,
                "yes" if seen.fits else "**no**",
                f"{seen.rank} of {seen.layouts}{'' if seen.in_top_quarter else ' **miss**'}",
                f"{run.rate:,.0f}",
                f"{rate:,.0f}",
                f"{rate / run.rate - 1:+.0%}",
                f"{rate / seen.best.tokens_per_second:.0%} of {seen.best.name}",
            ]
        )
    titles = [
        "run",
        "on",
        "layout as planned",
        "fits",
        "rank",
        "published",
        "planned",
        "error",
        "rate against the best of the plan",
    ]
    sources = [f"{number}. {run.source}" for number, run in enumerate(RUNS, 1)]
    return table(titles, rows) + "\n\n" + "\n".join(sources)


TABLES = {"flops": flops_table, "memory": memory_table, "published": published_table}


def write(name: str, text: str) -> None:
    """Between its marks in the page."""
    page = PAGE.read_text("utf-8")
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    head, _, rest = page.partition(start)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"{PAGE}: no {start.strip()}")
    PAGE.write_text(f"{head}{start}{text}\n{end}{tail}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TABLES, action="append", help="these tables")
    parser.add_argument("--write", action="store_true", help="into docs/planning.md")
    asked = parser.parse_args()
    for name in asked.only or TABLES:
        text = TABLES[name]()
        print(text, end="\n\n", flush=True)
        if asked.write:
            write(name, text)


if __name__ == "__main__":
    main()
