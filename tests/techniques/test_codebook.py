"""Codebooks: clustering against brute force, assignment against plain clustering."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.errors import TechniqueError
from featherweight.techniques import _codebook


def problem(seed: int, g: int, out: int, k: int, rows: int = 300):
    rng = np.random.default_rng(seed)
    w = (rng.standard_t(4, (g, out, k)) * 0.1).astype(np.float32)
    x = rng.normal(size=(g, rows, k)) @ rng.normal(size=(g, k, k)) * np.exp(rng.normal(size=(g, 1, k)))
    return w, np.einsum("gnk,gnl->gkl", x, x) / rows


def output_error(w: np.ndarray, c: np.ndarray, decoded: np.ndarray) -> float:
    d = w.astype(np.float64) - decoded
    return float(sum(row @ c[g] @ row for g in range(len(w)) for row in d[g]))


def spread(values: np.ndarray, weights: np.ndarray, centroids: np.ndarray) -> float:
    return float((weights * (values[:, None] - centroids).__pow__(2).min(axis=1)).sum())


def best_clustering(values: np.ndarray, weights: np.ndarray, levels: int) -> float:
    """Every way to cut the sorted values into runs."""
    order = np.argsort(values)
    v, w = values[order].astype(np.float64), weights[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, len(v)), levels - 1):
        parts = np.split(np.arange(len(v)), cuts)
        centres = np.array([np.average(v[p], weights=w[p]) for p in parts])
        best = min(best, spread(v, w, centres))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_clustering_is_optimal_on_small_problems(seed, levels):
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, 11).astype(np.float32)
    weights = rng.uniform(0.1, 3, 11).astype(np.float32)
    found = spread(values, weights, _codebook.kmeans(values, weights, levels))
    assert found <= best_clustering(values, weights, levels) * 1.002 + 1e-9


def test_clustering_reaches_the_known_distortion_of_a_normal():
    values = np.random.default_rng(0).normal(size=400_000).astype(np.float32)
    for bits, known in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
        centroids = _codebook.kmeans(values, np.ones_like(values), 2**bits)
        near = centroids[np.abs(values[:20000, None] - centroids).argmin(axis=1)]
        assert np.mean((values[:20000] - near) ** 2) == pytest.approx(known, rel=0.06)


def test_few_distinct_values_are_kept_exactly():
    w = np.random.default_rng(0).choice(np.float32([-0.3, 0.0, 0.1, 7.0]), (1, 30, 50))
    palette = _codebook.quantize(w, None, bits=4)
    np.testing.assert_array_equal(palette.decoded(), w)
    assert palette.codebook.shape == (1, 4)
    assert palette.error == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("options", [{}, {"books": 3}, {"row_scale": True}])
@pytest.mark.parametrize("shape", [(1, 24, 20), (12, 2, 9)])
def test_error_is_true_and_better_than_clustering_alone(bits, options, shape):
    w, c = problem(bits, *shape)
    diagonal = np.einsum("gii->gi", c)
    alone = _codebook.quantize(w, diagonal, bits=bits, **options)
    fed = _codebook.quantize(w, c, bits=bits, **options)
    truth = output_error(w, c, fed.decoded())
    assert fed.error * np.einsum("gok,gkl,gol->", w, c, w) == pytest.approx(truth, rel=2e-3)
    # With nearly a level for each weight there is nothing left to compensate.
    share = 1.0001 if 2**bits * len(fed.codebook) > w.size / 4 else 0.8
    assert truth < share * output_error(w, c, alone.decoded())
    assert len(np.unique(fed.codebook, axis=1)[0]) <= 2**bits


def test_many_zeros_stay_zero():
    w, c = problem(1, 1, 20, 30)
    w[np.random.default_rng(0).random(w.shape) < 0.5] = 0
    for options in ({}, {"row_scale": True}, {"books": 2}):
        palette = _codebook.quantize(w, c, bits=3, **options)
        assert (palette.decoded()[w == 0] == 0).all()


def test_a_row_of_zeros_survives_a_row_scale():
    w, c = problem(2, 1, 4, 6)
    w[0, 1] = 0
    palette = _codebook.quantize(w, c, bits=2, row_scale=True)
    assert (palette.decoded()[0, 1] == 0).all()
    assert palette.scale is not None
    assert (palette.scale > 0).all()


def test_bad_arguments_say_the_law():
    w, c = problem(0, 1, 2, 4)
    with pytest.raises(TechniqueError, match=r"bits must be 1..8, but got 0"):
        _codebook.quantize(w, c, bits=0)
    with pytest.raises(TechniqueError, match=r"books must be 1..2"):
        _codebook.quantize(w, c, bits=2, books=3)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    g=st.integers(1, 3),
    out=st.integers(1, 4),
    k=st.integers(1, 9),
    bits=st.integers(1, 8),
    exponent=st.integers(-12, 12),
    row_scale=st.booleans(),
)
def test_any_shape_gives_finite_weights_of_few_levels(seed, g, out, k, bits, exponent, row_scale):
    w, c = problem(seed, g, out, k, rows=4)
    w = (w * 10.0**exponent).astype(np.float32)
    palette = _codebook.quantize(w, c, bits=bits, row_scale=row_scale)
    decoded = palette.decoded()
    assert decoded.shape == w.shape
    assert np.isfinite(decoded).all()
    assert palette.indices.max() < 2**bits
    assert output_error(w, c, decoded) <= 1.001 * output_error(w, c, np.zeros_like(w)) + 1e-30
