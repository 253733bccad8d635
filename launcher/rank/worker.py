"""What each rank runs, however it was started."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import mmap
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import moe_dist
from launcher.connect.environment import Environment, detect, let_the_first_speak, this_job
from launcher.connect.exit_codes import (
    EXIT_AGAIN,
    EXIT_CONFIG,
    EXIT_CTRL_C,
    EXIT_DIFFERS,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_UNSEEN,
)
from launcher.connect.output import EXIT_PIPE, Output
from launcher.connect.rank_job import (
    CONFIG,
    LAUNCHER,
    MAX_REPORT,
    PROOF,
    REPORTS,
    STATUS,
    WATCHED,
    Inference,
    Profiling,
    Proof,
    channel,
    from_text,
    tell_launcher,
)
from launcher.supervise.exit_status import lost_a_peer
from launcher.supervise.oom_advice import advice
from moe_dist.config import Config, ConfigError
from moe_dist.monitor.train_log import write_to_log
from moe_dist.parallel.status import SLOT, Status

if TYPE_CHECKING:
    from moe_dist.parallel.mesh import Mesh
    from moe_dist.parallel.proven import Proof as Proven
    from moe_dist.train.result import TrainingResult

_PR_SET_PDEATHSIG = 1


def train(config: Config, environment: Environment) -> int:
    """Train on this rank; returns the exit code."""
    from launcher.connect.process_groups import connected  # torch, only once there is work to do
    from moe_dist.train.rank_sync import StopRequests
    from moe_dist.train.trainer import MoETrainer

    # When a rank dies torchrun ends the others, which may have something to say about it.
    requests = StopRequests(heard=lambda: tell_launcher(environment.rank, None), last_words=True)
    status = _status(environment)
    with connected(config, environment) as mesh, _watched(config, environment, mesh, status):
        parts: dict[str, Any] = {"stop_requests": requests, "status": status, "job": this_job()}
        trainer = MoETrainer(config, mesh=mesh, **parts, opened=_stacks_on_request)
        with suppress(RuntimeError):  # until there is a log; and there may be no standard error either
            faulthandler.register(signal.SIGUSR2, all_threads=True)
        result = trainer.train()
        if environment.rank == 0:
            _say_how_it_ended(result, config)
    # No other rank waits for it any more.
    if result.failed or (environment.rank == 0 and not _merged(config, result, status)):
        return EXIT_STOPPED
    if result.signal is None:
        return 0
    return EXIT_CTRL_C if result.signal == signal.SIGINT else EXIT_AGAIN


def _merged(config: Config, result: TrainingResult, status: Status) -> bool:
    """Do what `lora.merge_and_save` asks for; False where that could not be done, which has been said."""
    from moe_dist.train.merging import MergeError, merge

    try:
        merge(config, result, status, lambda text: print(text, flush=True))
    except MergeError as error:
        print(f"moe-dist: error: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _say_how_it_ended(result: TrainingResult, config: Config) -> None:
    """What a person has to know of an end that came before the last step."""
    if result.failed:
        print(f"moe-dist: training stopped itself: {result.reason}", file=sys.stderr, flush=True)
    elif result.signal is not None:
        how = "" if config.checkpoint.resume == "auto" else "with checkpoint.resume=auto "
        again = f"is saved; {how}the same command goes on from it"
        kept = f"{result.checkpoint} {again}" if result.checkpoint else "not saved"
        text = f"{result.reason} after step {result.steps}: {kept}"
        if not tell_launcher(0, text):
            print(f"moe-dist: {text}", file=sys.stderr, flush=True)


class PeerFailedError(RuntimeError):
    """This rank cannot go on because another one has gone or failed: the text says who, and somebody has said it."""


@contextmanager
def _watched(config: Config, environment: Environment, mesh: Mesh, status: Status) -> Iterator[None]:
    """A watchdog for the block, or where a launcher sees all ranks from outside, signs of life for it."""
    if WATCHED in os.environ:
        from launcher.supervise.rank_channel import telling

        with telling(status, mesh):
            yield
        return
    if not environment.is_distributed:
        yield
        return
    from launcher.supervise.watchdog import Watchdog

    watchdog = Watchdog(config, environment, mesh, status)
    goodbye = "failed"
    try:
        yield
        goodbye = "done"
    except Exception as error:
        if lost_a_peer(str(error)) and (text := watchdog.loss()):
            raise PeerFailedError(text) from error
        raise
    finally:
        watchdog.close(goodbye)


def verify(config: Config, environment: Environment, proof: Proof) -> int:
    """Prove the arithmetic of every layout; returns the exit code."""
    from launcher.connect.process_groups import connected
    from moe_dist.verify.run import Verifier
    from moe_dist.verify.verdicts import Report

    report = Report(proof.command, as_json=proof.as_json, file=Path(proof.file) if proof.file else None)
    with connected(config, environment) as mesh:
        passed = Verifier(mesh).verify(
            config, proof.layouts, proof.plant, seed=proof.seed, minutes=proof.minutes, report=report
        )
        if mesh.rank == 0 and proof.plant is None and report.proof is not None:
            _remember(report.proof)
    return EXIT_DIFFERS if not passed else EXIT_UNSEEN if proof.plant else 0


def _remember(proof: Proven) -> None:
    """Write down what was proven, for `train` to show. Where that cannot be, nothing is lost but the line."""
    from moe_dist.parallel import proven

    with suppress(OSError):
        proven.write(proof)


def profile(config: Config, environment: Environment, wanted: Profiling) -> int:
    """Profile a few steps; returns the exit code."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library tells of every start and stop
    from launcher.connect.process_groups import connected
    from moe_dist.monitor.report.profile_page import terminal_lines
    from moe_dist.train.profiling import run_profile

    folder = config.train.output_dir if wanted.folder is None else Path(wanted.folder)
    with connected(config, environment) as mesh:
        profiled = run_profile(config, mesh, wanted.steps, wanted.compute, wanted.memory, folder)
    if profiled is not None:
        print("\n".join([*terminal_lines(profiled[0]), "", str(profiled[1])]), flush=True)
    return 0


