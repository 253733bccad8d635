"""`parallel.layout: auto`: what a plan ranks first is what trains, the same whatever starts it, and it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from patches import Replace
from ranks import run_ranks

from launcher.backends import kubernetes, mpirun, ray, slurm, torchrun
from launcher.backends.command import chosen, for_world
from launcher.connect.process_groups import _agree_on_the_layout
from moe_dist.config import Config, ConfigError, load_config, load_mapping
from moe_dist.plan import elastic, machine
from moe_dist.plan.cluster import Cluster, cluster_of
from moe_dist.plan.elastic import replan
from moe_dist.plan.search import plan
from moe_dist.train import MoETrainer

TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * 12 for i in range(24)]
# Two hosts of four, between which there is little; and one where everything is near.
FAR = cluster_of("cpu").model_copy(update={"devices_per_host": 4, "network_bandwidth": 1e5, "memory_gb": 1.0})
NEAR = FAR.model_copy(update={"devices_per_host": 8, "link_bandwidth": 1e12, "link_latency": 0.0})


def config(folder: Path | str = "none", **changed: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "model": {
            "vocab_size": 272,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "moe_intermediate_size": 24,
            "num_experts": 8,
        },
        "data": {"max_seq_length": 32, "validation_split": 0.0},
        "parallel": {"layout": "auto"},
        "train": {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 16,
            "max_steps": 2,
            "output_dir": str(folder),
        },
        "balance": {"aux_loss_scope": "sequence"},
        "checkpoint": {"save_steps": 2},
        "monitor": {"progress": "none", "tensorboard": False},
        "launch": {},
    }
    return load_mapping({name: section | changed.get(name, {}) for name, section in tree.items()})


def on(replace: Replace, cluster: Cluster | None) -> None:
    replace(elastic, "machine_of", lambda config, per_host: cluster)


def test_it_is_the_best_of_the_plan(replace: Replace) -> None:
    """With as many sequences in a step as the file has. Seen to fail with the last of the plan taken."""
    on(replace, FAR)
    found, said = replan(config(), 8)
    best = plan(config(), 8, FAR, global_batch=128).best
    assert best is not None
    assert keys_of(found) | best.keys == keys_of(found)
    assert found.global_batch_size(8) == 128
    assert best.name in str(said)
    assert replan(found, 8) == (found, None), "it has been chosen"


def test_resuming_keeps_it_on_as_many_ranks(tmp_path: Path, replace: Replace) -> None:
    """Though a plan would choose otherwise now. On more ranks it chooses anew, and keeps the batch of the checkpoint;
    another batch in the file is another training. Seen to fail with the checkpoint's choice left alone."""
    cluster = FAR
    replace(elastic, "machine_of", lambda config, per_host: cluster)
    first, _ = replan(config(tmp_path), 1)
    MoETrainer(first).train(TEXTS)
    cluster = FAR.model_copy(update={"memory_gb": 2e-3})  # what has trained would not fit
    again, said = replan(config(tmp_path), 1)
    assert chosen(again) == chosen(first)
    assert "as in checkpoint-2" in str(said)
    assert MoETrainer(again).train(TEXTS).steps == 2
    two, _ = replan(config(tmp_path), 2)
    assert two.parallel.planned_ranks == 2
    assert two.global_batch_size(2) == first.global_batch_size(1) == 16
    best = plan(config(), 2, cluster, global_batch=16).best
    assert best is not None
    assert keys_of(two) | best.keys == keys_of(two)
    other, _ = replan(config(tmp_path, train={"gradient_accumulation_steps": 8}), 1)
    assert other.global_batch_size(1) == 8
    saved = load_config(tmp_path / "config.yaml")
    assert (saved.parallel.planned_ranks, chosen(saved)) == (1, chosen(first))
    assert replan(saved, 1)[1] is None


