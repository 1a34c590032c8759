"""Vector quantization against brute force and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from featherweight.techniques import _vectors as v


def cost(points, weights, book) -> float:
    d = ((points[:, None, :] - book[None]) ** 2).sum(axis=2)
    return float((weights * d.min(axis=1)).sum())


def test_two_clusters_of_few_points_are_the_best_of_all_splits() -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(0, 0.3, (5, 2)), rng.normal(3, 0.3, (4, 2))]).astype(np.float32)
    weights = rng.uniform(0.5, 2, 9)
    best = np.inf
    for mask in itertools.product([False, True], repeat=9):
        m = np.array(mask)
        if m.any() and not m.all():
            book = np.stack([np.average(points[s], axis=0, weights=weights[s]) for s in (m, ~m)])
            best = min(best, cost(points, weights, book))
    assert cost(points, weights, v.kmeans(points, weights, 2)) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(("levels", "distortion"), [(2, 0.3634), (4, 0.1175), (8, 0.03454)])
def test_scalar_levels_reach_lloyd_and_maxs_for_a_gaussian(levels: int, distortion: float) -> None:
    # Max 1960, "Quantizing for minimum distortion", table 1.
    values = np.random.default_rng(1).standard_normal((200_000, 1)).astype(np.float32)
    weights = np.ones(len(values))
    book = v.kmeans(values, weights, levels)
    assert cost(values[:, :1], weights, book) / len(values) == pytest.approx(distortion, rel=0.02)


def test_two_columns_are_better_together_than_apart() -> None:
    x = np.random.default_rng(2).standard_normal((4000, 2)).astype(np.float32)
    w = np.ones(len(x))
    error = {
        width: cost(x, w, np.array([[a, b] for a in book[0] for b in book[-1]]) if width == 1 else book[0])
        for width, bits in ((1, 3), (2, 6))
        for book in [
            [b.ravel() if width == 1 else b for b in v.fit_product(x, w, width=width, bits=bits).astype(np.float32)]
        ]
    }
    assert error[2] < error[1]


def test_codes_name_the_nearest_vectors_and_decode_to_them() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((500, 12)).astype(np.float32)
    for width, bits, stages in ((4, 5, 1), (4, 4, 2), (1, 3, 1), (12, 6, 3)):
        book = v.fit_product(x, np.ones(500), width=width, bits=bits, stages=stages, seed=1)
        codes = v.encode_product(x, book, stages=stages)
        groups = 12 // width
        assert book.shape == (stages * groups, 2**bits, width)
        assert codes.shape == (500, stages * groups)
        left = x.reshape(500, groups, width).astype(np.float64)
        for j in range(stages * groups):
            d = ((left[:, j % groups, None] - book[j].astype(np.float64)) ** 2).sum(axis=2)
            chosen = d[np.arange(500), codes[:, j]]
            assert (chosen <= d.min(axis=1) + 1e-4).all()
            left[:, j % groups] -= book[j][codes[:, j]]
        decoded = v.decode_product(codes, book, stages=stages)
        np.testing.assert_allclose(x - decoded, left.reshape(500, 12), atol=1e-5)


def test_more_stages_leave_less() -> None:
    x = np.random.default_rng(4).standard_normal((2000, 8)).astype(np.float32)
    errors = []
    for stages in (1, 2, 3):
        book = v.fit_product(x, np.ones(2000), width=8, bits=4, stages=stages)
        errors.append(
            float(((x - v.decode_product(v.encode_product(x, book, stages=stages), book, stages=stages)) ** 2).mean())
        )
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(("rows", "width"), [(1, 4), (2, 4), (3, 1), (200, 2)])
def test_tables_smaller_than_the_codebook_are_kept_exactly(rows: int, width: int) -> None:
    x = np.random.default_rng(5).integers(-3, 4, (rows, 4)).astype(np.float32)
    book = v.fit_product(x, np.ones(rows), width=width, bits=8)
    np.testing.assert_array_equal(v.decode_product(v.encode_product(x, book), book), x)


def test_equal_rows_zero_weights_and_zero_rows_do_no_harm() -> None:
    x = np.zeros((50, 4), np.float32)
    assert v.kmeans(x, np.ones(50), 16).tolist() == [[0, 0, 0, 0]]
    assert v.kmeans(x, np.zeros(50), 16).tolist() == [[0, 0, 0, 0]]
    x[0] = 1
    weights = np.ones(50)
    weights[0] = 0
    assert v.kmeans(x, weights, 1).tolist() == [[0, 0, 0, 0]]
    many = np.repeat(np.eye(4, dtype=np.float32), 200, axis=0)
    book = v.kmeans(many, np.ones(800), 16)
    assert cost(many, np.ones(800), book) == 0


def test_weights_draw_centroids() -> None:
    x = np.array([[0.0, 0], [1, 0], [10, 0], [11, 0]], np.float32)
    book = v.kmeans(np.repeat(x, 40, axis=0), np.repeat([1, 3, 1, 1], 40).astype(float), 2)
    np.testing.assert_allclose(sorted(book[:, 0].tolist()), [0.75, 10.5], atol=1e-6)
