"""The `moe-dist` command: what must hold before anything is imported, then `launcher.cli.commands`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from launcher.connect.exit_codes import EXIT_FAILED
from launcher.connect.output import EXIT_PIPE, Output, complain


def main() -> None:
    """Entry point. Ctrl-C is one line and 130 from the first instant on; no error shows a stack trace.

    Without a reader, what prints ends quietly, as SIGPIPE would end it.
    """
    _have_streams()
    output = Output()
    # Importing takes a moment in which an exception out of nowhere would be a page of other people's code.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    try:
        from launcher.cli.commands import run

        code: int | str | None = run()
        sys.stdout.flush()
    except SystemExit as end:  # of typer and rich, that have found no reader
        code = EXIT_PIPE if output.has_no_reader() else end.code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output.has_no_reader():
            sys.exit(EXIT_PIPE)
        if os.environ.get("MOE_DIST_DEBUG") == "1":
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        complain(f"moe-dist: error: {text} (MOE_DIST_DEBUG=1 shows where)")
        code = EXIT_FAILED
    sys.exit(code)


def _have_streams() -> None:
    """Closed standard streams (`>&-`, some schedulers) become /dev/null: the next file or socket that is opened would
    get their number, and what is printed would go into it."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _leave(number: int, frame: FrameType | None) -> None:
    # Under torchrun every rank gets here; there it is torchrun that has the word.
    if "RANK" not in os.environ:
        os.write(2, b"\nmoe-dist: stopped by Ctrl-C\n" if os.isatty(2) else b"moe-dist: stopped by Ctrl-C\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
