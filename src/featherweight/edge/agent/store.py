"""Files by the SHA-256 of their bytes, in one folder, within a quota; the least recently used go first.

A file has its name only once its bytes are on the disk and hash to it, so a folder left by a killed process is
sound: what is incomplete is removed at the next start. Bookkeeping happens on one thread (the event loop's); only
the methods of `Incoming` that touch the disk may run on another.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from featherweight.errors import FeatherweightError, OutputError
from featherweight.quantities import format_bytes

SHA256 = re.compile(r"[0-9a-f]{64}")
KEPT_FREE_BYTES = 256 << 20
"""A device's disk is not filled to the last byte, whatever the quota."""
_STEP = 4 << 20  # room is taken in steps where a body does not say its length
_CHUNK = 1 << 20


class StoreFullError(FeatherweightError):
    """No room within the quota or on the disk, even after every unused file was removed."""


class WrongHashError(FeatherweightError):
    """The bytes that came are not those that were announced."""


class TooLargeError(FeatherweightError):
    """A file is over the limit of one file."""


@dataclass
class Entry:
    """One kept file."""

    size_bytes: int


class Store:
    """The files of one work folder. See the module."""

    def __init__(self, folder: Path, *, quota_bytes: int, max_file_bytes: int, kept_free_bytes: int) -> None:
        """Open or create `folder`, removing what a killed process left. Raises OutputError if that is impossible."""
        self.quota_bytes = quota_bytes
        self.max_file_bytes = max_file_bytes
        self._kept_free_bytes = kept_free_bytes
        self._files = folder / "files"
        self._arriving = folder / "arriving"
        self._pins: Counter[str] = Counter()
        self._reserved = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        try:
            shutil.rmtree(self._arriving, ignore_errors=True)
            for made in (self._files, self._arriving):
                made.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._recover()
        except OSError as e:
            raise OutputError(f"the work folder {folder} cannot be used: {e.strerror or e}; name another one") from e

    def _recover(self) -> None:
        found = []
        for file in self._files.iterdir():
            if SHA256.fullmatch(file.name) and file.is_file() and not file.is_symlink():
                status = file.stat()
                found.append((status.st_mtime, file.name, status.st_size))
            elif file.is_dir() and not file.is_symlink():
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)
        for _, name, size in sorted(found):
            self._entries[name] = Entry(size)
        self._evict(0)

    @property
    def used_bytes(self) -> int:
        """Bytes of all kept files and of those arriving."""
        return sum(e.size_bytes for e in self._entries.values()) + self._reserved

    def __len__(self) -> int:
        return len(self._entries)

    def size(self, sha256: str) -> int | None:
        """Bytes of a kept file, which counts as used now; None if it is not here."""
        entry = self._entries.get(sha256)
        if entry is None:
            return None
        self._entries.move_to_end(sha256)
        with contextlib.suppress(OSError):  # the order of use outlives a restart
            os.utime(self._files / sha256)
        return entry.size_bytes

    def path(self, sha256: str) -> Path:
        """Where a kept file lies."""
        return self._files / sha256

    def missing(self, wanted: Iterable[str]) -> list[str]:
        """Those of `wanted` that are not here, each once."""
        return [name for name in dict.fromkeys(wanted) if self.size(name) is None]

    def pin(self, names: Iterable[str]) -> None:
        """Keep these until they are unpinned as often."""
        self._pins.update(names)

    def unpin(self, names: Iterable[str]) -> None:
        """Let go of what `pin` kept."""
        self._pins.subtract(names)
        self._pins = +self._pins

    def pinned(self, sha256: str) -> bool:
        """True while a job needs this file."""
        return self._pins[sha256] > 0

    def remove(self, sha256: str) -> None:
        """Delete a kept file."""
        self._entries.pop(sha256, None)
        self.path(sha256).unlink(missing_ok=True)

    def incoming(self, length_bytes: int | None) -> Incoming:
        """A new file that begins to arrive. Raises TooLargeError, StoreFullError before a byte of it is taken."""
        arriving = Incoming(self, self._arriving)
        try:
            arriving.reserve(length_bytes or 0)
        except FeatherweightError:
            arriving.abort()
            raise
        return arriving

    def reserve(self, more_bytes: int) -> None:
        """Make room and count it as taken. Raises StoreFullError."""
        self._evict(more_bytes)
        self._reserved += more_bytes

    def release(self, size_bytes: int) -> None:
        """Give back what `reserve` took."""
        self._reserved -= size_bytes

    def adopt(self, sha256: str, size_bytes: int) -> None:
        """Count a file that was just given its name."""
        self._entries[sha256] = Entry(size_bytes)
        self._entries.move_to_end(sha256)

    def take(self, file: Path, sha256: str, size_bytes: int) -> None:
        """Move a file of known hash in. Raises StoreFullError, TooLargeError."""
        if size_bytes > self.max_file_bytes:
            raise TooLargeError(f"a file must have at most {self.max_file_bytes} bytes, but outputs have {size_bytes}")
        self._evict(size_bytes)
        os.chmod(file, 0o400)
        os.replace(file, self.path(sha256))
        self.adopt(sha256, size_bytes)

    def _evict(self, more_bytes: int) -> None:
        """Remove what was used longest ago until `more_bytes` fit."""
        idle = [name for name in self._entries if not self.pinned(name)]
        for name in idle:
            if self._fits(more_bytes):
                return
            self.remove(name)
        if not self._fits(more_bytes) and more_bytes > 0:
            raise StoreFullError(
                f"{format_bytes(more_bytes)} more do not fit: the agent keeps at most {format_bytes(self.quota_bytes)} "
                f"and leaves {format_bytes(self._kept_free_bytes)} of its disk free; jobs that wait or run need "
                f"{format_bytes(self.used_bytes)} now"
            )

    def _fits(self, more_bytes: int) -> bool:
        free = shutil.disk_usage(self._files).free
        return self.used_bytes + more_bytes <= self.quota_bytes and free - more_bytes >= self._kept_free_bytes


