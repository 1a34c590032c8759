"""The report files of a run folder."""

from __future__ import annotations

from pathlib import Path

from featherweight.core import Report
from featherweight.report import html, json


def write(report: Report, folder: Path, *, name: str = "report", title: str = "") -> tuple[Path, Path]:
    """Write NAME.json and NAME.html into `folder`, each whole or not at all. Raises OutputError."""
    paths = (folder / f"{name}.json", folder / f"{name}.html")
    json.write(report, paths[0])
    html.write(report, paths[1], title=title)
    return paths
