"""Running sums equal the same sums over everything at once."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.stats.accumulate import BINS, Histogram, Moments, Reservoir


def test_moments_equal_the_direct_mean():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5000, 7)).astype(np.float32)
    m = Moments(3, 7)
    for a in range(0, 5000, 131):
        m.add(x[:, a : a + 131])
    m.flush()
    wide = x.astype(np.float64)
    np.testing.assert_allclose(m.total / m.rows, np.einsum("gnk,gnl->gkl", wide, wide) / 5000, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(m.first / m.rows, wide.mean(axis=1), atol=1e-6)
    assert m.rows == 5000


def test_moments_leave_out_rows_that_are_not_finite():
    x = np.ones((1, 4, 2), np.float32)
    x[0, 1, 0], x[0, 2, 1] = np.nan, np.inf
    m = Moments(1, 2)
    m.add(x)
    m.flush()
    assert m.rows == 2
    np.testing.assert_array_equal(m.total / m.rows, np.ones((1, 2, 2)))


def test_diagonal_moments_are_the_diagonal():
    x = np.random.default_rng(1).normal(size=(2, 50, 4)).astype(np.float32)
    full, diagonal = Moments(2, 4), Moments(2, 4, diagonal=True)
    for m in (full, diagonal):
        m.add(x)
        m.flush()
    np.testing.assert_allclose(np.einsum("gii->gi", full.total), diagonal.total, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), min_size=1, max_size=12))
def test_histogram_counts_every_value_within_one_bin(batches):
    h = Histogram()
    for batch in batches:
        h.add(np.array(batch, np.float32))
    values = np.array([v for b in batches for v in b], np.float32)
    if h.width == 0:
        assert h.zeros_before == len(values)
        return
    assert h.counts.sum() == len(values)
    edges = h.edges()
    assert edges[0] <= values.min() + h.width
    assert edges[-1] >= values.max() - h.width
    middle = edges[BINS // 2]
    below = int(h.counts[: BINS // 2].sum())
    near = int((np.abs(values - middle) <= 2 * h.width).sum())
    assert abs(below - int((values < middle).sum())) <= near


def test_reservoir_keeps_a_uniform_sample():
    rng = np.random.default_rng(0)
    r = Reservoir(400, 1)
    for a in range(0, 20000, 100):
        r.add(np.arange(a, a + 100, dtype=np.float32)[:, None], rng)
    kept = r.rows()[:, 0]
    assert r.seen == 20000
    assert len(np.unique(kept)) == 400
    assert abs(kept.mean() - 10000) < 1200  # 4 standard errors of 400 uniform draws
