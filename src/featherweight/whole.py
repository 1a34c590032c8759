"""Files that are written whole or not at all, however long that takes: beside the target first, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from featherweight.errors import OutputError


@contextlib.contextmanager
def whole_file(path: Path, *, make_folder: bool = False) -> Iterator[IO[bytes]]:
    """A file to write to; it takes the place of `path` if all went well. Raises OutputError; leaves nothing behind."""
    temporary = ""
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise OutputError(f"the output must be a file, but {path} is a folder; give a name in it")
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes private files; a result is for others to read
        os.replace(temporary, path)
    except OSError as e:
        raise OutputError(f"{path} cannot be written ({e.strerror or e}); free space or name another folder") from e
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def write_text(text: str, path: Path, *, make_folder: bool = True) -> None:
    """Write a text file whole or not at all, its folder too unless told not to. Raises OutputError."""
    with whole_file(path, make_folder=make_folder) as file:
        file.write(text.encode())