def main(config: Config, environment: Environment, proof: Proof | None = None) -> int:
    """`train`, or what else is asked for, with every error as one line: exit codes as above."""
    # A single process saves as one on purpose.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)
    threading.excepthook = _thread_failed
    output = Output()
    try:
        if isinstance(proof, Profiling):
            return profile(config, environment, proof)
        if isinstance(proof, Inference):
            from launcher.rank.inference import infer

            return infer(config, environment, proof)
        return train(config, environment) if proof is None else verify(config, environment, proof)
    except (BrokenPipeError, SystemExit) as error:  # rich ends so, too
        if proof is not None and output.has_no_reader():
            return EXIT_PIPE
        if isinstance(error, SystemExit):
            raise
        return _report(error, environment, EXIT_FAILED)
    except ConfigError as error:
        return _report(error, environment, EXIT_CONFIG)
    except ValueError as error:
        return _report(error, environment, EXIT_CONFIG if _is_ours(error) else EXIT_FAILED)
    except Exception as error:
        return _report(error, environment, EXIT_FAILED)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """A library's thread has ended with an error, TensorBoard's on a full disk: for the log, not for a terminal."""
    details = "".join(traceback.format_exception(failure.exc_type, failure.exc_value, failure.exc_traceback))
    write_to_log(details, open_it=False)
    if os.environ.get("MOE_DIST_DEBUG") == "1":
        print(details, file=sys.stderr, flush=True)


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error: then it is written for people."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    roots = [Path(__file__).parents[1], Path(moe_dist.__file__).parent]
    return any(Path(last.filename).is_relative_to(root) for root in roots)


def _report(error: Exception, environment: Environment, code: int) -> int:
    """One line for people; the traceback goes to the rank's log file."""
    details = "".join(traceback.format_exception(error))
    text = " ".join(str(error).split())
    if code == EXIT_FAILED:
        where = f"rank {environment.rank}: " if environment.is_distributed else ""
        log = write_to_log(details, open_it=True)
        if not isinstance(error, PeerFailedError):
            text = f"{where}{type(error).__name__}: {text}"[: MAX_REPORT // 2] + advice(error)
            text += f"; log: {log}" if log else "; MOE_DIST_DEBUG=1 shows where"
        if os.environ.get("MOE_DIST_DEBUG") == "1":
            print(details, file=sys.stderr, flush=True)
    else:
        write_to_log(f"moe-dist: error: {text}", open_it=False)  # a start that has not begun leaves nothing
    if tell_launcher(environment.rank, text):  # it says the first one
        return code
    if isinstance(error, PeerFailedError):  # it has been said
        return code
    if code == EXIT_CONFIG:
        let_the_first_speak()
    elif lost_a_peer(text):
        time.sleep(2)  # a peer has failed and says why; torchrun ends this rank meanwhile
    print(f"moe-dist: error: {text}", file=sys.stderr, flush=True)
    return code


def _status(environment: Environment) -> Status:
    """Where whoever started this rank sees where it is; without a board nobody looks."""
    board = channel(STATUS)
    if board is None:
        return Status()
    return Status(mmap.mmap(board, environment.local_world_size * SLOT), environment.local_rank)


def _stacks_on_request(log: Path) -> None:
    """SIGUSR2 writes the Python stack of every thread into the rank's log, whatever it is doing."""
    with suppress(OSError):  # the log has said that it cannot be written
        faulthandler.register(signal.SIGUSR2, file=log.open("a"), all_threads=True)


def leave(code: int) -> NoReturn:
    """End this process now: threads of collectives whose peers are gone must not hold it up."""
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """No orphans: the kernel ends this process when its parent is gone (Linux), by this signal."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it went before the kernel knew
        os._exit(EXIT_FAILED)


def run_under_torchrun(config: Config, environment: Environment, proof: Proof | None = None) -> NoReturn:
    """A rank that torchrun, or something in its manner, has started."""
    # An agent says who it is: it may have gone while this process was being started.
    die_with_parent(int(os.environ.pop(LAUNCHER, "0")) or os.getppid())
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _go if sys.stdout.isatty() else signal.SIG_DFL)
    leave(main(config, environment, proof))


def _go(number: int, frame: FrameType | None) -> None:
    os.write(1, b"\x1b[?25h\n")
    os._exit(128 + number)


def run_rank() -> NoReturn:
    """Entry of a rank started by the local launcher."""
    die_with_parent(int(os.environ.pop(LAUNCHER)))
    # SIGINT stays blocked: Ctrl-C is for the launcher, and a run that is stopped sees that it waits here.
    os.set_inheritable(int(os.environ[REPORTS]), False)
    proof = from_text(os.environ.pop(PROOF, "null"))
    config = Config.model_validate_json(os.environ.pop(CONFIG))
    leave(main(config, detect(), proof))
