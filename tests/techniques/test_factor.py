"""Products of thinner matrices: against numpy's SVD, least squares on samples, and matrices of known rank."""

from __future__ import annotations

import numpy as np
import pytest

from featherweight.techniques import _factor
from featherweight.techniques._factor import onto, pair, power, spread, steadied, tail, times

Array = np.ndarray


def problem(g: int, out: int, k: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """W (g, out, k), samples X (g, k, n) of uneven, correlated channels, and C = E[x x^T]."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(g, k, k)) @ (rng.normal(size=(g, k, 5 * k)) * np.geomspace(1, 0.01, k)[:, None])
    return rng.normal(size=(g, out, k)), X, X @ X.transpose(0, 2, 1) / X.shape[2]


@pytest.mark.parametrize(("g", "out", "k"), [(1, 6, 10), (1, 10, 6), (1, 7, 7), (3, 4, 5), (2, 9, 4)])
def test_every_rank_is_as_far_off_as_the_singular_values_left_out(g: int, out: int, k: int) -> None:
    W, X, C = problem(g, out, k)
    found = pair(W, C)
    left = [np.linalg.svd(W[i] @ np.linalg.cholesky(C[i]), compute_uv=False) for i in range(g)]
    for rank in range(1, min(out, k) + 1):
        outer, inner = found.cut(rank)
        wanted = sum(float(np.square(s[rank:]).sum()) for s in left)
        np.testing.assert_allclose(found.error(rank), wanted, rtol=1e-6, atol=1e-9 * power(W, C))
        measured = np.square((W - outer @ inner) @ X).sum() / X.shape[2]
        np.testing.assert_allclose(measured, wanted, rtol=1e-6, atol=1e-9 * power(W, C))


def test_no_other_product_of_that_rank_is_nearer() -> None:
    W, _, C = problem(1, 6, 8)
    best = pair(W, C).error(3)
    rng = np.random.default_rng(1)
    outer, inner = pair(W, C).cut(3)
    for _ in range(50):
        near = (outer + 0.01 * rng.normal(size=outer.shape)) @ (inner + 0.01 * rng.normal(size=inner.shape))
        assert power(W - near, C) >= best


@pytest.mark.parametrize("moments", ["none", "diagonal"])
@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5)])
def test_identity_and_diagonal_moments_are_plain_and_scaled_svd(moments: str, shape: tuple[int, int, int]) -> None:
    W = np.random.default_rng(0).normal(size=shape)
    size = np.random.default_rng(1).uniform(0.1, 2, size=(shape[0], shape[2]))
    C, seen = (None, W) if moments == "none" else (size**2, W * size[:, None])
    found = pair(W, C)
    singular = np.linalg.svd(seen, compute_uv=False)
    np.testing.assert_allclose(found.energy, singular**2, rtol=1e-9)
    np.testing.assert_allclose(found.outer @ found.inner, W, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_an_exact_rank_is_found_to_rounding(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    W = (rng.normal(size=(shape[0], 4)) @ rng.normal(size=(4, shape[1]))).astype(np.float32).astype(np.float64)[None]
    _, _, C = problem(1, 2, shape[1])
    for moments in (None, C):
        found = pair(W, moments)
        assert tail(found.energy, 4) < 1e-12 * found.energy.sum() < tail(found.energy, 3)
        outer, inner = found.cut(4)
        np.testing.assert_allclose(outer @ inner, W, atol=1e-5 * np.abs(W).max())


@pytest.mark.parametrize("shape", [(1, 5, 9), (1, 9, 5)])
def test_zero_rows_stay_exactly_zero_and_what_passes_has_one_scale(shape: tuple[int, int, int]) -> None:
    W, _, C = problem(*shape)
    W[:, 2] = 0
    outer, inner = pair(W, C).cut(3)
    assert not outer[:, 2].any()
    np.testing.assert_allclose(spread(inner, C), 1.0, rtol=1e-6)


@pytest.mark.parametrize("g", [1, 3])
def test_the_outer_factor_is_the_least_squares_solution(g: int) -> None:
    W, X, C = problem(g, 6, 8)
    inner = np.random.default_rng(2).normal(size=(g, 5, 8))
    found = onto(W, C, inner)
    counts = [1, 3, 5]
    errors = found.errors(counts)
    for n, error in zip(counts, errors, strict=True):
        measured = 0.0
        for i in range(g):
            solution = np.linalg.lstsq((inner[i, :n] @ X[i]).T, (W[i] @ X[i]).T, rcond=None)[0].T
            np.testing.assert_allclose(found.solve(n)[i], solution, rtol=1e-4, atol=1e-5)
            measured += np.square((W[i] - solution @ inner[i, :n]) @ X[i]).sum() / X.shape[2]
        np.testing.assert_allclose(error, measured, rtol=1e-5, atol=1e-8 * found.whole)


def test_rows_that_repeat_others_do_no_harm() -> None:
    W, _, C = problem(1, 4, 6)
    inner = np.random.default_rng(0).normal(size=(1, 3, 6))
    doubled = np.concatenate([inner, inner], axis=1)
    np.testing.assert_allclose(onto(W, C, doubled).error(), onto(W, C, inner).error(), rtol=1e-6)
    assert np.isfinite(onto(W, C, doubled).solve()).all()


def test_covariances_of_few_rows_are_shrunk_and_dead_inputs_are_harmless() -> None:
    C = np.zeros((1, 4, 4))
    C[0, :2, :2] = [[2, 1], [1, 2]]
    for rows, kept in ((10**9, 1.0), (12, 0.75), (16, 0.8), (1, 0.5), (0, 0.5)):
        found = steadied(C, None, rows)
        assert found is not None
        np.testing.assert_allclose(found[0, 0, 1], kept, atol=1e-6)
        np.testing.assert_allclose(np.diagonal(found[0]), np.diagonal(C[0]), atol=1e-6)
        assert np.linalg.eigvalsh(found[0]).min() > 0
    np.testing.assert_array_equal(steadied(np.zeros((1, 4, 4)), None, 100), np.eye(4)[None])
    np.testing.assert_array_equal(steadied(np.zeros((1, 4)), None, 100), np.ones((1, 4)))
    assert steadied(None, None, 3) is None


def test_means_are_not_shrunk() -> None:
    mean = np.array([[1.0, -2.0, 3.0]])
    covariance = np.array([[[2.0, 1.0, 0.5], [1.0, 2.0, 0.5], [0.5, 0.5, 1.0]]])
    whole = steadied(covariance + mean[:, :, None] * mean[:, None], mean, 3)
    alone = steadied(covariance, None, 3)
    assert whole is not None
    assert alone is not None
    np.testing.assert_allclose(whole - alone, mean[:, :, None] * mean[:, None], atol=1e-12)
    np.testing.assert_allclose(alone[0, 0, 1], 0.5)


def test_an_indefinite_matrix_still_gets_a_triangle() -> None:
    C = np.diag([1.0, 1.0, -1e-7])[None]
    L = _factor.triangular(C)
    assert np.isfinite(L).all()
    np.testing.assert_allclose(L @ L.transpose(0, 2, 1), C, atol=1e-4)
    assert np.isfinite(_factor.triangular(np.diag([1.0, -5.0])[None])).all()


def test_times_takes_all_three_forms_of_moments() -> None:
    M = np.random.default_rng(0).normal(size=(2, 3, 4))
    d = np.random.default_rng(1).uniform(size=(2, 4))
    np.testing.assert_array_equal(times(M, None), M)
    np.testing.assert_allclose(times(M, d), times(M, d[:, :, None] * np.eye(4)))
