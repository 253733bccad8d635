"""The text log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from moe_dist.monitor.train_log import close_logging, open_log, setup_logging


def test_rank_zero_appends_to_train_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("first start", "second start"):  # each held in memory until it has begun
        logger = setup_logging(tmp_path / "run", 0)
        logger.info(words)
        open_log()
    lines = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert [line.split(" INFO ")[1] for line in lines] == ["first start", "second start"]
    assert capsys.readouterr().err == ""


def test_other_ranks_write_to_their_own_file_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path, 3)
    open_log()
    logging.getLogger("moe_dist.data.corpus").warning("skipped one file")
    assert "WARNING skipped one file" in (tmp_path / "logs" / "rank-3.log").read_text()
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "train.log").exists()


@pytest.mark.parametrize("debug", [False, True])
def test_warnings_of_rank_zero_are_one_line_on_stderr(
    debug: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_DIST_DEBUG", "1" if debug else "")
    logger = setup_logging(tmp_path, 0)
    open_log()
    try:
        raise OSError("disk\nfull")
    except OSError as error:
        logger.warning("sink failed: %s", error, exc_info=True)
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "moe-dist: warning: sink failed: disk full"
    assert bool(rest) == debug
    assert "Traceback" in (tmp_path / "train.log").read_text()


def test_unwritable_log_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("a file in the way")
    logger = setup_logging(tmp_path / "run", 0)
    open_log()
    logger.info("goes nowhere")
    assert capsys.readouterr().err.startswith("moe-dist: warning: no log file:")


def test_close_leaves_the_logger_as_it_was(tmp_path: Path) -> None:
    before = list(logging.getLogger("moe_dist").handlers)
    logger = setup_logging(tmp_path, 0)
    assert not logger.propagate
    close_logging()
    assert (logger.handlers, logger.level, logger.propagate) == (before, logging.NOTSET, True)
