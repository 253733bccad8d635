"""The interface's own description: a page that needs no network, and thousands of requests drawn from it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest


def test_the_page_takes_everything_from_here(server: Any) -> None:
    """No address in it leads elsewhere, and what it wants is there. Planted: FastAPI's own page names a CDN."""
    page = server.get("/docs")
    wanted = re.findall(r"""(?:src|href)=["']([^"']+)["']|url: '([^']+)'""", page)
    places = {urljoin(f"{server.url}/docs", one or other) for one, other in wanted}
    assert {urlsplit(place).path.rpartition("/")[2] for place in places} >= {"swagger-ui-bundle.js", "swagger-ui.css"}
    for place in places:
        assert place.startswith(server.url), place
        assert httpx.get(place).status_code == 200, place
    assert "://" not in page
    said = httpx.get(f"{server.url}/docs/assets/..%2f..%2fcore.py")
    assert said.status_code == 404
    assert said.json()["error"]["code"] == "not_found"


def test_a_method_that_is_not_there_names_those_that_are(server: Any) -> None:
    reply = httpx.put(f"{server.url}/v1/models", headers={"authorization": f"Bearer {server.keys['alice']}"})
    assert (reply.status_code, reply.headers["allow"]) == (405, "GET")


def test_the_description_says_where_a_key_is_needed(server: Any) -> None:
    paths = json.loads(server.get("/openapi.json"))["paths"]
    open_paths = {path for path, methods in paths.items() if not any("security" in one for one in methods.values())}
    assert open_paths == {"/healthz", "/readyz"}


CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("negative_data_rejection", "ignored_auth", "missing_required_header"),
)
"""Of schemathesis. Not that what fits the description is accepted: this model has ids and lengths of its own."""


@pytest.mark.slow
def test_requests_drawn_from_the_description(server: Any, tmp_path: Path) -> None:
    """None is answered with 5xx or otherwise than described, none that is wrong is taken. /train is left out: what is
    right there trains.
    """
    pytest.importorskip("schemathesis")
    key = server.keys["boss"]
    # What is too large is refused before it is read.
    (tmp_path / "schemathesis.toml").write_text(
        "[checks.negative_data_rejection]\nexpected-statuses = [400, 404, 413, 422, 429]\n"
    )
    options = ("--phases", "coverage,fuzzing", "--max-examples", 5, "--generation-deterministic", "--no-color")
    command = (sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", *options)
    command += ("-H", f"Authorization: Bearer {key}", "--checks", ",".join(CHECKS), "--exclude-path", "/train")
    done = subprocess.run(
        list(map(str, (*command, "--request-timeout", 60, "--continue-on-failure"))),
        cwd=tmp_path,
        env={**os.environ, "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, re.sub(r"(?m)^(.{300}).+$", r"\1 ...", done.stdout)[-6000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) generated", done.stdout)
    assert found is not None
    assert int(found[1]) > 300
    assert "Traceback" not in server.log.read_text()
    assert "has failed" not in server.log.read_text()
    server.wait_for("live_requests", 0)
