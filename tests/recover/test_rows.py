"""Which rows of a layer are looked at."""

from __future__ import annotations

import numpy as np

from featherweight.recover import rows
from featherweight.recover.rows import Geometry
from featherweight.stats.windows import Window

MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_padding_is_left_out_of_a_dense_layer():
    assert rows.places(Geometry("matmul", 1), (2, 4, 5), 100, rng(), MASK).tolist() == [0, 1, 2, 4, 5]
    assert rows.places(Geometry("matmul", 1), (2, 4, 5), 100, rng()).tolist() == list(range(8))


def test_fewer_are_drawn_where_there_are_more_than_wanted():
    found = rows.places(Geometry("matmul", 1), (2, 4, 5), 2, rng(), MASK)
    assert len(found) == 4  # two a sample
    assert set(found) < {0, 1, 2, 4, 5}


def test_windows_and_other_shapes_have_no_padding():
    window = Window((3,), (1,), (1,), (1, 1))
    assert rows.places(Geometry("conv", 1, window), (2, 5, 4), 100, rng(), MASK).tolist() == [0, 1, 2, 3]
    assert rows.places(Geometry("gemm", 1), (8, 5), 100, rng(), MASK).tolist() == list(range(8))
    assert rows.places(Geometry("matmul_left", 1), (2, 4, 5), 100, rng(), MASK).tolist() == list(range(10))
