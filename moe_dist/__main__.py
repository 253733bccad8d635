"""`python -m moe_dist ...` is `moe-dist ...`; with `agent`, `rank`, `forkserver` or `trial` in front, what
launchers start.

The command line lives in the package `launcher`. Another one of that name may be in the way, such as a folder where the
command is given; from here ours is found.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

_HERE = Path(__file__).parents[1]


def find_launcher() -> None:
    """Import `launcher` from beside this package, whatever else has that name."""
    spec = find_spec("launcher")
    if spec is None or spec.origin is None or Path(spec.origin).parents[1] != _HERE:
        sys.path.insert(0, str(_HERE))


def main() -> None:
    find_launcher()
    match sys.argv[1:2]:
        case ["agent"]:
            from launcher.supervise import agent

            sys.exit(agent.main(sys.argv[2:]))
        case ["rank"]:
            from launcher.rank.worker import run_rank

            run_rank()
        case ["forkserver"]:
            from launcher.rank.forkserver import serve

            serve()
        case ["trial"]:
            from launcher.sweep.trial import run_trial

            sys.exit(run_trial())
        case _:
            from launcher.cli.main import main as command

            command()


if __name__ == "__main__":
    main()
