"""npz sources: both forms, names, casts, laziness and hostile archives."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from featherweight.data import Dataset, InputSpec, check, open_data, spool
from featherweight.errors import DataError

X = InputSpec("x", np.dtype(np.float32), ("n", 4))


def _save(path: Path, compressed: bool = False, **arrays: np.ndarray) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_stacked_rows_come_back_exactly(tmp_path: Path, compressed: bool, order: Literal["C", "F"]) -> None:
    x = np.asarray(np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32), order=order)
    y = np.arange(10)
    data = open_data(_save(tmp_path / "d.npz", compressed, x=x, labels=y), [X], batch_size=3)
    check(data, [X], n_classes=10)
    batches = list(data.batches())
    assert [b.n for b in batches] == [3, 3, 3, 1]
    assert np.array_equal(np.concatenate([b.feeds["x"] for b in batches]), x)
    assert np.array_equal(np.concatenate([b.labels for b in batches]), y)
    assert np.array_equal(data.labels(), y)
    assert (data.n_samples, data.n_batches, data.has_labels, data.input_names) == (10, 4, True, ("x",))
    assert [b.feeds["x"].tobytes() for b in data.batches()] == [b.feeds["x"].tobytes() for b in batches]


@pytest.mark.parametrize("compressed", [False, True])
def test_subset_reads_any_order(tmp_path: Path, compressed: bool) -> None:
    x = np.arange(40, dtype=np.float32).reshape(10, 4)
    data = open_data(_save(tmp_path / "d.npz", compressed, x=x, y=np.arange(10)), [X]).subset([7, 2, 2, 9])
    assert [float(b.feeds["x"][0, 0]) for b in data.batches()] == [28, 8, 8, 36]
    assert data.labels().tolist() == [7, 2, 2, 9]


def test_an_array_of_one_rank_more_is_one_feed_a_row(tmp_path: Path) -> None:
    ids = np.arange(15).reshape(3, 5)
    data = open_data(_save(tmp_path / "d.npz", ids=ids), [InputSpec("ids", np.dtype(np.int64), (5,))])
    assert [b.feeds["ids"].tolist() for b in data.batches()] == ids.tolist()


def test_fixed_first_axis_cuts_and_drops_the_rest_with_a_note(tmp_path: Path) -> None:
    spec = InputSpec("x", np.dtype(np.float32), (4, 2))
    path = _save(tmp_path / "d.npz", x=np.zeros((10, 2), np.float32))
    data = open_data(path, [spec], batch_size=1)
    assert [b.feeds["x"].shape for b in data.batches()] == [(4, 2), (4, 2)]
    assert "last 2 of 10 rows are not used" in data.notes[0].text


def test_keyed_batches_of_different_shapes_in_numeric_order(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {f"{i}::x": np.full((i % 3 + 1, 4), i, np.float32) for i in range(11)}
    arrays |= {f"{i}::labels": np.full(i % 3 + 1, i) for i in range(11)}
    data = open_data(_save(tmp_path / "d.npz", **arrays), [X])
    assert [b.feeds["x"][0, 0] for b in data.batches()] == list(range(11))
    assert [b.n for b in data.batches()] == [i % 3 + 1 for i in range(11)]
    assert data.labels().tolist() == [i for i in range(11) for _ in range(i % 3 + 1)]


def test_a_labels_name_that_is_an_input_is_an_input(tmp_path: Path) -> None:
    spec = [X, InputSpec("y", np.dtype(np.float32), ("n",))]
    path = _save(tmp_path / "d.npz", x=np.zeros((2, 4), np.float32), y=np.ones(2, np.float32))
    data = open_data(path, spec)
    assert not data.has_labels
    assert set(next(data.batches()).feeds) == {"x", "y"}


def test_the_only_array_fills_the_only_input_and_says_so(tmp_path: Path) -> None:
    data = open_data(_save(tmp_path / "d.npz", arr_0=np.zeros((2, 4), np.float32)), [X])
    assert next(data.batches()).feeds["x"].shape == (1, 4)
    assert "'arr_0'" in data.notes[0].text
    assert "'x'" in data.notes[0].text


def test_safe_casts_are_made_and_noted(tmp_path: Path) -> None:
    spec = [X, InputSpec("ids", np.dtype(np.int64), ("n",))]
    path = _save(tmp_path / "d.npz", x=np.full((2, 4), 0.1), ids=np.arange(2, dtype=np.int32))
    data = open_data(path, spec)
    batch = next(data.batches())
    assert batch.feeds["x"].dtype == np.float32
    assert batch.feeds["x"][0, 0] == np.float32(0.1)
    assert batch.feeds["ids"].dtype == np.int64
    assert sorted((n.where, "converted" in n.text) for n in data.notes) == [("ids", True), ("x", True)]


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        (np.zeros((2, 4), np.uint8), np.float32, "the model wants float32, but the data is uint8"),
        (np.zeros((2, 4), np.float32), np.int64, "the model wants int64, but the data is float32"),
        (np.zeros((2, 4), np.int64), np.bool_, "the model wants bool, but the data is int64"),
    ],
)
def test_other_casts_are_errors(tmp_path: Path, array: np.ndarray, dtype: type, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(_save(tmp_path / "d.npz", x=array), [InputSpec("x", np.dtype(dtype), ("n", 4))])


def test_an_integer_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    data = open_data(
        _save(tmp_path / "d.npz", x=np.array([[2**40] * 4])), [InputSpec("x", np.dtype(np.int32), ("n", 4))]
    )
    with pytest.raises(DataError, match="1099511627776 does not fit the model's int32"):
        next(data.batches())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"imag": np.zeros((2, 4), np.float32), "z": np.zeros(2)},
            r"no array for the model's input 'image'.*did you mean 'imag'",
        ),
        (
            {"image": np.zeros((2, 4), np.float32), "extra": np.zeros(2)},
            r"array 'extra', but the model's inputs are \['image'\]",
        ),
        (
            {"image": np.zeros((2, 4), np.float32), "labels": np.zeros(3)},
            r"same number of rows.*'image': 2, 'labels': 3",
        ),
        ({"image": np.zeros((0, 4), np.float32)}, r"calibration data is empty"),
        ({}, r"calibration data is empty"),
        ({"image": np.zeros((2, 3, 4, 5), np.float32)}, r"rank 2 \[n, 4\], but its array has rank 4"),
        ({"image": np.float32(3)}, r"'image' is a single number"),
        ({"image": np.zeros((2, 4), np.float32), "0::image": np.zeros(4)}, r"mixes keys"),
        (
            {"0::image": np.zeros((1, 4), np.float32), "1::imago": np.zeros(4), "1::b": np.zeros(4)},
            r"batch '1'.*'image'",
        ),
        (
            {"0::image": np.zeros((1, 4), np.float32), "0::y": np.zeros(1), "1::image": np.zeros((1, 4), np.float32)},
            r"batch '1' has no labels",
        ),
        ({"image": np.array([[1], [2, 3]], dtype=object)}, r"'image'.*holds Python objects"),
    ],
)
def test_wrong_archives_name_what_is_wrong(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(_save(tmp_path / "d.npz", **arrays), [InputSpec("image", np.dtype(np.float32), ("n", 4))])


def test_a_batch_lacking_one_input_is_named(tmp_path: Path) -> None:
    specs = [X, InputSpec("step", np.dtype(np.float32), (1,))]
    one = {"x": np.zeros((1, 4), np.float32), "step": np.zeros(1, np.float32)}
    arrays = {f"{b}::{k}": v for b in range(3) for k, v in one.items() if (b, k) != (2, "step")}
    with pytest.raises(DataError, match=r"batch '2'.*no array for the model's input 'step'"):
        open_data(_save(tmp_path / "d.npz", **arrays), specs)


def _npy(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return out.getvalue() + data


def test_huge_declared_shapes_are_refused_without_allocating(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("0::x.npy", _npy((2**40, 4)))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"declares shape \(1099511627776, 4\)"):
        open_data(path, [X])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_batch_over_the_limit_is_refused_before_decompressing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featherweight.data.arrays.MAX_BATCH_BYTES", 1 << 20)
    path = _save(tmp_path / "d.npz", True, **{"0::x": np.zeros((1 << 18, 4), np.float32)})
    with pytest.raises(DataError, match="over the limit of 1048576 B a batch"):
        next(open_data(path, [X]).batches())


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("0::x.npy", _npy((1, 4), bytes(16)))
        with pytest.warns(UserWarning, match="Duplicate"):
            z.writestr("0::x.npy", _npy((1, 4), bytes(16)))
    with pytest.raises(DataError, match="holds the key '0::x' twice"):
        open_data(path, [X])


@pytest.mark.parametrize("keep", [0, 1, 3, 100, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_archives_are_clear_errors(tmp_path: Path, keep: float, compressed: bool) -> None:
    path = _save(tmp_path / "d.npz", compressed, x=np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep >= 1 or keep == 0 else len(whole) * keep)])
    with pytest.raises(DataError, match=str(path)):
        open_data(path, [X])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("key", ["x", "0::x"])
@pytest.mark.parametrize("way", [check, lambda d, i: spool(d, Path(d.source).parent / "s", inputs=i)])
def test_flipped_bytes_are_found(
    tmp_path: Path, compressed: bool, key: str, way: Callable[[Dataset, list[InputSpec]], object]
) -> None:
    x = np.random.default_rng(0).normal(size=(5000, 4)).astype(np.float32)
    path = _save(tmp_path / "d.npz", compressed, **{key: x})
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="damaged"):
        way(open_data(path, [X]), [X])


def test_every_single_byte_change_is_an_error_or_harmless(tmp_path: Path) -> None:
    path = _save(tmp_path / "d.npz", x=np.ones((2, 4), np.float32))
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        raw = bytearray(whole)
        raw[position] ^= 0x55
        path.write_bytes(bytes(raw))
        try:
            data = open_data(path, [X])
            check(data, [X])
        except DataError:
            continue
        assert all(np.array_equal(b.feeds["x"], np.ones((1, 4), np.float32)) for b in data.batches())


def test_a_member_that_claims_more_than_zip_can_hold_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "d.npz", True, x=np.zeros((1000, 4), np.float32))
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 24 : at + 28] = struct.pack("<I", 2**31)
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="more than zip can compress"):
        open_data(path, [X])


def test_wrong_ending_and_absent_file_say_what_would_do(tmp_path: Path) -> None:
    (tmp_path / "d.npz").write_bytes(b"\x93NUMPY not a zip")
    with pytest.raises(DataError, match=r"not an .npz archive; write it with numpy.savez"):
        open_data(tmp_path / "d.npz", [X])
    (tmp_path / "d.pkl").write_bytes(b"")
    with pytest.raises(DataError, match=r"ending '.pkl'; use .npz"):
        open_data(tmp_path / "d.pkl", [X])
    with pytest.raises(DataError, match="there is no file or folder"):
        open_data(tmp_path / "none.npz", [X])


def _read(data: Dataset) -> list[float]:
    return [float(b.feeds["x"][0, 0]) for b in data.batches()]


def test_a_dataset_is_small_when_pickled_and_read_by_a_spawned_process(tmp_path: Path) -> None:
    x = np.arange(400_000, dtype=np.float32).reshape(100_000, 4)
    data = open_data(_save(tmp_path / "d.npz", x=x), [X]).subset([5, 70_000])
    assert len(pickle.dumps(data)) < 4000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read, (data,)) == [20.0, 280_000.0]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("keyed", [False, True])
def test_memory_is_flat_in_the_number_of_batches(tmp_path: Path, compressed: bool, keyed: bool) -> None:
    def peak(count: int) -> int:
        spec = [InputSpec("x", np.dtype(np.float32), ("n", 10_000))]
        x = np.random.default_rng(0).integers(0, 9, size=(count, 10_000)).astype(np.float32)
        arrays = {f"{i}::x": x[i : i + 1] for i in range(count)} if keyed else {"x": x}
        path = _save(tmp_path / f"{count}.npz", compressed, **arrays)
        del x, arrays
        tracemalloc.start()
        check(open_data(path, spec), spec)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(20), peak(400)  # 0.8 MB and 16 MB of data
    assert many < few + 1_000_000
