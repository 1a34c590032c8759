"""Division in calibration, validation and holdout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherweight.data import Dataset, InputSpec, open_data, split, split_to_teach
from featherweight.data.splits import tag_of
from featherweight.errors import DataError

SPEC = [InputSpec("x", np.dtype(np.float32), ("n", 1))]


def _data(folder: Path, n: int, labels: np.ndarray | None = None, batch_size: int = 1) -> Dataset:
    more = {} if labels is None else {"labels": labels}
    path = folder / f"{n}-{batch_size}-{labels is None}.npz"
    np.savez(path, x=np.arange(n, dtype=np.float32)[:, None], **more)
    return open_data(path, SPEC, batch_size=batch_size)


def _parts(data: Dataset, **options: object) -> list[list[int]]:
    s = split(data, **options)
    return [p.atoms() for p in (s.calibration, s.validation, s.holdout)]


@pytest.mark.parametrize(("n", "sizes"), [(1000, [300, 300, 400]), (16, [5, 5, 6]), (4, [1, 1, 2]), (3, [1, 1, 1])])
def test_sizes_are_as_stated_and_parts_are_disjoint(tmp_path: Path, n: int, sizes: list[int]) -> None:
    parts = _parts(_data(tmp_path, n))
    assert [len(p) for p in parts] == sizes
    assert sorted(a for p in parts for a in p) == list(range(n))


@given(st.integers(3, 60), st.floats(0.05, 0.6), st.floats(0.05, 0.35), st.integers(0, 3), st.integers(1, 5))
def test_any_fractions_give_a_partition(
    tmp_path_factory: pytest.TempPathFactory, n: int, calibration: float, validation: float, seed: int, classes: int
) -> None:
    folder = tmp_path_factory.mktemp("s")
    parts = _parts(_data(folder, n, np.arange(n) % classes), calibration=calibration, validation=validation, seed=seed)
    assert all(parts)
    assert sorted(a for p in parts for a in p) == list(range(n))


@pytest.mark.parametrize(("n", "text"), [(1, "only one batch"), (2, "only two batches")])
def test_too_little_data_overlaps_with_a_note(tmp_path: Path, n: int, text: str) -> None:
    s = split(_data(tmp_path, n))
    assert s.calibration.atoms() == s.validation.atoms() == [0]
    assert s.holdout.atoms() == [n - 1]
    assert text in s.notes[0].text


def test_the_seed_decides(tmp_path: Path) -> None:
    data = _data(tmp_path, 100)
    assert _parts(data, seed=1) == _parts(data, seed=1)
    assert _parts(data, seed=1) != _parts(data, seed=2)


def test_classes_and_scores_are_dealt_evenly(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    for part, want in zip(_parts(_data(tmp_path, 100, labels)), (30, 30, 40), strict=True):
        counts = np.bincount(labels[part], minlength=3) / want
        assert np.allclose(counts, [0.6, 0.3, 0.1], atol=0.05)
    scores = np.random.default_rng(0).uniform(0, 5, 200)
    means = [scores[p].mean() for p in _parts(_data(tmp_path, 200, scores))]
    assert np.ptp(means) < 0.1  # three random parts of this size differ by about 0.3


def test_batches_are_made_anew_from_samples(tmp_path: Path) -> None:
    s = split(_data(tmp_path, 100, batch_size=8))
    assert [b.n for b in s.calibration.batches()] == [8, 8, 8, 6]
    assert s.holdout.n_samples == 40


def test_max_calibration_bounds_it(tmp_path: Path) -> None:
    assert [len(p) for p in _parts(_data(tmp_path, 100), max_calibration=7)] == [7, 30, 63]


def test_two_sources(tmp_path: Path) -> None:
    a, b = _data(tmp_path, 10), _data(tmp_path, 70)
    s = split(a, evaluation=b, max_calibration=6)
    assert (s.calibration.n_batches, s.validation.n_batches, s.holdout.n_batches) == (6, 30, 40)
    assert s.holdout.source == b.source
    one = split(a, evaluation=_data(tmp_path, 1))
    assert "the search sees the data the result is reported on" in one.notes[0].text


@pytest.mark.parametrize(
    ("calibration", "validation"), [(0, 0.5), (0.5, 0.5), (0.9, 0.2), (-1, 0.1), (float("nan"), 0.1)]
)
def test_wrong_fractions_are_errors(tmp_path: Path, calibration: float, validation: float) -> None:
    with pytest.raises(DataError, match="must be > 0 and sum to less than 1"):
        split(_data(tmp_path, 5), calibration=calibration, validation=validation)


def test_split_words() -> None:
    assert [tag_of(w) for w in ("Train", "dev", " test ", "", "fold1")] == [
        "calibration",
        "validation",
        "holdout",
        "",
        None,
    ]


def test_fixed_batches_stay_whole(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.arange(40, dtype=np.float32)[:, None])
    data = open_data(tmp_path / "d.npz", [InputSpec("x", np.dtype(np.float32), (4, 1))])
    for part, n in zip(_parts(data), (3, 3, 4), strict=True):
        assert len(part) == 4 * n
        assert all(part[i : i + 4] == list(range(part[i], part[i] + 4)) for i in range(0, len(part), 4))
        assert all(p % 4 == 0 for p in part[::4])


@given(st.integers(3, 80), st.integers(0, 3), st.integers(1, 5), st.booleans())
def test_a_student_is_guarded_by_what_it_was_not_fitted_to(
    tmp_path_factory: pytest.TempPathFactory, n: int, seed: int, classes: int, tagged: bool
) -> None:
    folder = tmp_path_factory.mktemp("s")
    data = _data(folder, n, np.arange(n) % classes)
    if tagged:
        tags = tuple(("calibration", "calibration", "holdout")[i % 3] for i in range(n))
        data = dataclasses.replace(data, origin=dataclasses.replace(data.origin, tags=tags))
    fitted, taught = split(data, seed=seed), split_to_teach(data, seed=seed)
    own, val, hold = (set(p.atoms()) for p in (taught.calibration, taught.validation, taught.holdout))
    assert own | val | hold == set(range(n))
    assert len(own) + len(val) + len(hold) == n
    assert not {*val, *hold} & set(fitted.calibration.atoms())
    assert hold <= set(fitted.holdout.atoms())
    if n >= 50:
        assert len(val) == pytest.approx(0.15 * 2 * n / 3 if tagged else 0.12 * n, abs=2)
        assert len(hold) == pytest.approx(n / 3 if tagged else 0.18 * n, abs=1)