class Incoming:
    """A file on its way in: `write` its bytes, then `finish` or `abort`. Nothing is under its name before `finish`."""

    def __init__(self, store: Store, folder: Path) -> None:
        """Open a nameless file in `folder`."""
        self._store = store
        handle, path = tempfile.mkstemp(dir=folder)
        self._path = Path(path)
        self._file: IO[bytes] = os.fdopen(handle, "wb", buffering=0)
        self._hash = hashlib.sha256()
        self._taken = 0
        self.size_bytes = 0

    def reserve(self, total_bytes: int) -> None:
        """Room for a file of so many bytes in all. Raises TooLargeError, StoreFullError."""
        most = self._store.max_file_bytes
        if total_bytes > most:
            raise TooLargeError(f"a file must have at most {most} bytes ({format_bytes(most)})")
        if total_bytes > self._taken:
            wanted = min(most, max(total_bytes, self._taken + _STEP)) if self._taken or self.size_bytes else total_bytes
            self._store.reserve(wanted - self._taken)
            self._taken = wanted

    def write(self, data: bytes) -> None:
        """Append, for which `reserve` was called before. May run on any thread."""
        self._hash.update(data)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self.size_bytes += len(data)

    def settle(self) -> None:
        """Bring the bytes to the disk. May run on any thread."""
        os.fsync(self._file.fileno())

    def finish(self, expected_sha256: str | None = None) -> str:
        """Give the file its name, which is returned. Raises WrongHashError and removes it if it is another's."""
        found = self._hash.hexdigest()
        if expected_sha256 is not None and found != expected_sha256:
            self.abort()
            raise WrongHashError(
                f"the {self.size_bytes} bytes that came have the SHA-256 {found}, not the one in the address; "
                "send the file again"
            )
        self._file.close()
        os.chmod(self._path, 0o400)
        os.replace(self._path, self._store.path(found))
        self._store.release(self._taken)
        self._store.adopt(found, self.size_bytes)
        self._taken = 0
        return found

    def abort(self) -> None:
        """Remove what came so far; does nothing after `finish`."""
        self._file.close()
        self._path.unlink(missing_ok=True)
        self._store.release(self._taken)
        self._taken = 0


def digest_of(file: Path) -> tuple[str, int]:
    """SHA-256 and bytes of a finished file, which is on the disk afterwards. May run on any thread."""
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
        os.fsync(f.fileno())
    return digest.hexdigest(), file.stat().st_size
