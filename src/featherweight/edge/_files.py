"""Text files written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from featherweight.whole import whole_file


def write_text(path: Path, text: str) -> None:
    """Write beside the target, sync, rename. Raises OutputError; then nothing is left behind."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))
