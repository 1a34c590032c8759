"""Fixtures shared by all tests: where optional outside material lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _shared() -> Path | None:
    """Return the folder of optional test material, or None where there is none (as in a user's clone)."""
    named = os.environ.get("FEATHERWEIGHT_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def cases_dir() -> Path:
    """Folder of small hostile models with right answers."""
    shared = _shared()
    if shared is None or not (shared / "cases").is_dir():
        pytest.skip("no folder of shared cases here (set FEATHERWEIGHT_SHARED)")
    return shared / "cases"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real labelled data."""
    shared = _shared()
    if shared is None or not (shared / "data").is_dir():
        pytest.skip("no folder of labelled data here (set FEATHERWEIGHT_SHARED)")
    return shared / "data"
