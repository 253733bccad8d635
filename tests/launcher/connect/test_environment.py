"""What a starter leaves in the environment, and what cannot be."""

from __future__ import annotations

import pytest

from launcher.connect.environment import (
    Environment,
    detect,
    expand_nodes,
    from_slurm,
    join_slurm,
    named_job,
    refuse_half_a_torchrun,
    started_by_torchrun,
    this_job,
)
from moe_dist.checkpoint.lock import Job
from moe_dist.config import ConfigError

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}


def test_alone() -> None:
    assert not started_by_torchrun({})
    assert detect({}) == Environment(rank=0, local_rank=0, world_size=1, local_world_size=1)
    assert not detect({}).is_distributed


def test_one_of_many() -> None:
    assert started_by_torchrun(TORCHRUN)
    assert detect(TORCHRUN) == Environment(rank=5, local_rank=1, world_size=8, local_world_size=4)
    assert detect(TORCHRUN).is_distributed


def test_a_world_of_one_needs_no_address() -> None:
    assert not detect({"RANK": "0", "WORLD_SIZE": "1"}).is_distributed


def test_without_local_variables_all_ranks_are_on_one_machine() -> None:
    ours = {name: value for name, value in TORCHRUN.items() if not name.startswith("LOCAL")}
    assert detect(ours) == Environment(rank=5, local_rank=5, world_size=8, local_world_size=8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": "8"}, "RANK=8: from 0 to 7"),
        ({"RANK": "-1"}, "RANK=-1: from 0 to 7"),
        ({"RANK": "first"}, "RANK=first: a whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is empty: a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4: from 0 to 3"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: from 0 to 3"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "soon"}, "MASTER_PORT=soon"),
        ({"RANK": None}, "RANK is not set, but WORLD_SIZE=8"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set, but RANK=5"),
    ],
    ids=str,
)
def test_contradictions_are_named(change: dict[str, str | None], said: str) -> None:
    environ = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        detect(environ)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


SRUN = {
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "9",  # of the job, from the shell around it
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_TASKS_PER_NODE": "3(x3)",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_JOB_NODELIST": "login,node[08-11]",
    "SLURM_STEP_NODELIST": "node[08-11]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
TASK = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "2"}
# As measured on 22.05: the shell that salloc opens on a node is a step, and its job has several tasks.
SALLOC = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}


def changed(change: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in {**SRUN, **change}.items() if value is not None}


def test_a_task_of_srun_is_a_rank() -> None:
    environ = dict(SRUN)
    join_slurm(environ)
    meeting = {"MASTER_ADDR": "node08", "MASTER_PORT": "11234", "MOE_DIST_TOKEN": "slurm-41234-0-0"}
    assert environ == {**SRUN, **TASK, **meeting}
    again = from_slurm(changed({"SLURM_RESTART_COUNT": "2"}))
    assert (again["MASTER_PORT"], again["MOE_DIST_TOKEN"]) == ("27072", "slurm-41234-0-2")
    assert detect(environ) == Environment(rank=5, local_rank=1, world_size=7, local_world_size=2)


def test_an_older_slurm_and_a_given_meeting_point() -> None:
    old = changed({"SLURM_STEP_NUM_TASKS": None, "SLURM_STEP_TASKS_PER_NODE": None, "SLURM_STEP_NODELIST": None})
    old |= {"SLURM_NODELIST": "n[1-3]", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29500"}
    del old["SLURM_JOB_NODELIST"]
    expected = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "9", "LOCAL_WORLD_SIZE": "3"}
    given = {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29500", "MOE_DIST_TOKEN": "slurm-41234-0-0"}
    assert from_slurm(old) == {**expected, **given}


def test_two_steps_of_a_job_and_two_jobs_have_ports_of_their_own() -> None:
    steps = ({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in range(41230, 41240) for step in range(4))
    ports = {from_slurm(changed(dict(step)))["MASTER_PORT"] for step in steps}
    assert len(ports) == 40
    assert all(10000 <= int(port) < 30000 for port in ports)


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": None},
        {"SLURM_PROCID": None},
        SALLOC,
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"MOE_DIST_SLURM": "0"},
        {**TORCHRUN, "TORCHELASTIC_RUN_ID": "41234-0"},
        {"OMPI_COMM_WORLD_SIZE": "14", "OMPI_COMM_WORLD_RANK": "5"},
        {"PMI_SIZE": "7", "PMI_RANK": "6"},
    ],
    ids=["batch script", "salloc on the login node", "salloc", "one task", "told not to", "torchrun", "ompi", "hydra"],
)
def test_who_starts_ranks_of_its_own(change: dict[str, str | None]) -> None:
    """Seen to fail with SLURM_NTASKS, the number of the whole job, in place of the step's."""
    assert from_slurm(changed(change)) == {}


def test_a_task_of_srun_that_mpi_knows_too() -> None:
    """`srun --mpi=pmi2`: both say the same."""
    assert from_slurm(changed({"PMI_SIZE": "7", "PMI_RANK": "5"})) == from_slurm(SRUN)


def test_machines_that_would_each_train_alone() -> None:
    """Seen to train twice into one folder: the command of a TrainJob without torchrun."""
    with pytest.raises(
        ConfigError, match=r"PET_NNODES=2, but no torchrun has started this process: use moe-dist launch"
    ):
        refuse_half_a_torchrun({"PET_NNODES": "2"})
    for environ in ({}, {"PET_NNODES": "1"}, {"PET_NNODES": "2", **TORCHRUN}):
        refuse_half_a_torchrun(environ)


