"""Shared by all tests: helpers beside this file can be imported, and no rank outlives its module."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from command_line import Said, Say
from hypothesis import settings
from patches import Replace, replaced

# The same examples every time: a gate that depends on luck proves nothing about the change before it.
# `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("same")

NO_SKIPS = "MOE_DIST_NO_LAUNCH_SKIPS"
"""Set: a test of a way to start (`launch`) that is skipped counts as failed."""
CANNOT_BE = ("is not possible here",)
"""Parts of reasons that no package helps: a kernel without network namespaces, no right to make them."""

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here may reach for the network: asked for what is not there, Hugging Face's libraries try for a minute. They
# read this when they are imported first, by whatever test that is.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
# What tests prove says nothing about the machine of whoever runs them: it stays out of their cache (`verify.json`).
CACHE = tempfile.TemporaryDirectory(prefix="moe-dist-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _no_ranks_left() -> Iterator[None]:
    yield
    import ranks

    ranks.stop_all()


@pytest.fixture(autouse=True)
def _fresh_logger() -> Iterator[None]:
    """A trainer keeps the logger `moe_dist` to itself, also when it has ended."""
    yield
    if log := sys.modules.get("moe_dist.monitor.train_log"):
        log.close_logging()


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Hears the logger `moe_dist` before, while and after a trainer has it, whatever ran before this test."""
    logger = logging.getLogger("moe_dist")
    logger.addHandler(caplog.handler)
    logger.propagate = False
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.propagate = True


@pytest.fixture
def replace() -> Iterator[Replace]:
    """`replace(owner, name, wrong)`: `patches.replaced` until the test ends. What must not be called is replaced by
    `pytest.fail` instead, with `monkeypatch`.
    """
    with ExitStack() as stack:
        yield lambda owner, name, wrong: stack.enter_context(replaced(owner, name, wrong))


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """`say("export", run, "-o", folder)`: a command of moe-dist in this process."""
    from launcher.cli import commands

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["moe-dist", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            code = commands.run()
        except SystemExit as end:  # typer.Exit of a command that is not standalone returns its code
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, to be filled by a test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, then those that start ranks, then slow ones."""
    items.sort(
        key=lambda item: (
            (item.get_closest_marker("slow") is not None) * 2 + (item.get_closest_marker("dist") is not None)
        )
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("launch"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if os.environ.get(NO_SKIPS) and not any(part in reason for part in CANNOT_BE):
            report.outcome = "failed"
            report.longrepr = f"{NO_SKIPS} is set, and this test was not run: {reason}"
    return report
