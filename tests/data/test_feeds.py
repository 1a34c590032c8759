"""Data from Python: callables, iterables, mappings, module:function."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from featherweight.data import InputSpec, check, open_data, split
from featherweight.data import feeds as feeds_module
from featherweight.errors import DataError

X = InputSpec("x", np.dtype(np.float32), ("n", 4))
TWO = [X, InputSpec("step", np.dtype(np.int64), ())]


def _gen() -> Iterator[tuple[dict[str, np.ndarray], int]]:
    for i in range(6):
        yield {"x": np.full((1, 4), i, np.float32)}, i % 2


def test_a_callable_is_read_once_and_spooled(tmp_path: Path) -> None:
    calls = []

    def source() -> Iterator[object]:
        calls.append(1)
        return _gen()

    data = open_data(source, [X], spool_folder=tmp_path)
    check(data, [X], n_classes=2)
    for _ in range(2):
        assert [float(b.feeds["x"][0, 0]) for b in data.batches()] == [0, 1, 2, 3, 4, 5]
    assert data.labels().tolist() == [0, 1, 0, 1, 0, 1]
    assert calls == [1]
    assert split(data).holdout.n_samples == 2
    assert pickle.loads(pickle.dumps(data)).n_samples == 6


def test_iterables_bare_arrays_and_samples_without_batch_axis(tmp_path: Path) -> None:
    data = open_data([np.zeros(4), np.ones(4)], [X], spool_folder=tmp_path)
    assert [b.feeds["x"].tolist() for b in data.batches()] == [[[0] * 4], [[1] * 4]]
    texts = [n.text for n in data.notes]
    assert any("no batch axis" in t for t in texts)
    assert any("holds float64; converted" in t for t in texts)
    assert len(texts) == len(set(texts))


def test_batches_of_several_inputs_stay_whole(tmp_path: Path) -> None:
    items = [{"x": np.full((i + 1, 4), i, np.float32), "step": np.int64(i)} for i in range(4)]
    data = open_data(items, TWO, spool_folder=tmp_path)
    check(data, TWO)
    assert [b.feeds["x"].shape[0] for b in data.batches()] == [1, 2, 3, 4]


def test_a_mapping_of_arrays(tmp_path: Path) -> None:
    data = open_data({"x": np.zeros((3, 4), np.float32), "labels": [0, 1, 2]}, [X], spool_folder=tmp_path)
    assert data.labels().tolist() == [0, 1, 2]


def test_module_function_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fw_test_feeds.py").write_text(
        "import numpy as np\ndef give():\n    return [{'x': np.ones((1, 4), np.float32)}]\nnumber = 3\nraise_ = None\n"
    )
    monkeypatch.chdir(tmp_path)
    assert open_data("fw_test_feeds:give", [X]).n_batches == 1
    with pytest.raises(DataError, match="has no function 'number'"):
        open_data("fw_test_feeds:number", [X])
    with pytest.raises(DataError, match=r"cannot be imported .ModuleNotFoundError"):
        open_data("fw_test_absent:give", [X])


def test_an_endless_generator_is_cut_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = ({"x": np.zeros((1, 4), np.float32)} for _ in itertools.count())
    data = feeds_module.open_feeds(endless, [X], where="w", folder=tmp_path, max_batches=20)
    assert data.n_batches == 20
    assert "only the first 20 batches are used" in data.notes[0].text


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "calibration data is empty"),
        ([{"y": np.zeros((1, 4)), "z": 1}], "batch 0 has no array for the model's input 'x'"),
        ([{"x": [[1, 2], [3]]}], "batch 0, input 'x' cannot be read as an array"),
        ([{"x": np.array([None])}], "not a regular array of numbers"),
        (
            [{"x": np.zeros((1, 4), np.float32)}, {"x": np.zeros((1, 4), np.uint8)}],
            "batch 1, input 'x': the model wants float32",
        ),
        ([({"x": np.zeros((1, 4), np.float32)}, 1), {"x": np.zeros((1, 4), np.float32)}], "batch 1 lacks labels"),
    ],
)
def test_wrong_items_are_named(tmp_path: Path, items: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(items, [X], spool_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_users_generator_names_the_batch(tmp_path: Path) -> None:
    def source() -> Iterator[object]:
        yield {"x": np.zeros((1, 4), np.float32)}
        raise KeyError("lost")

    with pytest.raises(DataError, match=r"the data function source failed at batch 1 .KeyError: 'lost'"):
        open_data(source, [X], spool_folder=tmp_path)
    with pytest.raises(DataError, match="must give batches one after another, but gave int"):
        open_data(int, [X], spool_folder=tmp_path)
