"""A run that cannot fit is refused before a process starts; one that may is not."""

from __future__ import annotations

import pytest
from command_line import Say
from patches import Replace

from launcher.cli import memory_check
from launcher.cli.memory_check import refuse_what_cannot_fit
from moe_dist.config import Config, ConfigError, load_config
from moe_dist.plan import machine


def run_of(device: str, **parallel: object) -> Config:
    config = load_config("configs/moe_64x.yaml")  # 6.6 billion parameters: 106 GB of state over 8 ranks of ep
    launch = config.launch.model_copy(update={"device": device})
    return config.model_copy(
        update={"launch": launch, "parallel": config.parallel.model_copy(update={"zero_stage": 0, **parallel})}
    )


def on_a_machine(replace: Replace, device: str, cuda: float | None, host: float | None) -> None:
    """What it says of the devices that a run could take."""
    if device != "cpu":
        replace(memory_check, "cuda_devices", lambda: [] if cuda is None else [("GPU", int(cuda))])
    if device != "cuda":
        replace(memory_check, "host_memory", lambda: None if host is None else int(host))


@pytest.mark.parametrize(
    ("device", "cuda", "host"),
    [("cuda", 12e9, None), ("cuda", 12e9, 1e12), ("cpu", None, 50e9), ("cpu", 1e12, 50e9), ("auto", 12e9, 50e9)],
)
def test_what_cannot_fit_is_refused(replace: Replace, device: str, cuda: float | None, host: float | None) -> None:
    on_a_machine(replace, device, cuda, host)
    with pytest.raises(ConfigError, match=r"parallel.zero_stage=0: weights, gradients and optimizer state take"):
        refuse_what_cannot_fit(run_of(device), "run.yaml", 8)


@pytest.mark.parametrize(
    ("device", "cuda", "host"),
    [("cuda", 24e9, 1.0), ("cuda", None, 1.0), ("cpu", 1.0, 200e9), ("auto", 12e9, 1e12), ("auto", None, None)],
)
def test_what_may_fit_is_started(replace: Replace, device: str, cuda: float | None, host: float | None) -> None:
    """Devices nobody knows, a host that is large enough, a device that holds the state and little more."""
    on_a_machine(replace, device, cuda, host)
    refuse_what_cannot_fit(run_of(device), "run.yaml", 8)


def test_the_nearest_is_named(replace: Replace) -> None:
    """What is named is not refused itself."""
    on_a_machine(replace, "cuda", 60e9, None)
    with pytest.raises(ConfigError, match=r"this fits: moe-dist train run.yaml launch.nproc_per_node=8") as refused:
        refuse_what_cannot_fit(run_of("cuda", ep_size=1), "run.yaml", 8)
    keys = [word for word in str(refused.value).split() if word.startswith(("parallel.", "train."))]
    named = load_config("configs/moe_64x.yaml", [*keys[1:], "launch.device=cuda"])
    refuse_what_cannot_fit(named, "run.yaml", 8)


def test_check_holds_a_run_file_against_the_machine_it_names(say: Say) -> None:
    """Exit code 2 and one line with what fits; nothing where the devices are not known. Seen to print the layout."""
    done = say("check", "configs/moe_64x.yaml", "launch.cluster=h100", "parallel.zero_stage=0", "parallel.ep_size=1")
    assert done.code == 2
    assert done.err.startswith(
        "moe-dist: error: parallel.zero_stage=0: weights, gradients and optimizer state take 106 GB"
    )
    assert "on a rank of h100, which has 85 GB; this fits: moe-dist train configs/moe_64x.yaml" in done.err
    assert say("check", "configs/moe_64x.yaml", "launch.cluster=h100").code == 0


def test_check_says_nothing_where_the_machine_is_not_known(replace: Replace) -> None:
    """Ranks of other hosts, whose memory nobody here knows; but devices like those here, where there are some."""
    many = run_of("auto", ep_size=1)
    replace(memory_check, "cuda_devices", lambda: devices)
    devices: list[tuple[str, int]] = []
    refuse_what_cannot_fit(many, "run.yaml", 16, here=False)
    devices = [("GPU", 24 * 10**9)]
    with pytest.raises(
        ConfigError, match=r"take 106 GB on a rank, which has 24 GB; this fits: moe-dist launch torchrun"
    ):
        refuse_what_cannot_fit(many, "run.yaml", 16, here=False)


def test_this_machine_says_how_much_it_has() -> None:
    assert (machine.host_memory() or 0) > 1e9
