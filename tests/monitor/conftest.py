"""Records for the monitor's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe_dist.monitor.expert_stats import layer_record
from moe_dist.monitor.rank_facts import PHASE_KEYS
from moe_dist.monitor.records import EvalRecord, LayerRecord, RanksRecord, RunInfo, RunSummary, TrainRecord


def sums(aux: float, z: float, entropy: float, confidence: float, mean_square: float) -> dict[str, float]:
    """Sums over tokens of a layer's router."""
    names = ("aux_loss", "z_loss", "router_entropy", "router_confidence", "router_logits_mean_square")
    return dict(zip(names, (aux, z, entropy, confidence, mean_square), strict=True))


@pytest.fixture
def layers() -> list[LayerRecord]:
    """Two layers of four experts; the hottest expert is L3/E01 (2.0x), the coldest L0/E02 (0.0x)."""
    return [
        layer_record(0, [25, 30, 0, 45], dropped=2, tokens=50, sums=sums(55.0, 100.0, 60.0, 30.0, 450.0), top_k=2),
        layer_record(3, [20, 50, 20, 10], dropped=0, tokens=50, sums=sums(50.0, 150.0, 65.0, 20.0, 200.0), top_k=2),
    ]


@pytest.fixture
def info() -> RunInfo:
    return RunInfo(
        sentence="Training a 25.3M-parameter model on 4 ranks (cpu).",
        layout=["        ep 0    ep 1", "edp 0   rank 0  rank 1", "edp 1   rank 2  rank 3"],
        trainable_params=25_312_256,
        total_params=50_624_512,
        active_params=8_100_000,
        config_text="model:\n  hidden_size: 512\n",
        output_dir="outputs/run",
        world_size=4,
        device="cpu",
        stage_of_rank=[0, 0, 1, 1],
        stage_of_layer=[0, 0, 1, 1],
        domains=["code", "prose"],
        run_id="3f2a9c0112345678",
    )


@pytest.fixture
def train_record(layers: list[LayerRecord]) -> Callable[..., TrainRecord]:
    def make(step: int = 120, **changes: object) -> TrainRecord:
        values: dict[str, object] = {
            "step": step,
            "max_steps": 5000,
            "epoch": 0.25,
            "loss": 2.1342,
            "learning_rate": 2.84e-4,
            "grad_norm": 0.9231,
            "tokens": 16_384 * step,
            "tokens_per_second": 18_234.5,
            "step_seconds": 0.8984,
            "all_to_all_share": 0.12,
            "data_wait_share": 0.003,
            "skipped_steps": 0,
            "elapsed_seconds": 107.8,
            "remaining_seconds": 4384.0,
            "memory_bytes": 1_310_000_000,
            "layers": layers,
            "phase_seconds": dict.fromkeys(PHASE_KEYS, 0.0) | {"data": 0.02, "computing": 6.1, "all_to_all": 1.1},
            "flops_per_second": 8.9e11,
            "samples_per_second": 8.9,
            "device_utilisation": 0.93,
            "mfu": 0.31,
            "all_to_all_bytes": 33_554_432,
            "row_imbalance": 1.2,
            "imbalance_seconds": 0.05,
            "slowest_rank_ratio": 1.1,
            "ranks": RanksRecord(
                own_seconds=[0.6, 0.61, 0.59, 0.6],
                phase_seconds={"data": [0.002] * 4, "computing": [0.6, 0.61, 0.59, 0.6], "all_to_all": [0.1] * 4},
                received_rows=[100, 120, 90, 90],
                sent_bytes=[83_886_080] * 4,
                memory_bytes=[1_310_000_000] * 4,
                rows_to=[[60, 40], [40, 80], [50, 40], [40, 50]],
            ),
        }
        return TrainRecord(**(values | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture
def eval_record() -> EvalRecord:
    return EvalRecord(500, 2.3121, 10.09, 123_456, 3.2, unigram_loss=3.3101, is_best=True)


@pytest.fixture
def summary(layers: list[LayerRecord]) -> RunSummary:
    return RunSummary(
        steps=5000,
        seconds=4491.8,
        initial_loss=5.5454,
        final_loss=2.1342,
        best_eval_loss=2.3121,
        unigram_loss=3.3101,
        tokens=81_920_000,
        tokens_per_second=18_237.0,
        skipped_steps=2,
        reason="all 5,000 steps are done",
        paths={"metrics": "outputs/run/metrics.jsonl", "checkpoint": "outputs/run/checkpoint-5000"},
        sample_before="def \x1b[2J\x07 q#2 zzx)",
        sample_after="def parse(self, name):\n\treturn self.value",
        layers=layers,
    )
