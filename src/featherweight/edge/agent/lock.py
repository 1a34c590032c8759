"""One agent a work folder. The lock belongs to the process, so a killed agent leaves none behind."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from featherweight.errors import OutputError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if absent, readable by its owner alone. Raises OutputError if another agent has it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = (folder / "lock").open("w")
    except OSError as e:
        raise OutputError(f"the work folder {folder} cannot be used: {e.strerror or e}; name one with --work") from e
    with held:
        if not _try_lock(held):
            raise OutputError(f"another agent works in {folder}; name another folder with --work")
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
