"""Checks before any work, and likeness of two datasets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from featherweight.data import Batch, InputSpec, check, check_batch, likeness, open_data
from featherweight.data.dataset import Dataset
from featherweight.errors import DataError

F32 = np.dtype(np.float32)
X = InputSpec("x", F32, ("n", 3, 4))
IDS = InputSpec("ids", np.dtype(np.int64), ("n", "s"))
MASK = InputSpec("mask", np.dtype(np.int64), ("n", "s"))


def _data(tmp_path: Path, x: np.ndarray, name: str = "d", **more: np.ndarray) -> Dataset:
    np.savez(tmp_path / f"{name}.npz", x=x, **more)
    return open_data(tmp_path / f"{name}.npz", [InputSpec("x", F32, ("n", *x.shape[1:]))])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_bad_position_is_named(tmp_path: Path, bad: float) -> None:
    x = np.zeros((5, 3, 4), np.float32)
    x[3, 1, 2] = x[3, 2, 0] = x[4, 0, 0] = bad
    with pytest.raises(DataError, match=rf"batch 3, input 'x': {bad} at position \[0, 1, 2\] \(the first of 2 of 12\)"):
        check(_data(tmp_path, x), [X])


def test_overflow_of_a_cast_is_found(tmp_path: Path) -> None:
    spec = [InputSpec("x", F32, ("n", 2))]
    np.savez(tmp_path / "d.npz", x=np.full((1, 2), 1e300))
    with pytest.raises(DataError, match="inf at position"):
        check(open_data(tmp_path / "d.npz", spec), spec)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        (
            {"x": np.zeros((1, 3, 5), np.float32)},
            r"wants shape \[n, 3, 4\], but got \(1, 3, 5\) \(axis 2: 4 expected, 5 found\)",
        ),
        ({"x": np.zeros((3, 4), np.float32)}, r"wants rank 3 \[n, 3, 4\], but got rank 2 \(3, 4\)"),
        ({"x": np.zeros((0, 3, 4), np.float32)}, r"has no elements"),
        ({"x": np.zeros((1, 3, 4))}, r"wants float32, but the data is float64"),
        ({"z": np.zeros((1, 3, 4), np.float32)}, r"has an input 'z', but the model's inputs are \['x'\]"),
        ({}, r"lacks the model's input 'x'"),
    ],
)
def test_shape_rank_type_and_name_are_named(feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_batch(Batch(0, feeds, None, 1, "7"), [X])


def test_a_symbolic_axis_has_one_size_within_a_batch() -> None:
    def batch(s: int, t: int) -> Batch:
        return Batch(0, {"ids": np.zeros((2, s), np.int64), "mask": np.zeros((2, t), np.int64)}, None, 2)

    check_batch(batch(5, 5), [IDS, MASK])
    with pytest.raises(DataError, match=r"input 'mask': axis 's' is 6 here, but 5 in input 'ids'"):
        check_batch(batch(5, 6), [IDS, MASK])


def test_ids_outside_their_range_are_named() -> None:
    batch = Batch(0, {"ids": np.array([[1, 2, 100]])}, None, 1)
    check_batch(batch, [IDS], id_limits={"ids": 101})
    with pytest.raises(DataError, match=r"id 100 at position \[0, 2\] is outside 0..99"):
        check_batch(batch, [IDS], id_limits={"ids": 100})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 3]), r"label 3 is outside the model's classes 0..2; are classes counted from 1\?"),
        (np.array([-1, 0]), r"label -1 is outside the model's classes 0..2"),
        (np.array([0.5, 0]), r"labels must be class numbers 0..2, but got float64 0.5"),
        (np.array([0]), r"2 samples need 2 labels, but got 1"),
        (np.array([np.nan, 0]), r"labels: nan at position \[0\]"),
    ],
)
def test_wrong_labels_are_named(labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_batch(Batch(0, {"x": np.zeros((2, 3, 4), np.float32)}, labels, 2), [X], n_classes=3)


def test_an_empty_selection_is_an_error(tmp_path: Path) -> None:
    data = _data(tmp_path, np.zeros((2, 3, 4), np.float32))
    with pytest.raises(DataError, match="holdout data is empty"):
        check(data.subset([]), [X], role="holdout")


def test_like_data_raise_no_note(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = (_data(tmp_path, rng.normal(size=(50, 3, 4)).astype(np.float32), n) for n in "ab")
    assert likeness(a, b) == []


def test_unlike_data_are_noted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(50, 3, 4)).astype(np.float32)
    a, b = _data(tmp_path, x, "a"), _data(tmp_path, x * 255, "b")
    assert any("outside calibration's: calibration" in n.text for n in likeness(a, b))
    assert any("under a tenth of calibration's range" in n.text for n in likeness(b, a))
    assert any("means differ" in n.text for n in likeness(a, b))


def test_batches_in_both_are_counted(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(10, 3, 4)).astype(np.float32)
    data = _data(tmp_path, x)
    notes = likeness(data.subset(range(6)), data.subset(range(4, 10)))
    assert any("2 of 6 evaluation batches are also calibration batches" in n.text for n in notes)


def _model_inputs(path: Path) -> list[InputSpec]:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path, load_external_data=False)
    constants = {i.name for i in model.graph.initializer}
    return [
        InputSpec(
            i.name,
            onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type),
            tuple(d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim),
        )
        for i in model.graph.input
        if i.name not in constants
    ]


def test_shared_calibration_cases(cases_dir: Path) -> None:
    found: dict[str, str] = {}
    traps: set[str] = set()
    for file in sorted(cases_dir.glob("*.calib.npz")):
        name = file.name.removesuffix(".calib.npz")
        inputs = _model_inputs(cases_dir / f"{name}.onnx")
        if "calib" in json.loads((cases_dir / f"{name}.json").read_text())["oracle"]:
            traps.add(name)
        try:
            data = open_data(file, inputs)
            check(data, inputs)
        except DataError as e:
            found[name] = str(e)
            continue
        with np.load(file) as arrays:
            for batch in data.batches():
                for key, array in batch.feeds.items():
                    assert np.array_equal(array, arrays[f"{batch.name[1:-1]}::{key}"])
    assert found.keys() == traps
    assert "calibration data is empty" in found["calibration_is_empty"]
    assert "batch '1', input 'x': nan at position [0, 1, 2, 3]" in found["calibration_contains_nan_and_inf"]
