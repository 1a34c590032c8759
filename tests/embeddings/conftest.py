"""Where small files of vectors are put."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from featherweight.cli import group


@pytest.fixture
def put(tmp_path: Path):
    """Write bytes to a file in a fresh folder."""

    def write(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def run() -> Callable[..., Result]:
    """The command line, in this process."""

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(group, list(arguments), prog_name="featherweight")

    return invoke