def test_what_is_evaluated_stays_whatever_is_chosen(tmp_path: Path, replace: Replace) -> None:
    """The samples that the file asks for, told to ranks, and after a stop those that it asks for then. Seen to fail as
    it was: five batches of another size."""
    on(replace, FAR)
    given = config(tmp_path, train={"eval_batches": 5}, data={"validation_split": 0.3})
    first, _ = replan(given, 1)
    assert first.train.per_device_train_batch_size > 1
    assert first.num_evaluated == given.num_evaluated == 5
    assert load_mapping(given.model_dump(), [*chosen(first)]).train == first.train
    MoETrainer(first).train(TEXTS)
    more = config(tmp_path, train={"eval_batches": 6}, data={"validation_split": 0.3})
    again, said = replan(more, 1)
    assert "as in checkpoint-2" in str(said)
    assert (again.train.per_device_train_batch_size, again.num_evaluated) == (
        first.train.per_device_train_batch_size,
        6,
    )


def test_a_micro_batch_that_trains_otherwise_stays(tmp_path: Path, replace: Replace) -> None:
    """On another number of ranks, here in a pipeline, where the balancing loss is counted over each.

    Seen to fail with the fastest taken.
    """
    on(replace, FAR)
    balance = {"aux_loss_scope": "micro_batch"}
    MoETrainer(replan(config(tmp_path, balance=balance), 1)[0]).train(TEXTS)
    same, other = (replan(config(tmp_path, balance=one), 2)[0] for one in (balance, {}))
    assert (same.train.per_device_train_batch_size, other.train.per_device_train_batch_size) == (16, 8)
    assert same.global_batch_size(2) == other.global_batch_size(2) == 16


def keys_of(found: Config) -> dict[str, Any]:
    tree = found.model_dump()
    return {f"{section}.{key}": value for section in ("parallel", "train") for key, value in tree[section].items()}


def test_where_there_is_nothing_to_choose_it_is_one_line(replace: Replace) -> None:
    said = "none"
    replace(elastic, "machine_of", lambda config, per_host: {"none": None, "small": SMALL, "near": NEAR}[said])
    with pytest.raises(
        ConfigError, match=r"parallel.layout=auto: the devices here are not known; .*launch.cluster=h100"
    ):
        replan(config(), 2)
    said = "small"
    with pytest.raises(ConfigError, match=r"on 2 ranks: no layout fits cpu, .* the nearest, .*, needs .* more ranks"):
        replan(config(), 2)
    said = "near"
    with pytest.raises(
        ConfigError, match=r"world_size=5: no layout keeps the global batch of 12 sequences; .*: 1, 2, 3"
    ):
        replan(config(), 5, 12)
    with pytest.raises(
        ConfigError, match=r"parallel.layout=auto: no layout has been chosen for 1 ranks; moe-dist train"
    ):
        MoETrainer(config()).train(TEXTS)


SMALL = NEAR.model_copy(update={"memory_gb": 1e-5})


def run_file(folder: Path, **changed: Any) -> tuple[str, Config]:
    """A file with the layout left open, for a machine that it names."""
    (folder / "ours.yaml").write_text("gpu: cpu\ndevices_per_host: 2\nnetwork_bandwidth: 1.0e+5\n")
    tree = config("outputs/nobody-has-run").model_dump(mode="json", exclude_defaults=True)
    tree["launch"] = {"nproc_per_node": 2, "cluster": str(folder / "ours.yaml")} | changed
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path), load_config(path)


