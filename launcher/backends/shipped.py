"""Where the files are that come with the package."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "files"
"""Run files, manifests, batch scripts, alert rules and dashboards: links in a checkout, copies in a wheel."""
