"""k8s/: what Kubernetes would take, what the pods would be told, and that processes told just that train together."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from programs import BIN, HARD_LIMIT, Program, write_config
from ranks import free_port
from typer.testing import CliRunner

from launcher.backends.kubernetes import MANIFESTS, overlays, render
from launcher.cli.commands import run
from launcher.cli.launch import app
from launcher.connect.environment import Environment, detect
from launcher.supervise.agent import one_code, ranks
from moe_dist.config import load_config

kube_check = pytest.importorskip("kube_check", reason="kubernetes-validate is not installed: pip install -e '.[dev]'")

ROOT = MANIFESTS.parent
DEMO = str(ROOT / "configs" / "demo.yaml")
FOLDERS = {"base": MANIFESTS / "base", **{name: MANIFESTS / "overlays" / name for name in overlays()}}
NAMES = list(FOLDERS)
# What each controller adds to the environment of the pod with this number (its documentation says so, not our files).
INJECTED = {
    "Job": lambda index: {"JOB_COMPLETION_INDEX": str(index)},
    "JobSet": lambda index: {"JOB_COMPLETION_INDEX": str(index)},
    "PyTorchJob": lambda index: {
        "RANK": str(index),
        "WORLD_SIZE": "2",
        "PYTHONUNBUFFERED": "1",
        "MASTER_ADDR": "moe-dist-master-0",
        "MASTER_PORT": "23456",
    },
    "TrainJob": lambda index: {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "1",
        "PET_NODE_RANK": str(index),
        "PET_MASTER_ADDR": "moe-dist-node-0-0.moe-dist",
        "PET_MASTER_PORT": "29400",
    },
}
Object = dict[str, Any]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def launch(*arguments: str) -> Done:
    """`moe-dist launch k8s ...`, its real command line inside this process: starting Python thirty times is slow."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["moe-dist", "launch", "k8s", *arguments])
        code = run()
    return Done(code, out.getvalue(), err.getvalue())


