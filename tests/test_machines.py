"""Every run file that is shipped is held against the machine it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_dist.config import load_config
from moe_dist.models.counts import flops_per_token
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.state_bytes import state_bytes

CONFIGS = Path(__file__).parent.parent / "configs"
PRESETS = {"aggressive", "balanced", "conservative"}
GB = 10**9
# Ranks, and the bytes of one device.
MACHINES = {
    "demo": (2, 4 * GB),
    "finetune": (2, 4 * GB),
    "mixtral_8x7b": (8, 141 * GB),
    "finetune_mixtral": (4, 141 * GB),
    "distributed": (4, 4 * GB),
    "moe_16x": (2, 4 * GB),
    "moe_32x": (8, 24 * GB),
    "moe_64x": (8, 80 * GB),
    "qwen3_235b_a22b": (64, 141 * GB),
    "qwen3_30b_a3b": (8, 141 * GB),
    "qwen3_coder_480b_a35b": (320, 141 * GB),
}
FOR_PLANNING = {"mixtral_8x22b": (8, 222)}


def _largest(name: str, ranks: int) -> int:
    config = load_config(CONFIGS / f"{name}.yaml", notice=lambda text: None)
    return max(place.total for place in state_bytes(config, Layout.of(config, ranks)))


def test_every_run_file_has_a_machine() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == PRESETS | set(MACHINES) | set(FOR_PLANNING)


@pytest.mark.parametrize("name", MACHINES)
def test_the_state_fits(name: str) -> None:
    """Seen red: qwen3_coder_480b_a35b named 160 GPUs of 141 GB and needed 150 GB on each."""
    ranks, room = MACHINES[name]
    assert _largest(name, ranks) <= 0.95 * room


@pytest.mark.parametrize(
    ("name", "ranks", "said"),
    [("qwen3_30b_a3b", 8, "18 bytes"), ("qwen3_235b_a22b", 64, "10 bytes"), ("mixtral_8x22b", 8, "222 GB")],
)
def test_bytes_in_the_heading_are_those_of_the_state(name: str, ranks: int, said: str) -> None:
    """Seen red: 16 and 8 bytes a parameter, and 178 GB."""
    from moe_dist.models.counts import per_rank

    text = (CONFIGS / f"{name}.yaml").read_text("utf-8")
    config = load_config(CONFIGS / f"{name}.yaml", notice=lambda note: None)
    held = max(place.total for place in per_rank(config.model, Layout.of(config, ranks)))
    number, unit = said.split()
    found = _largest(name, ranks)
    assert round(found / GB if unit == "GB" else found / held) == int(number)
    assert said in " ".join(text.replace("\n# ", " ").split())


def test_a_laptop_finishes_a_step_of_the_first_own_training() -> None:
    """Two cores do 40 GFLOP/s and more of such layers, so this is 25 s. Seen red: 127e12, and 4 processes."""
    config = load_config(CONFIGS / "moe_16x.yaml", notice=lambda text: None)
    assert config.launch.nproc_per_node <= 2
    assert not config.train.bf16  # emulated on most laptops
    tokens = config.global_batch_size(config.launch.nproc_per_node) * config.data.max_seq_length
    assert tokens * flops_per_token(config.model, config.data.max_seq_length) <= 1e12
