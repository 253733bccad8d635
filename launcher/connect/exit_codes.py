"""How a rank, and then its launcher, ends: the exit codes."""

from __future__ import annotations

import signal

EXIT_CONFIG = 2
"""The configuration, the data or a checkpoint cannot be used as they are; nothing was changed."""
EXIT_STOPPED = 3
"""Training stopped itself: not finite, diverged, the last step not saved, or the run folder has gone."""
EXIT_FAILED = 1
"""Anything unexpected."""
EXIT_AGAIN = 75
"""Asked to stop by SIGTERM, SIGUSR1 or SIGHUP; the last step is saved, to go on from."""
EXIT_CTRL_C = 128 + signal.SIGINT
"""Ctrl-C; saved, if it was training."""
EXIT_DIFFERS = 4
"""`verify` has said which layouts differ from one process; the command makes it 1."""
EXIT_UNSEEN = 5
"""`verify` with a bug planted, and every layout has passed."""
