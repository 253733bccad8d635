"""Ranks on this machine: torchrun's elastic agent, in process."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from launcher.worker import EXIT_FAILED
from moe_dist.config import Config
from moe_dist.config_loading import dump_config

EXIT_INTERRUPTED = 130


def prepare_environment(config: Config) -> None:
    """Defaults for ranks that share one machine; what a person has set stays."""
    ranks = config.launch.nproc_per_node
    threads = config.launch.num_threads or max(1, (os.cpu_count() or 1) // ranks)
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        # Freed blocks stay with the process: repeated page faults cost grouped matmuls half their speed.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        # A restart that reuses the rendezvous' store fails about every third time.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if sys.platform.startswith("linux"):
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def launch(config: Config) -> int:
    """Start `launch.nproc_per_node` ranks, wait for all of them, return the exit code.

    When one rank fails the others are ended, and one line says which, how and where its log is.
    """
    prepare_environment(config)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("api", "errors"):  # their loggers are configured when imported
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(dump_config(config))
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=config.launch.nproc_per_node,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=f"127.0.0.1:{config.launch.master_port}",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
        )
        try:
            elastic_launch(settings, sys.executable)("-u", "-m", "launcher.worker", str(file))
        except SignalException as stop:
            return _interrupted(stop.sigval)
        except KeyboardInterrupt:
            return _interrupted(signal.SIGINT)
        except ChildFailedError as error:
            return _failed(error, config)
    return 0


def _interrupted(sigval: int) -> int:
    _show_cursor()
    name = "Ctrl-C" if sigval == signal.SIGINT else signal.Signals(sigval).name
    print(f"moe-dist: stopped by {name}; all ranks have ended", file=sys.stderr, flush=True)
    return 128 + int(sigval)


def _failed(error: Any, config: Config) -> int:
    """Say what went wrong first. A rank killed from outside is the cause, whatever its peers said before."""
    _show_cursor()
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    killed = [(rank, f) for rank, f in failures if f.exitcode < 0 and -f.exitcode != signal.SIGTERM]
    rank, failure = (killed or failures)[0]
    log = config.train.output_dir / ("train.log" if rank == 0 else f"logs/rank-{rank}.log")
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        text = f"rank {rank} (pid {failure.pid}) was ended by {name}; the other ranks were stopped"
        text += " (the machine may be out of memory)" if name == "SIGKILL" else ""
        print(f"moe-dist: error: {text}; its log: {log}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    message = failure.message if failure.error_file_data else f"rank {rank} ended with exit code {failure.exitcode}"
    if failure.exitcode == EXIT_FAILED:
        message = f"{message} (log: {log})"
    if failure.error_file_data or failure.exitcode == EXIT_FAILED:
        print(f"moe-dist: error: {message}", file=sys.stderr, flush=True)
    return failure.exitcode


def _show_cursor() -> None:
    if sys.stdout.isatty():
        print("\x1b[?25h", end="", flush=True)
