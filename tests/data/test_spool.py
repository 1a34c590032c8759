"""Spooling: the same batches from disk, atomic, bounded."""

from __future__ import annotations

import errno
import multiprocessing
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from featherweight.data import Batch, Dataset, InputSpec, open_data, split, spool
from featherweight.data.spool import write
from featherweight.errors import DataError, OutputError

X = [InputSpec("x", np.dtype(np.float32), ("n", 4))]


def _data(folder: Path, batch_size: int = 3, keyed: bool = False) -> Dataset:
    x = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    if keyed:
        np.savez(folder / "d.npz", **{f"{i}::x": x[: i + 1] for i in range(5)})
    else:
        np.savez(folder / "d.npz", x=x, labels=np.arange(10))
    return open_data(folder / "d.npz", X, batch_size=batch_size)


def _all(data: Dataset) -> list[tuple[int, str, bytes, bytes | None]]:
    return [
        (b.n, str(b.feeds["x"].shape), b.feeds["x"].tobytes(), None if b.labels is None else b.labels.tobytes())
        for b in data.batches()
    ]


@pytest.mark.parametrize("keyed", [False, True])
def test_spooled_batches_are_the_same(tmp_path: Path, keyed: bool) -> None:
    data = _data(tmp_path, keyed=keyed)
    out = spool(data, tmp_path / "s", inputs=X)
    assert _all(out) == _all(data)
    assert (out.n_samples, out.has_labels, out.source) == (data.n_samples, data.has_labels, data.source)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_all, (out,)) == _all(data)


def test_spooling_does_not_change_a_split(tmp_path: Path) -> None:
    data = _data(tmp_path, batch_size=2)
    out = spool(data, tmp_path / "s")
    assert [p.atoms() for p in (split(out).calibration, split(out).holdout)] == [
        p.atoms() for p in (split(data).calibration, split(data).holdout)
    ]
    assert _all(split(out).validation) == _all(split(data).validation)


def test_a_subset_can_be_spooled_and_labels_follow(tmp_path: Path) -> None:
    out = spool(_data(tmp_path, batch_size=1).subset([7, 3]), tmp_path / "s")
    assert out.labels().tolist() == [7, 3]
    assert out.subset([1]).labels().tolist() == [3]


@pytest.mark.parametrize("dtype", ["float16", "int64", "bool", "uint8", "complex64", "bfloat16", "<U3"])
def test_types_come_back(tmp_path: Path, dtype: str) -> None:
    array = np.arange(4).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)[:, None]
    out = write([Batch(0, {"x": array, "labels": array}, array[:, 0], 4)], tmp_path / "s", where="w")
    piece = next(iter(out.read([(2,)])))
    assert piece.feeds["x"].dtype == array.dtype
    assert np.array_equal(piece.feeds["x"], array[2:3])
    assert np.array_equal(piece.feeds["labels"], array[2:3])  # an input may be called labels
    assert np.array_equal(piece.labels, array[2:3, 0])


def test_scalars_and_mixed_shapes_keep_their_batches(tmp_path: Path) -> None:
    batches = [Batch(i, {"x": np.zeros((i + 1, 2)), "step": np.array(float(i))}, None, i + 1) for i in range(3)]
    out = write(batches, tmp_path / "s", where="w")
    assert not out.stackable
    pieces = list(out.read([(2,), (0,)]))
    assert [p.feeds["step"].item() for p in pieces] == [2.0, 0.0]
    assert [p.feeds["x"].shape for p in pieces] == [(3, 2), (1, 2)]


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    x = np.zeros((5, 4), np.float32)
    x[4, 1] = np.nan
    np.savez(tmp_path / "d.npz", x=x)
    with pytest.raises(DataError, match=r"batch 4, input 'x': nan at position \[0, 1\]"):
        spool(open_data(tmp_path / "d.npz", X), tmp_path / "s", inputs=X)
    assert [p.name for p in tmp_path.iterdir()] == ["d.npz"]


class _Full:
    """A file on a full disk."""

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def tell(self) -> int:
        return 0

    def close(self) -> None:
        pass


def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data(tmp_path)
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda p, mode="r", **k: _Full() if "w" in mode else real(p, mode, **k))
    with pytest.raises(OutputError, match=r"No space left on device.; free some space"):
        spool(data, tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["d.npz"]


def test_bounds_and_existing_folders(tmp_path: Path) -> None:
    data = _data(tmp_path)
    with pytest.raises(OutputError, match="is over 50 B after 1 batches"):
        spool(data, tmp_path / "s", max_bytes=50)
    (tmp_path / "s").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        spool(data, tmp_path / "s")
    with pytest.raises(OutputError, match="cannot be written"):
        spool(data, tmp_path / "d.npz" / "s")


def test_a_spool_that_is_gone_or_cut_is_a_data_error(tmp_path: Path) -> None:
    out = spool(_data(tmp_path), tmp_path / "s")
    file = tmp_path / "s" / "0.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="cut short"):
        list(out.batches())
    file.unlink()
    with pytest.raises(DataError, match="is gone"):
        list(out.batches())


def test_memory_is_flat_in_the_number_of_batches(tmp_path: Path) -> None:
    def batches(count: int) -> Iterator[Batch]:
        for i in range(count):
            yield Batch(i, {"x": np.full((1, 10_000), i, np.float32)}, None, 1)

    def peak(count: int) -> int:
        tracemalloc.start()
        out = write(batches(count), tmp_path / str(count), where="w")
        for _ in out.read([(i,) for i in range(count)]):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(20), peak(400)  # 0.8 MB and 16 MB of data
    assert many < few + 500_000
