"""`python -m launcher.pod ...`: torchrun as the first process of a pod, with torchrun's own options.

Two things differ from torchrun. It ends with the exit code of its ranks, where torchrun ends with 1 whatever they
say, so that the Job can tell "saved, start me again" from "useless to try again". And SIGTERM and SIGUSR1 go to the
ranks and leave them all the time they need to save; torchrun kills them after half a minute.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from launcher.worker import EXIT_AGAIN, EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)


def main(arguments: list[str]) -> int:
    _pass_on_signals()  # first of all: importing torch takes a while, and process 1 has no default actions
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(["--signals-to-handle=SIGINT", *arguments]))
    except ChildFailedError as error:
        return verdict(failure.exitcode for failure in error.failures.values())
    return 0


def verdict(codes: Iterable[int]) -> int:
    """One exit code for all ranks that failed: what they mean counts more than who was first."""
    found = list(codes)
    for code in (EXIT_CONFIG, EXIT_STOPPED, EXIT_AGAIN):
        if code in found:
            return code
    # Killed by a signal, as a shell says it: 137 is what the kernel does to a pod without memory.
    return next((128 - code for code in found if code < 0), EXIT_FAILED)


def ranks(torchrun: str = "self") -> list[int]:
    """Process ids of the ranks that torchrun has started (Linux)."""
    found = []
    for task in Path(f"/proc/{torchrun}/task").iterdir():
        with suppress(OSError):
            for pid in (task / "children").read_text().split():
                if b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(int(pid))
    return found


def _pass_on_signals() -> None:
    """A thread does it: the main one may wait in a rendezvous, where Python runs no handler for minutes."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: None)
    threading.Thread(target=_listen, args=(reader,), daemon=True).start()


def _listen(reader: int) -> None:
    while True:
        for number in os.read(reader, 64):
            if number not in PASSED_ON:
                continue
            told = ranks()
            name = signal.Signals(number).name
            print(f"moe-dist: {name}, passed on to the ranks of this pod: {len(told)}", file=sys.stderr, flush=True)
            if not told:
                os._exit(128 + number)  # nothing has begun, there is nothing to save
            for pid in told:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