def launch_for_real(*arguments: str, **environment: str) -> Done:
    command = [BIN / "moe-dist", "launch", "k8s", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    return Done(done.returncode, done.stdout, done.stderr)


def everything(tree: Any, path: str = "") -> Iterator[tuple[str, Object]]:
    """Every mapping in a tree, with where it is."""
    if isinstance(tree, dict):
        yield path, tree
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from everything(value, f"{path}/{key}")


def pod_specs(objects: list[Object]) -> list[Object]:
    """Specs of pods, those in which an operator is told volumes only included."""
    return [part for item in objects for _, part in everything(item) if "containers" in part]


def job_of(objects: list[Object]) -> Object:
    (job,) = [item for item in objects if item["kind"].endswith("Job") or item["kind"] == "JobSet"]
    return job


def main_container(objects: list[Object]) -> Object:
    """What trains: its command, arguments and environment."""
    job = job_of(objects)
    if job["kind"] == "TrainJob":
        return job["spec"]["trainer"]
    return pod_specs([job])[0]["containers"][0]


# --- what would be applied


@pytest.mark.launch
@pytest.mark.parametrize("name", [*NAMES, "gpu,jobset,monitoring", "gpu,trainjob", "gpu,pytorchjob", "gpu,rayjob"])
def test_kubectl_renders_the_same(name: str, tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip(
            "NO KUBECTL HERE: our rendering of k8s/ is not compared with it (apt-get install kubernetes-client)"
        )
    folder = FOLDERS.get(name)
    if folder is None:  # several components together, as docs/launch/kubernetes.md has it
        shutil.copytree(MANIFESTS, tmp_path / "k8s")
        folder = tmp_path / "k8s/overlays/mine"
        folder.mkdir()
        plan = {"resources": ["../../base"], "components": [f"../../components/{part}" for part in name.split(",")]}
        (folder / "kustomization.yaml").write_text(yaml.dump(plan))
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

    def by_name(objects: Any) -> list[Object]:
        return sorted(objects, key=lambda item: (item["kind"], item["metadata"]["name"]))

    assert by_name(yaml.safe_load_all(done.stdout)) == by_name(render(folder))


@pytest.mark.parametrize("name", NAMES)
def test_kubernetes_would_take_it(name: str) -> None:
    objects = render(FOLDERS[name])
    assert {f"{item['kind']}: {text}" for item in objects for text in kube_check.complaints(item)} == set()


# Overlay, kind, where, what is put there, and a word of the complaint.
PLANTS = """
base | Job | spec/completion | 2 | completion
base | Job | spec/completions | "two" | two
base | Job | spec/template/spec/containers/0/resource | {} | resource
base | Job | spec/podFailurePolicy/rules/0/action | 1 | 1
base | Job | kind | "Jobb" | nobody knows this kind
base | Job | metadata/label | {} | label
base | Service | spec/clusterip | "None" | clusterip
base | PersistentVolumeClaim | spec/accessModes | "ReadWriteMany" | ReadWriteMany
jobset | JobSet | spec/failurePolicy/maxRestart | 6 | maxRestart
jobset | JobSet | spec/failurePolicy/maxRestarts | "6" | 6
jobset | JobSet | spec/replicatedJobs/0/template/spec/backofLimit | 0 | backofLimit
jobset | JobSet | spec/replicatedJobs/0/template/spec/template/spec/containers/0/imagePolicy | "" | imagePolicy
jobset | JobSet | apiVersion | "jobset.x-k8s.io/v1" | apiVersion
jobset | JobSet | kind | "JobSets" | nobody knows this kind
trainjob | TrainJob | spec/trainer/numNode | 2 | numNode
trainjob | TrainJob | spec/trainer/numNodes | "2" | 2
trainjob | TrainJob | spec/runtimePatches/0/trainingRuntimeSpec/template/spec/replicatedJob | [] | replicatedJob
pytorchjob | PyTorchJob | spec/pytorchReplicaSpecs/Master/restart | "Never" | restart
pytorchjob | PyTorchJob | spec/pytorchReplicaSpecs/Chief | {} | Chief
pytorchjob | PyTorchJob | spec/pytorchReplicaSpecs/Worker/template/spec/container | [] | container
rayjob | RayJob | spec/entryPoint | "x" | entryPoint
rayjob | RayJob | spec/rayClusterSpec/workerGroupSpecs/0/replica | 1 | replica
rayjob | RayJob | spec/rayClusterSpec/workerGroupSpecs/0/template/spec/container | [] | container
rayjob | RayJob | spec/rayClusterSpec/headGroupSpec/template/spec/containers/0/ports/0/containerPort | "6379" | 6379
monitoring | PodMonitor | spec/podMetricsEndpoints/0/intervall | "15s" | intervall
monitoring | PrometheusRule | spec/groups/0/rules/0/expression | "x" | expression
monitoring | PrometheusRule | spec/groups/0/rules/0/for | 10 | 10
"""


@pytest.mark.parametrize("plant", PLANTS.strip().splitlines())
def test_the_check_sees(plant: str) -> None:
    name, kind, where, value, word = plant.split(" | ")
    (item,) = [item for item in render(FOLDERS[name]) if item["kind"] == kind]
    *above, last = where.split("/")
    part: Any = item
    for step in above:
        part = part[int(step)] if step.isdigit() else part[step]
    part[last] = json.loads(value)
    found = kube_check.complaints(item)
    assert any(word in text for text in found), found


def test_the_pod_monitor_takes_the_run_from_the_run() -> None:
    """The dashboard selects by `run`, folder and id, which only the run knows."""
    (item,) = [item for item in render(FOLDERS["monitoring"]) if item["kind"] == "PodMonitor"]
    (endpoint,) = item["spec"]["podMetricsEndpoints"]
    assert (endpoint["params"], endpoint["honorLabels"]) == ({"label": ["run"]}, True)


def test_alerts_are_those_of_the_project() -> None:
    """The object is made from the rule file by a tool; whoever changes one runs the tool again."""
    command = [sys.executable, "tools/prometheus_rule.py", "moe_dist/monitor/alerts.yml"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert made.returncode == 0, made.stderr
    assert made.stdout == (MANIFESTS / "components/monitoring/prometheusrule.yaml").read_text(), f"run: {command}"
    rules = yaml.safe_load((ROOT / "moe_dist/monitor/alerts.yml").read_text())
    assert yaml.safe_load(made.stdout)["spec"] == rules


# --- what the API server checks beyond schemas, and what we promise


@pytest.mark.parametrize("name", NAMES)
def test_everything_named_is_there(name: str) -> None:
    objects = render(FOLDERS[name])
    names = {(item["kind"], item["metadata"]["name"]) for item in objects}
    for spec in pod_specs(objects):
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
        for container in spec["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
            assert {"/dev/shm", "/runs", "/config", "/tmp"} == {
                mount["mountPath"] for mount in container["volumeMounts"]
            }
        if "subdomain" in spec:
            made_by_jobset = {("Service", item["metadata"]["name"]) for item in objects if item["kind"] == "JobSet"}
            assert ("Service", spec["subdomain"]) in names | made_by_jobset
    config = next(item for item in objects if item["kind"] == "ConfigMap")
    assert list(config["data"]) == ["run.yaml"]


@pytest.mark.parametrize("name", NAMES)
def test_no_pod_may_do_more_than_it_must(name: str) -> None:
    specs = pod_specs(render(FOLDERS[name]))
    assert specs
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["terminationGracePeriodSeconds"] >= 300
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for container in spec["containers"]:
            allowed = container["securityContext"]
            assert allowed["readOnlyRootFilesystem"] is True
            assert allowed["allowPrivilegeEscalation"] is False
            assert allowed["capabilities"]["drop"] == ["ALL"]
            assert allowed["capabilities"].get("add", []) == (["IPC_LOCK"] if name == "gpu" else [])
            assert "livenessProbe" not in container, "a pod that waits for another one looks dead"


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_must_agree_do(name: str) -> None:
    objects = render(FOLDERS[name])
    env = {item["name"]: item.get("value") for item in main_container(objects).get("env", [])}
    jobs = [part for item in objects for _, part in everything(item) if "completionMode" in part]
    for job in jobs:
        assert job["completionMode"] == "Indexed"
        assert str(job["completions"]) == str(job["parallelism"]) == env["NODES"]
        assert job["template"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy asks for it"
        assert ("backoffLimit" in job) != ("backoffLimitPerIndex" in job)
    limits = main_container(objects).get("resources", {}).get("limits", {})
    assert env["MOE_DIST_JOB"] == "kubernetes"
    assert limits.get("nvidia.com/gpu", 1) == (int(env["NPROC_PER_NODE"]) if name == "gpu" else 1)
    if name == "pytorchjob":
        replicas = job_of(objects)["spec"]["pytorchReplicaSpecs"]
        assert replicas["Master"]["replicas"] + replicas["Worker"]["replicas"] == int(env["NODES"])


@pytest.mark.parametrize("name", ["base", "jobset"])
def test_exit_codes_are_understood(name: str) -> None:
    """Each of the launcher's exit codes, walked through the rules as the Job controller does: the first that fits."""
    (job,) = [part for item in render(FOLDERS[name]) for _, part in everything(item) if "podFailurePolicy" in part]
    containers = [container["name"] for container in job["template"]["spec"]["containers"]]

    def action(code: int, disrupted: bool = False) -> str:
        for rule in job["podFailurePolicy"]["rules"]:
            if wanted := rule.get("onExitCodes"):
                assert wanted["containerName"] in containers
                assert wanted["values"] == sorted(set(wanted["values"])), "the API server asks for it"
                if code in wanted["values"]:
                    return rule["action"]
            if disrupted and {"type": "DisruptionTarget", "status": "True"} in rule.get("onPodConditions", []):
                return rule["action"]
        return "Count"

    codes = {code: action(code) for code in (1, 2, 3, 75, 137, 143)}
    assert codes == {1: "Count", 2: "FailJob", 3: "FailJob", 75: "Ignore", 137: "Count", 143: "Count"}
    assert action(137, disrupted=True) == action(143, disrupted=True) == "Ignore"
    assert action(2, disrupted=True) == "FailJob"


def words_of(objects: list[Object], index: int, replaced: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Command and environment of pod `index` as the kubelet would start it; `replaced` is put over the environment.

    Kubernetes writes $(NAME) out with the pod's own environment, and leaves it when there is no such name.
    """
    container = main_container(objects)
    env = {item["name"]: item["value"] for item in container["env"]}
    env |= INJECTED[job_of(objects)["kind"]](index) | replaced
    words = [*container["command"], *container["args"]]
    words = [re.sub(r"\$\((\w+)\)", lambda name: env.get(name[1], name[0]), word) for word in words]
    assert not [word for word in words if "$(" in word], "nobody says what this is"
    return words, env


@pytest.mark.parametrize("name", [name for name in NAMES if name != "rayjob"])
def test_torchrun_and_the_ranks_understand_what_pods_are_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import parse_args

    objects = render(FOLDERS[name])
    worlds, masters = set(), set()
    for node in range(2):
        words, env = words_of(objects, node, {})
        assert words[:4] == ["python", "-m", "moe_dist", "agent"]
        with monkeypatch.context() as pod:
            for key, value in env.items():
                pod.setenv(key, value)
            said = parse_args(words[4:])
        assert (int(said.nnodes), int(said.node_rank)) == (2, node)
        ours = [said.training_script, *said.training_script_args]
        assert said.module
        assert ours[:3] == ["moe_dist", "train", "/config/run.yaml"]
        each, port = int(said.nproc_per_node), str(said.master_port)
        masters.add((said.master_addr, port))
        for local in range(each):
            # What torchrun makes of it, for each rank.
            rank = {"RANK": node * each + local, "LOCAL_RANK": local, "WORLD_SIZE": 2 * each, "LOCAL_WORLD_SIZE": each}
            found = detect(
                {**{key: str(value) for key, value in rank.items()}, "MASTER_ADDR": "x", "MASTER_PORT": port}
            )
            assert found == Environment(*rank.values())
            worlds.add(found.world_size)
        config = load_config(FOLDERS["base"] / "run.yaml", ours[3:])
        assert str(config.train.output_dir) == env["RUN_DIR"] == "/runs/run"
        assert (config.monitor.prometheus.port, config.monitor.prometheus.host) == (9400, "0.0.0.0")
    assert len(worlds) == len(masters) == 1
    ((host, _),) = masters
    job = job_of(objects)["metadata"]["name"]
    expected = {"JobSet": f"{job}-node-0-0.{job}", "TrainJob": f"{job}-node-0-0.{job}", "PyTorchJob": f"{job}-master-0"}
    assert host == expected.get(job_of(objects)["kind"], f"{job}-0.moe-dist")


@pytest.mark.parametrize("overlay", ["rayjob", "gpu,rayjob"])
def test_a_rayjob_asks_ray_for_as_many_ranks_as_its_pods_have_room_for(overlay: str) -> None:
    done = launch(DEMO, "--dry-run", f"--overlay={overlay}", "--nodes=3", "--nproc-per-node=2", "launch.device=auto")
    assert done.returncode == 0, done.stderr
    job = job_of(list(yaml.safe_load_all(done.stdout)))
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [2, 2, 2]
    for group in (cluster["headGroupSpec"], workers):
        assert group["rayStartParams"]["num-cpus"] == "2"
    head, worker = (pod_specs([group])[0] for group in (cluster["headGroupSpec"], workers))
    for spec in (head, worker):
        spec["containers"][0].pop("ports")
    assert head == worker
    env = {item["name"]: item["value"] for item in head["containers"][0]["env"]}
    words = written_out(job["spec"]["entrypoint"], env)
    assert words[:3] == ["moe-dist", "launch", "ray"]
    ray = CliRunner().invoke(app, [*words[2:], "--dry-run"])
    assert ray.exit_code == 0, ray.output
    gpus = "use_gpu=True, resources_per_worker={'CPU': 1, 'GPU': 1}" if "gpu" in overlay else "use_gpu=False"
    assert f"ScalingConfig(num_workers=6, {gpus}" in ray.output
    assert "address      head:6379" in ray.output
    config = load_config(FOLDERS["base"] / "run.yaml", [word for word in words[3:] if re.match(r"[a-z_.]+=", word)])
    assert str(config.train.output_dir) == env["RUN_DIR"] == "/runs/outputs/demo"


def written_out(entrypoint: str, env: dict[str, str]) -> list[str]:
    """The words of an entrypoint, as the shell that Ray gives it to reads them, with the run file of k8s/base."""
    text = entrypoint.replace("/config/run.yaml", str(FOLDERS["base"] / "run.yaml"))
    shell = ["sh", "-c", f"printf '%s\\n' {text}"]
    told = {"PATH": os.environ["PATH"], "RAY_ADDRESS": "head:6379", **env}
    return subprocess.run(shell, env=told, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("codes", "one"), [([75, -15], 75), ([1, 75], 75), ([2, -15], 2), ([75, 3], 3), ([-9], 137), ([-15], 143), ([1], 1)]
)
def test_one_exit_code_for_a_pod(codes: list[int], one: int) -> None:
    assert one_code(codes) == one


# --- moe-dist launch k8s


def test_a_dry_run_prints_the_run_in_its_manifests(tmp_path: Path) -> None:
    done = launch(
        DEMO, "--dry-run", "--nodes=4", "--nproc-per-node=2", "--namespace=lab", "--image=reg:5000/moe:1", "lr=0.5"
    )
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    assert [text for item in objects for text in kube_check.complaints(item)] == []
    assert {item["metadata"]["namespace"] for item in objects} == {"lab"}
    job = job_of(objects)
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (4, 4)
    container = main_container(objects)
    env = {item["name"]: item["value"] for item in container["env"]}
    assert (env["NODES"], env["NPROC_PER_NODE"], env["RUN_DIR"]) == ("4", "2", "/runs/outputs/demo")
    assert container["image"] == "reg:5000/moe:1"
    (tmp_path / "run.yaml").write_text(
        next(item for item in objects if item["kind"] == "ConfigMap")["data"]["run.yaml"]
    )
    expected = load_config(DEMO, ["lr=0.5", "checkpoint.resume=auto"])
    assert load_config(tmp_path / "run.yaml") == expected
    assert "checkpoint.resume=never becomes auto" in done.stderr


@pytest.mark.parametrize(
    "overlay", [*overlays(), "jobset,gpu", "gpu,trainjob", "pytorchjob,gpu,monitoring", "gpu,rayjob"]
)
def test_a_dry_run_of_every_overlay(overlay: str) -> None:
    done = launch(
        DEMO, "--dry-run", f"--overlay={overlay}", "--nodes=3", "--nproc-per-node=4", "--image=i:2", "ep_size=4"
    )
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    assert [text for item in objects for text in kube_check.complaints(item)] == []
    assert {part["image"] for _, part in everything(objects) if isinstance(part.get("image"), str)} == {"i:2"}
    told = {
        str(part[key])
        for _, part in everything(objects)
        for key in ("completions", "parallelism", "numNodes")
        if key in part
    }
    told |= {part["value"] for _, part in everything(objects) if part.get("name") == "NODES"}
    assert told == {"3"}
    ranks = {
        str(part[key]) for _, part in everything(objects) for key in ("numProcPerNode", "nvidia.com/gpu") if key in part
    }
    ranks |= {part["value"] for _, part in everything(objects) if part.get("name") == "NPROC_PER_NODE"}
    assert ranks == {"4"}
    counts = [int(part[key]) for _, part in everything(objects) for key in ("nvidia.com/gpu",) if key in part]
    pods = 2 if {"pytorchjob", "rayjob"} & set(overlay.split(",")) else 1  # templates of pods
    assert counts == ([4] * pods if "gpu" in overlay else [])
    if "pytorchjob" in overlay:
        assert job_of(objects)["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*_*.yaml")), ids=lambda path: path.stem)
def test_every_run_file_works_by_default_or_says_what_to_set(path: Path) -> None:
    """Seen red: moe_16x stopped, and it said which numbers of ranks there are, not what to type."""
    done = launch(str(path), "--dry-run")
    if path.stem == "moe_16x":
        assert done.returncode == 0, done.stderr
        return
    options = re.search(r"; (--nodes \d+ --nproc-per-node \d+) would do\n$", done.stderr)
    assert options, done.stderr
    assert launch(str(path), "--dry-run", *options[1].split()).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((DEMO, "--overlay=gpus"), "--overlay gpus: allowed: gpu, jobset"),
        ((DEMO, "--overlay=jobset,trainjob"), "jobset and trainjob are different kinds of job"),
        ((DEMO, "--nodes=3"), "3 nodes x 1 ranks: "),
        ((f"{ROOT}/configs/moe_32x.yaml",), "; --nodes 2 --nproc-per-node 4 would do"),
        ((f"{ROOT}/configs/moe_32x.yaml", "--nodes=3"), "; --nodes 3 --nproc-per-node 8 would do"),
        ((DEMO, "--nodes=0"), "--nodes"),
        ((DEMO, "--namespace=Lab_1"), "--namespace Lab_1: lower-case"),
        ((DEMO, "--image="), "--image '': the name of an image"),
        ((DEMO, "output_dir=/data/x"), "train.output_dir=/data/x: would be lost with its pod"),
        ((DEMO, "output_dir=../x"), "train.output_dir=../x: would be lost with its pod"),
        ((DEMO, "--overlay=pytorchjob", "--nodes=1", "ep_size=1"), "2 or more"),
        ((DEMO, "num_expert=5"), "nearest: model.num_experts"),
        (("missing.yaml",), "missing.yaml"),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = launch(*arguments, "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("moe-dist: error: ")
    assert said in line


def test_the_page_shows_what_is_printed() -> None:
    """docs/launch/kubernetes.md: its shortened dry run is the real one, line by line between the dots."""
    page = (ROOT / "docs/launch/kubernetes.md").read_text()
    block = page[page.index("$ moe-dist launch k8s configs") :].partition("\n```")[0]
    command, *shown = block.splitlines()
    done = launch(DEMO, *command.split()[5:])
    assert done.returncode == 0, done.stderr
    printed = (done.stderr + done.stdout).splitlines()
    assert len(shown) > 40
    for piece in "\n".join(shown).split("\n..."):
        assert piece.strip("\n") in "\n".join(printed)


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """Of the real kubectl, with nobody at its server's port. Seen to fail with kubectl's own two lines."""
    if shutil.which("kubectl") is None:
        pytest.skip("NOT TESTED HERE: there is no `kubectl` on this machine")
    cluster = {"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}
    context = {"name": "x", "context": {"cluster": "c", "user": ""}}
    (tmp_path / "kubeconfig").write_text(
        yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": [context]})
        + "current-context: x\n"
    )
    done = launch_for_real(DEMO, KUBECONFIG=str(tmp_path / "kubeconfig"))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert line.startswith("moe-dist: error: kubectl reaches no cluster (127.0.0.1:1): choose one with `kubectl config")


def test_without_dry_run_kubectl_gets_exactly_that(tmp_path: Path) -> None:
    """A program in kubectl's place writes down what it is given; there is no cluster to ask."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat > {tmp_path}/given\nexit 7\n')
    kubectl.chmod(0o755)
    done = launch_for_real(DEMO, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 7
    assert (tmp_path / "arguments").read_text() == "apply -f -\n"
    assert (tmp_path / "given").read_text() == launch(DEMO, "--dry-run").stdout
    done = launch_for_real(DEMO, PATH=str(tmp_path / "empty"))
    assert done.returncode == 2
    assert "moe-dist: error: kubectl is not installed; --dry-run prints" in done.stderr


def test_the_image_is_built_from_what_is_there() -> None:
    """Docker itself is not asked: every file that is copied exists, the user is the one of the pods, and not root."""
    lines = (MANIFESTS / "Dockerfile").read_text().splitlines()
    ignored = (ROOT / ".dockerignore").read_text().split()
    stages = [line.split()[-1] for line in lines if line.startswith("FROM ")]
    assert stages == ["python", "build", "dev", "run"], "the last one is what is built unless another is asked for"
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    assert copied
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists(), name
        assert "*" in ignored
        assert f"!{name.rstrip('/')}" in ignored, f"{name} would not be sent to the builder"
    uid = render(FOLDERS["base"])
    assert [line for line in lines if line.startswith("USER ")][
        -1
    ] == f"USER {pod_specs(uid)[0]['securityContext']['runAsUser']}"


# --- pods, simulated: the processes of a rendered Job, with its command and its environment


class Pods:
    """The two pods of a Job as processes of this machine.

    What differs from a cluster: the name of pod 0 is 127.0.0.1 and its port a free one (there is no DNS of a
    cluster), gloo talks over loopback, and the mounts /config and /runs are folders below `folder`.
    """

    def __init__(self, objects: list[Object], folder: Path) -> None:
        (folder / "config").mkdir(exist_ok=True)
        (folder / "runs").mkdir(exist_ok=True)
        text = next(item for item in objects if item["kind"] == "ConfigMap")["data"]["run.yaml"]
        (folder / "config/run.yaml").write_text(text)
        port = str(free_port())
        self.programs = []
        for index in range(2):
            here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            if job_of(objects)["kind"] == "TrainJob":
                here = {f"PET_{name}": value for name, value in here.items()}
            words, env = words_of(objects, index, here)
            words = [re.sub(r"(^|=)/(config|runs)/", rf"\1{folder}/\2/", word) for word in words]
            env = {name: re.sub(r"^/runs", f"{folder}/runs", value) for name, value in env.items() if name != "HOME"}
            self.programs.append(Program(*words, **env, GLOO_SOCKET_IFNAME="lo"))

    def wait_for(self, text: str) -> None:
        self.programs[0].wait_for(text)

    def end(self) -> list[int]:
        return [program.end() for program in self.programs]


def rendered(folder: Path, *arguments: str, nodes: int = 2) -> list[Object]:
    """A small run, as `launch k8s --dry-run` prints it."""
    config = write_config(folder)
    sizes = (f"--nodes={nodes}", f"--nproc-per-node={2 // nodes}")
    done = launch(str(config), "--dry-run", *sizes, "train.output_dir=small", *arguments)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def ready(objects: list[Object], port: str) -> bool:
    """What the command of both probes finds, in whatever pod; on this machine 9400 may be another's."""
    ((python, *words),) = {tuple(part["exec"]["command"]) for _, part in everything(objects) if "exec" in part}
    assert python == "python"
    command = [sys.executable, *(word.replace("9400", port) for word in words)]
    done = subprocess.run(command, env={"MASTER_ADDR": "127.0.0.1"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 or "HTTP Error 503" in done.stderr or "refused" in done.stderr, done.stderr
    return done.returncode == 0


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.launch
def test_pods_train_together_save_on_sigterm_and_go_on(tmp_path: Path) -> None:
    """One pod is asked to leave, as for a drained node: all save the same step and end with 75; new pods go on."""
    objects = rendered(tmp_path, "train.max_steps=100000")
    folder = tmp_path / "runs/small"
    pods = Pods(objects, tmp_path)
    pods.wait_for("step: 3/")
    assert "with 2 processes" in pods.programs[0].out
    (target,) = json.loads((folder / "targets.json").read_text())
    port = target["targets"][0].rpartition(":")[2]  # 9400, or the next free one on this machine
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        assert b"moe_dist_train_loss" in answer.read()
    assert ready(objects, port)
    os.kill(pods.programs[1].pid, signal.SIGTERM)
    assert pods.end() == [75, 75]
    assert not ready(objects, port)
    assert "SIGTERM, passed on to the ranks of this machine: 1" in pods.programs[1].err
    (saved,) = folder.glob("checkpoint-*")
    assert json.loads((saved / "manifest.json").read_text())["layout"]["world"] == 2

    again = Pods(objects, tmp_path)
    again.wait_for(f"resumed from {saved} at step {saved.name.partition('-')[2]}")
    # A rank that is killed: its own pod says so, the other one fails, and neither hangs.
    again.wait_for("step: ")
    (rank,) = ranks(str(again.programs[1].pid))
    os.kill(rank, signal.SIGKILL)
    assert again.end() == [1, 137]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.launch
@pytest.mark.parametrize("overlay", ["jobset", "trainjob", "pytorchjob"])
def test_pods_of_operators_train_to_the_end(tmp_path: Path, overlay: str) -> None:
    """With what the operator adds to their environment: see INJECTED."""
    objects = rendered(tmp_path, f"--overlay={overlay}")
    pods = Pods(objects, tmp_path)
    assert pods.end() == [0, 0]
    assert "step: 3/3" in pods.programs[0].out
    assert "with 2 processes" in pods.programs[0].out


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.launch
def test_pods_with_a_run_that_cannot_be_end_with_2(tmp_path: Path) -> None:
    assert Pods(rendered(tmp_path, "data.path=/nowhere/*.txt"), tmp_path).end() == [2, 2]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.launch
def test_a_pod_that_waits_for_the_others_ends_at_once(tmp_path: Path) -> None:
    """Seen to go on for 40 s with a plain signal handler: the main thread is inside the rendezvous."""
    words, env = words_of(rendered(tmp_path), 1, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
    pod = Program(*words, **env)
    pod.wait_until(lambda: "libtorch_cpu" in Path(f"/proc/{pod.pid}/maps").read_text(), "torch is imported")
    time.sleep(3)
    sent = time.monotonic()
    os.kill(pod.pid, signal.SIGTERM)
    assert pod.end(HARD_LIMIT) == 143
    assert time.monotonic() - sent < 10