def test_a_single_task_on_request() -> None:
    alone = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "a"}
    place = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    environ = changed({**alone, **place, "MOE_DIST_SLURM": "1"})
    join_slurm(environ)
    assert detect(environ) == Environment()
    assert started_by_torchrun(environ)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"MOE_DIST_SLURM": "yes"}, "MOE_DIST_SLURM=yes: 1 (a task of srun is a rank) or 0"),
        ({"MOE_DIST_SLURM": "1", "SLURM_STEP_ID": None}, "MOE_DIST_SLURM=1, but no srun has started this process"),
        ({"MOE_DIST_SLURM": "1", **SALLOC}, "MOE_DIST_SLURM=1, but no srun has started this process"),
        ({"RANK": "4"}, "RANK=4, but in this task of srun it is 5: unset RANK, or set MOE_DIST_SLURM=0"),
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "host"}, "WORLD_SIZE=8, but in this task of srun it is 7"),
        ({"SLURM_PROCID": "7"}, "SLURM_PROCID=7: from 0 to 6"),
        ({"SLURM_PROCID": "first"}, "SLURM_PROCID=first: a whole number"),
        ({"SLURM_LOCALID": "2"}, "SLURM_LOCALID=2: from 0 to 1"),
        ({"SLURM_LOCALID": None}, "SLURM_LOCALID is not set in step 0 of srun"),
        ({"SLURM_NODEID": "4"}, "SLURM_NODEID=4: from 0 to 3 (SLURM_STEP_TASKS_PER_NODE=2(x3),1)"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_TASKS_PER_NODE=2(x3),1: 7 tasks, but srun has started 8"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2x3"}, "SLURM_STEP_TASKS_PER_NODE=2x3: tasks per node as in 2(x3),1"),
        ({"SLURM_STEP_NODELIST": "a,b"}, "SLURM_STEP_NODELIST=a,b: 2 nodes, but there are tasks on 4"),
        ({"SLURM_STEP_NODELIST": "a[3-1]"}, "SLURM_STEP_NODELIST=a[3-1]: node names as in"),
    ],
    ids=str,
)
def test_what_srun_cannot_have_meant(change: dict[str, str | None], said: str) -> None:
    """Seen to fail (the shell of salloc) with steps that nobody started by srun taken for real ones."""
    with pytest.raises(ConfigError) as caught:
        from_slurm(changed(change))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("node1", "node1"),
        ("gpu-a,gpu-b", "gpu-a gpu-b"),
        ("node[1-3,7],gpu-a", "node1 node2 node3 node7 gpu-a"),
        ("n[08-11]", "n08 n09 n10 n11"),
        ("n[098-101,5]-ib.cluster", "n098-ib.cluster n099-ib.cluster n100-ib.cluster n101-ib.cluster n5-ib.cluster"),
        ("r[1-2]n[3-4]", "r1n3 r1n4 r2n3 r2n4"),
    ],
)
def test_node_lists(text: str, nodes: str) -> None:
    assert expand_nodes("LIST", text) == nodes.split()


@pytest.mark.parametrize("text", ["", ",", "a,", "n[", "n[]", "n[1-]", "n[2-1]", "n[1", "n]1[", "n[a]", "n[1,]"])
def test_what_is_no_node_list(text: str) -> None:
    with pytest.raises(ConfigError, match="LIST="):
        expand_nodes("LIST", text)


@pytest.mark.parametrize(
    ("environ", "names", "earlier"),
    [
        ({}, [], []),
        ({"MOE_DIST_JOB": "a1"}, ["MOE_DIST_JOB=a1"], ["MOE_DIST_JOB=a1"]),
        ({"SLURM_JOB_ID": "7"}, ["SLURM_JOB_ID=7"], []),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, ["SLURM_JOB_ID=7"], ["SLURM_JOB_ID=7"]),
        ({"TORCHELASTIC_RUN_ID": "r", "TORCHELASTIC_RESTART_COUNT": "0"}, ["TORCHELASTIC_RUN_ID=r"], []),
        (
            {"TORCHELASTIC_RUN_ID": "r", "TORCHELASTIC_RESTART_COUNT": "2"},
            ["TORCHELASTIC_RUN_ID=r"],
            ["TORCHELASTIC_RUN_ID=r"],
        ),
        # Of our own agent: several machines have one run id for all runs into a folder.
        (
            {"MOE_DIST_JOB": "a1", "TORCHELASTIC_RUN_ID": "r", "TORCHELASTIC_RESTART_COUNT": "2"},
            ["MOE_DIST_JOB=a1"],
            ["MOE_DIST_JOB=a1"],
        ),
    ],
    ids=str,
)
def test_which_starts_belong_together(environ: dict[str, str], names: list[str], earlier: list[str]) -> None:
    """Seen to fail with SLURM_RESTART_COUNT not looked at: two runs by hand in one allocation are then one job."""
    assert this_job(environ) == Job(tuple(names), tuple(earlier))


def test_a_launcher_names_its_job_once() -> None:
    assert named_job({"MOE_DIST_JOB": "given"}) == {"MOE_DIST_JOB": "given"}
    assert named_job({}) != named_job({})
