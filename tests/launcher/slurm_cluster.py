"""A real Slurm on this machine: one controller and several node daemons, as the user who runs the tests.

No systemd and no cgroups. Folder, ports and munge key are its own, so it disturbs no other Slurm; all it has started
is gone when the `with` block is left. Nodes are told apart by name only: they share the host, its network and its disk.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ranks import free_port

PATIENCE = 240.0
"""Seconds after which something has failed; a busy machine needs a fraction of it."""
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "munged")
PACKAGES = "slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins"

CONFIG = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0
ReturnToService=1
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
KillWait=30
MinJobAge=300
JobRequeue=1
MaxArraySize=100
LaunchParameters=use_interactive_step
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs={cpus} RealMemory=4000 State=UNKNOWN
{nodes}
PartitionName=debug Nodes=node[1-{count}] Default=YES MaxTime=01:00:00 State=UP
"""


def missing() -> str | None:
    """What of Slurm is not installed here, and how to install it; None when all is there."""
    absent = [name for name in PROGRAMS if find(name) is None]
    if not absent:
        return None
    return f"NOT TESTED, THERE IS NO SLURM HERE: {', '.join(absent)} not found; apt-get install {PACKAGES}"


def find(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def parent_of(pid: int) -> int:
    """0 when there is no such process any more."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


class Cluster:
    """`nodes` nodes called node1, node2, ... with `cpus` CPUs each."""

    def __init__(self, nodes: int = 2, cpus: int = 2) -> None:
        self.count, self.cpus = nodes, cpus
        # A socket's path must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _start(self) -> None:
        host = socket.gethostname().partition(".")[0]
        (self.folder / "state").mkdir()
        lines = []
        for number in range(1, self.count + 1):
            (self.folder / f"spool.node{number}").mkdir()
            lines.append(f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()}")
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(
                host=host,
                controller_port=free_port(),
                user=getpass.getuser(),
                folder=self.folder,
                cpus=self.cpus,
                nodes="\n".join(lines),
                count=self.count,
            )
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        self.wait(lambda: (self.folder / "munge.socket").exists(), "munge")
        self._daemon("slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf"))
        for number in range(1, self.count + 1):
            self.start_node(f"node{number}")
        self.wait(lambda: self.nodes("idle") == self.count, "nodes")

    def start_node(self, name: str) -> None:
        self._daemon("slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf"), called=name)

    def _daemon(self, program: str, *arguments: str, called: str | None = None) -> None:
        path = find(program)
        assert path is not None
        # Not the variables of a test's own surroundings: every job inherits these.
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "USER") if name in os.environ}
        with (self.folder / f"{called or program}.console").open("ab") as log:
            self._daemons[called or program] = subprocess.Popen(
                [path, *arguments],
                env={**kept, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, *command: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """A command of Slurm's, or one that uses Slurm; its output as text."""
        environment = {**os.environ, **self.environment, **options.pop("env", {})}
        done = subprocess.run(
            [str(word) for word in command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            **options,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def nodes(self, state: str) -> int:
        done = self.run("sinfo", "-h", "-t", state, "-o", "%D", check=False)
        return int(done.stdout) if done.stdout.strip() else 0

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, NodeList and so on."""
        text = self.run("scontrol", "show", "job", "-o", number).stdout
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, condition: Callable[[], Any], what: str, within: float = PATIENCE) -> Any:
        """The first true answer of `condition`."""
        deadline = time.monotonic() + within
        while not (answer := condition()):
            assert time.monotonic() < deadline, f"never: {what}\n{self.logs()}"
            time.sleep(0.2)
        return answer

    def wait_for_state(self, number: str, states: Iterable[str]) -> dict[str, str]:
        """The job, once its state is one of `states`; a pending one has left its nodes."""
        wanted = set(states)

        def there() -> dict[str, str] | None:
            job = self.job(number)
            return job if job["JobState"] in wanted else None

        job: dict[str, str] = self.wait(there, f"job {number} in one of {sorted(wanted)}")
        return job

    def ended(self, number: str) -> dict[str, str]:
        return self.wait_for_state(
            number, ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
        )

    def _requeued(self, number: str) -> dict[str, str]:
        """A job that waits for its second start, or is past waiting: when a dead node is given up, the wait may be
        over already, and the start and its end come faster than anybody can look."""

        def there() -> dict[str, str] | None:
            job = self.job(number)
            again = job["Restarts"] != "0" and job["JobState"] != "COMPLETING"
            return job if again or job["JobState"] == "PENDING" else None

        job: dict[str, str] = self.wait(there, f"job {number} in the queue again")
        return job

    def release(self, number: str) -> None:
        """Start a job now that has been requeued, and would wait for 120 s.

        Before it is pending the wait would come back. And a node refuses for a second or two to start a job that it
        has just ended ("Job credential revoked"), which is what the wait is for.
        """
        if self._requeued(number)["JobState"] != "PENDING":
            return
        time.sleep(3)
        done = self.run("scontrol", "update", f"jobid={number}", "StartTime=now", check=False)
        # The wait may be over: it counts from the requeue, and leaving a dead node takes long.
        assert done.returncode == 0 or "no longer pending" in done.stderr, done.stderr

    def notice_after(self, seconds: int) -> None:
        """How long a node may be silent before Slurm takes it for lost."""
        file, new = self.folder / "slurm.conf", self.folder / "slurm.conf.new"
        new.write_text(re.sub(r"\bSlurmdTimeout=\d+", f"SlurmdTimeout={seconds}", file.read_text()))
        new.replace(file)  # whatever of Slurm is started in this moment reads one or the other
        self.run("scontrol", "reconfigure")

    def crash(self, node: str) -> None:
        """As when the power goes: the daemon of a node and everything it has started, at once, without a word."""
        daemon = self._daemons.pop(node)
        tasks = self._with(f"SLURMD_NODENAME={node}", self.environment["SLURM_CONF"])
        managers = {parent for parent in map(parent_of, tasks) if parent > 1}
        # Nobody is to hear of the death of another.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (daemon.pid, *managers, *tasks):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        daemon.wait()

    def _with(self, *words: str) -> list[int]:
        """Processes whose environment or command line mentions each of these."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                    if all(word.encode() in text for word in words):
                        found.append(int(entry.name))
        return found

    def left(self) -> list[int]:
        """Everything alive that belongs to this cluster: daemons, step managers, tasks."""
        return self._with(str(self.folder))

    def logs(self) -> str:
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.console")]
        return "".join(f"\n--- {path.name} ---\n{path.read_text(errors='replace')[-2500:]}" for path in files)

    def stop(self) -> None:
        """End everything, jobs first; in the end by force."""
        for daemon in self._daemons.values():
            daemon.terminate()
        deadline = time.monotonic() + 5
        while self.left() and time.monotonic() < deadline:
            for daemon in self._daemons.values():
                daemon.poll()
            for pid in self.left():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if time.monotonic() > deadline - 3 else signal.SIGTERM)
            time.sleep(0.1)
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait(10)
        left = self.left()
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not left, f"left behind by Slurm: {left}"
