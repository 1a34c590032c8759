"""Files by hash: sound after a kill, within the quota, nothing under its name before it is whole."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from featherweight.edge.agent.store import Store, StoreFullError, TooLargeError, WrongHashError, digest_of
from featherweight.errors import OutputError


def opened(folder: Path, quota: int = 1000, most: int = 500) -> Store:
    return Store(folder, quota_bytes=quota, max_file_bytes=most, kept_free_bytes=0)


def name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(store: Store, data: bytes, *, length: bool = True) -> str:
    arriving = store.incoming(len(data) if length else None)
    for start in range(0, len(data), 64):
        arriving.reserve(min(start + 64, len(data)))
        arriving.write(data[start : start + 64])
    arriving.settle()
    return arriving.finish(name(data))


@pytest.mark.parametrize("length", [True, False])
def test_a_file_is_kept_under_its_hash(tmp_path: Path, length: bool) -> None:
    store = opened(tmp_path, quota=10 << 20)
    data = os.urandom(300)
    assert put(store, data, length=length) == name(data)
    assert store.path(name(data)).read_bytes() == data
    assert store.size(name(data)) == store.used_bytes == 300
    assert store.size("0" * 64) is None


def test_wrong_bytes_leave_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path)
    arriving = store.incoming(4)
    arriving.write(b"abcd")
    with pytest.raises(WrongHashError, match="4 bytes"):
        arriving.finish(name(b"other"))
    arriving.abort()
    assert (len(store), store.used_bytes) == (0, 0)
    assert not any(f.is_file() for f in tmp_path.rglob("*"))


def test_the_least_recently_used_go_first_and_pinned_ones_stay(tmp_path: Path) -> None:
    store = opened(tmp_path)
    a, b, c = (put(store, bytes([i]) * 300) for i in range(3))
    store.pin([a, a])
    store.size(b)
    d = put(store, b"d" * 300)
    assert [store.size(f) is not None for f in (a, b, c, d)] == [True, True, False, True]
    store.unpin([a])
    assert store.pinned(a)
    store.pin([b, d])
    with pytest.raises(StoreFullError, match="do not fit"):
        store.incoming(300)
    store.unpin([a])
    assert not store.pinned(a)
    assert store.missing([a, c, c]) == [c]


def test_a_file_over_the_limit_is_refused_at_once_or_on_its_way(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with pytest.raises(TooLargeError):
        store.incoming(501)
    arriving = store.incoming(None)
    arriving.reserve(400)
    arriving.write(b"x" * 400)
    with pytest.raises(TooLargeError):
        arriving.reserve(501)
    arriving.abort()
    assert store.used_bytes == 0
    assert not list((tmp_path / "arriving").iterdir())


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    first = opened(tmp_path)
    kept = [put(first, bytes([i]) * 200) for i in range(3)]
    for age, file in enumerate(kept):
        os.utime(first.path(file), (1000 + age, 1000 + age))
    (tmp_path / "arriving" / "half").write_bytes(b"x")
    (tmp_path / "files" / "not-a-hash").write_bytes(b"x")
    (tmp_path / "files" / "folder").mkdir()
    (tmp_path / "files" / ("e" * 64)).symlink_to("/etc/hostname")
    again = opened(tmp_path, quota=450)
    assert [again.size(f) for f in kept] == [None, 200, 200]
    assert again.used_bytes == 400
    assert sorted(f.name for f in tmp_path.rglob("*") if not f.is_dir()) == sorted(kept[1:])


def test_outputs_are_taken_over(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    made = tmp_path / "outputs.npz"
    made.write_bytes(b"o" * 100)
    sha256, size = digest_of(made)
    store.take(made, sha256, size)
    assert store.path(sha256).read_bytes() == b"o" * 100
    assert not made.exists()
    made.write_bytes(b"o" * 600)
    with pytest.raises(TooLargeError):
        store.take(made, *digest_of(made))


def test_a_disk_that_is_nearly_full_takes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, quota_bytes=1000, max_file_bytes=500, kept_free_bytes=1 << 60)
    with pytest.raises(StoreFullError, match="free"):
        store.incoming(1)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="file"):
        opened(tmp_path / "file" / "work")
