"""Kernels as products of thinner convolutions: kernels made of such products are found again, the rest by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from featherweight.techniques import _factor_conv as fc
from featherweight.techniques._factor import onto, power

Array = np.ndarray
G, OUT, C, KERNEL = 2, 7, 5, (3, 4)
K = C * 12


def moments(kind: str, seed: int = 3) -> Array | None:
    rng = np.random.default_rng(seed)
    if kind == "none":
        return None
    if kind == "diagonal":
        return rng.uniform(0.2, 3, size=(G, K))
    X = rng.normal(size=(G, K, K)) @ rng.normal(size=(G, K, 3 * K))
    return X @ X.transpose(0, 2, 1) / X.shape[2]


KINDS = pytest.mark.parametrize("kind", ["none", "diagonal", "full"])


@KINDS
def test_channel_moments_are_means_over_positions(kind: str) -> None:
    M = moments(kind)
    found = fc.channel_moments(M, C)
    if M is None:
        assert found is None
    elif M.ndim == 2:
        wanted = [[np.mean([M[g, c * 12 + p] for p in range(12)]) for c in range(C)] for g in range(G)]
        np.testing.assert_allclose(found, wanted)
    else:
        blocks = [
            [[np.mean([M[g, c * 12 + p, d * 12 + p] for p in range(12)]) for d in range(C)] for c in range(C)]
            for g in range(G)
        ]
        np.testing.assert_allclose(found, blocks)


@KINDS
def test_kernels_of_few_channel_mixtures_are_found(kind: str) -> None:
    rng = np.random.default_rng(0)
    W = np.einsum("gorpq,grc->gocpq", rng.normal(size=(G, OUT, 2, *KERNEL)), rng.normal(size=(G, 2, C)))
    M = moments(kind)
    inner = fc.with_positions(fc.channel_basis(W, M)[:, :2], 12)
    flat = W.reshape(G, OUT, K)
    assert onto(flat, M, inner).error() < 1e-8 * power(flat, M)
    assert onto(flat, M, inner[:, :12]).error() > 1e-3 * power(flat, M)


@KINDS
def test_kernels_of_columns_and_rows_are_found(kind: str) -> None:
    rng = np.random.default_rng(1)
    W = np.einsum("gorq,grcp->gocpq", rng.normal(size=(G, OUT, 3, 4)), rng.normal(size=(G, 3, C, 3)))
    M = moments(kind)
    flat, basis = W.reshape(G, OUT, K), fc.column_basis(W, M)
    problem = onto(flat, M, fc.with_rest(basis[:, :4], 4))
    errors = problem.errors([2 * 4, 3 * 4])
    assert errors[1] < 1e-8 * power(flat, M) < errors[0]


@KINDS
def test_kernels_of_one_filter_a_channel_are_found(kind: str) -> None:
    rng = np.random.default_rng(2)
    W = np.einsum("goc,gcp->gocp", rng.normal(size=(G, OUT, C)), rng.normal(size=(G, C, 12))).reshape(G, OUT, C, 3, 4)
    M = moments(kind)
    flat, filters = W.reshape(G, OUT, K), fc.depthwise_basis(W, M)
    assert filters.shape == (G, C, 7, 12)
    assert onto(flat, M, fc.by_channel(filters[:, :, :1])).error() < 1e-8 * power(flat, M)


@pytest.mark.parametrize("m", [1, 2])
def test_refining_lowers_the_error_and_keeps_channels_apart(m: int) -> None:
    rng = np.random.default_rng(4)
    W, M = rng.normal(size=(G, OUT, C, *KERNEL)), moments("full")
    flat, start = W.reshape(G, OUT, K), fc.depthwise_basis(W, M)[:, :, :m]
    better = fc.refined_depthwise(W, M, start)
    before, after = (onto(flat, M, fc.by_channel(f)).error() for f in (start, better))
    assert after < 0.98 * before
    inner = fc.by_channel(better).reshape(G, C, m, C, 12)
    assert not any(inner[:, c, :, d].any() for c in range(C) for d in range(C) if c != d)
    # Stationary: no small change of the filters helps.
    for _ in range(10):
        moved = better * (1 + 0.02 * rng.normal(size=better.shape))
        assert onto(flat, M, fc.by_channel(moved)).error() > after * (1 - 1e-3)


def test_too_many_unknowns_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    W = np.random.default_rng(0).normal(size=(G, OUT, C, *KERNEL))
    start = fc.depthwise_basis(W, None)[:, :, :1]
    monkeypatch.setattr(fc, "JOINT", C * 12 - 1)
    assert fc.refined_depthwise(W, moments("full"), start) is start


@KINDS
def test_sums_of_rank_one_kernels_are_found(kind: str) -> None:
    rng = np.random.default_rng(5)
    parts = [rng.normal(size=(G, n, 2)) for n in (OUT, C, *KERNEL)]
    W = np.einsum("gor,gcr,gpr,gqr->gocpq", *parts)
    M = moments(kind)
    mixtures, filters = fc.cp_basis(W, M, 2, seed=0)
    flat = W.reshape(G, OUT, K)
    assert [f.shape for f in (mixtures, *filters)] == [(G, 2, C), (G, 2, 3), (G, 2, 4)]
    assert onto(flat, M, fc.cp_inner(mixtures, filters)).error() < 1e-6 * power(flat, M)


def test_alternating_least_squares_never_gets_worse() -> None:
    T = np.random.default_rng(6).normal(size=(6, 5, 3, 3))

    def error(rounds: int) -> float:
        a, b, c, d = fc.alternating(T, 4, rounds, 0)
        return float(np.square(T - np.einsum("ar,br,cr,dr->abcd", a, b, c, d)).sum())

    errors = [error(rounds) for rounds in (1, 2, 4, 8, 16)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))


def test_products_of_large_kernels_are_bounded() -> None:
    assert fc.cp_rounds(1000, 10) == fc.CP_ROUNDS[0]
    assert fc.cp_rounds(512 * 512 * 9, 600) == 0
    assert fc.CP_ROUNDS[1] <= fc.cp_rounds(128 * 128 * 9, 100) <= fc.CP_ROUNDS[0]
