"""Text files written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from featherweight.errors import OutputError


def write_text(path: Path, text: str) -> None:
    """Write beside the target, sync, rename. Raises OutputError; then nothing is left behind."""
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as e:
        raise OutputError(f"{path} cannot be written ({e.strerror or e}); free space or name another folder") from e
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