def test_every_starter_chooses_the_same(tmp_path: Path, replace: Replace) -> None:
    """Four ranks on two hosts; it is said once, and ranks are told. Seen to fail with any of them telling nobody."""
    path, settings = run_file(tmp_path)
    said: list[str] = []
    wanted = chosen(for_world(settings, 4, said.append, per_host=2))
    request = torchrun.Request("2", 2, 0, "127.0.0.1:29400")
    starts = [torchrun.plan(path, [], settings, request, said.append).command]
    program = tmp_path / "mpirun"
    program.write_text("#!/bin/sh\necho 'mpirun (Open MPI) 5'\n")
    program.chmod(0o700)
    starts.append(
        mpirun.plan(path, [], settings, mpirun.Request(4, "a:2,b:2", mpirun=str(program)), said.append).command
    )
    starts.append(slurm.plan(path, [], settings, slurm.Request(2, 2), said.append).command)
    assert all(list(start[-len(wanted) :]) == wanted for start in starts)
    pods = yaml.safe_load_all(kubernetes.manifests(settings, None, 2, 2, notice=said.append))
    text = next(item["data"]["run.yaml"] for item in pods if item["kind"] == "ConfigMap")
    assert chosen(load_mapping(yaml.safe_load(text))) == wanted
    told, notes = ray.plan(settings, ray.Request(num_workers="4"))
    assert chosen(told.config) == wanted
    assert {*said, *notes} == {said[0]}
    assert said[0].startswith("parallel.layout=auto on 4 ranks of cpu: ")
    assert wanted[0] == "parallel.planned_ranks=4"


def test_what_is_submitted_elsewhere_is_chosen_there(tmp_path: Path) -> None:
    """Devices of a login node say nothing of those of the job; that the batch can be kept is checked at once."""
    path, settings = run_file(tmp_path, cluster=None)
    said: list[str] = []
    assert "parallel.planned_ranks" not in " ".join(
        slurm.plan(path, [], settings, slurm.Request(2, 2), said.append).command
    )
    assert "chosen where the ranks start" in said[0]
    assert ray.plan(settings, ray.Request(num_workers="2"))[0].config == settings
    settings.parallel.planned_ranks = 16  # of another start, whose batch it keeps
    with pytest.raises(ConfigError, match=r"world_size=24: no layout keeps the global batch"):
        slurm.plan(path, [], settings, slurm.Request(3, 8))


@pytest.mark.parametrize(
    ("name", "size", "device", "found"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, "auto", ("h100", 85.0)),
        ("NVIDIA A100-SXM4-40GB", 40960, "cuda", ("a100", 42.949672)),
        ("NVIDIA GH200 480GB", 97871, "auto", None),
        ("", 0, "cuda", None),
        ("", 0, "auto", ("cpu", 12.0)),
        ("NVIDIA H200", 143771, "cpu", ("cpu", 12.0)),
    ],
)
def test_the_machine_is_what_is_here(replace: Replace, name: str, size: int, device: str, found: Any) -> None:
    """By the driver's name, with the memory that is there; a host's in whole GB, so that like hosts choose alike."""
    if device != "cpu":
        replace(machine, "cuda_devices", lambda: [(name, size * 2**20)] if name else [])
    if found is not None and found[0] == "cpu":
        replace(machine, "host_memory", lambda: 24_999_999_999)
    here = machine.machine_of(config(launch={"device": device}), 2)
    assert (here and (here.name, pytest.approx(here.memory_gb))) == found


def test_a_cluster_that_is_named_is_taken(tmp_path: Path) -> None:
    assert machine.machine_of(config(launch={"cluster": "h200"}), 4) == cluster_of("h200")
    with pytest.raises(ConfigError, match=r"launch.cluster=h300: one of h100, .*, or a file"):
        machine.machine_of(config(launch={"cluster": "h300"}), 4)
    (tmp_path / "ours.yaml").write_text("gpu: h300\n")
    with pytest.raises(ConfigError, match=r"ours.yaml: gpu=h300: one of h100"):
        machine.machine_of(config(launch={"cluster": str(tmp_path / "ours.yaml")}), 4)


def differ() -> str:
    import torch
    import torch.distributed as dist

    asked = config(parallel={"ep_size": 1 + dist.get_rank()})
    _agree_on_the_layout(config(), torch.device("cpu"))
    try:
        _agree_on_the_layout(asked, torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return "nothing"


@pytest.mark.dist
def test_hosts_that_choose_differently_are_told() -> None:
    """Instead of waiting for each other in groups that only some of them have."""
    said = run_ranks(differ, 2)
    assert all(text.startswith("parallel.layout: hosts with different devices") for text in said)
    assert "ep_size=2" in said[1]
