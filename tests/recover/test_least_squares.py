"""The arithmetic of one layer: exact where the answer is known, never worse on rows held out."""

import numpy as np
import pytest

from featherweight.recover.solve import Sums, solve


def sums(x, y, *, centred=True):
    """Sums over three quarters of the rows, and over the last quarter, of x (n, k) and y (n, o)."""
    x, y = x[None].astype(np.float32), y[None].astype(np.float32)
    cut = x.shape[1] * 3 // 4
    fit = Sums.start(x[:, :cut], y[:, :cut], centred=centred)
    held = fit.empty()
    fit.add(x[:, :cut], y[:, :cut])
    held.add(x[:, cut:], y[:, cut:])
    return fit, held


def test_an_exact_relation_is_found_with_its_bias():
    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 1.0, (400, 5))
    W, b = rng.normal(size=(3, 5)), rng.normal(size=3)
    found = solve(*sums(x, x @ W.T + b), np.zeros((1, 3, 5)), np.zeros((1, 3)), has_bias=True)
    assert np.allclose(found.matrix[0], W, atol=1e-4)
    assert np.allclose(found.bias[0], b, atol=1e-3)
    assert found.after < 1e-6 * found.before


def test_without_a_bias_the_mean_is_part_of_the_problem():
    rng = np.random.default_rng(1)
    x = rng.normal(1.0, 1.0, (400, 4))
    y = x @ rng.normal(size=(2, 4)).T + 0.3
    found = solve(*sums(x, y, centred=False), np.zeros((1, 2, 4)), np.zeros((1, 2)), has_bias=False, ridges=(1e-9,))
    # numpy's least squares without a constant, over all rows
    best = np.linalg.lstsq(x, y, rcond=None)[0].T
    assert np.allclose(found.matrix[0], best, atol=1e-3)
    assert not found.bias.any()


def test_a_direction_never_seen_keeps_its_weight():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(200, 3))
    x[:, 2] = 0.0
    old = np.array([[[5.0, 5.0, 7.0]]])
    found = solve(*sums(x, x[:, :1] * 2.0), old, np.zeros((1, 1)), has_bias=True)
    assert np.allclose(found.matrix[0, 0], [2.0, 0.0, 7.0], atol=1e-3)


def test_what_is_right_already_stays():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    W, b = rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    found = solve(*sums(x, x @ W.T + b), W[None], b[None], has_bias=True)
    assert np.allclose(found.matrix[0], W, atol=1e-4)
    assert np.allclose(found.bias[0], b, atol=1e-4)


def test_pure_noise_moves_nothing_but_the_bias():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(60, 40)), rng.normal(1.5, 1.0, (60, 2))
    found = solve(*sums(x, y), np.zeros((1, 2, 40)), np.zeros((1, 2)), has_bias=True, ridges=(1e-6,))
    assert found.ridge is None
    assert not found.matrix.any()
    assert np.allclose(found.bias[0], y.mean(axis=0), atol=1e-5)
    assert found.after < found.before


def test_only_biases_are_solved_without_ridges():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(100, 3))
    old = rng.normal(size=(1, 2, 3))
    y = x @ rng.normal(size=(2, 3)).T + 4.0
    found = solve(*sums(x, y), old, np.zeros((1, 2)), has_bias=True, ridges=())
    assert np.array_equal(found.matrix, old)
    assert np.allclose(found.bias[0], (y - x @ old[0].T).mean(axis=0), atol=1e-5)


def test_groups_are_solved_each_for_itself():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(3, 200, 9)).astype(np.float32)
    W = rng.normal(size=(3, 1, 9))
    y = np.einsum("gnk,gok->gno", x, W).astype(np.float32)
    fit = Sums.start(x, y, centred=True)
    held = fit.empty()
    fit.add(x[:, :150], y[:, :150])
    held.add(x[:, 150:], y[:, 150:])
    found = solve(fit, held, np.zeros((3, 1, 9)), np.zeros((3, 1)), has_bias=True)
    assert np.allclose(found.matrix, W, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_left_out(bad):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(200, 3))
    y = x @ np.ones((1, 3)).T
    x[5, 1], y[9, 0] = bad, bad
    fit, held = sums(x, y)
    assert fit.rows == 148
    found = solve(fit, held, np.zeros((1, 1, 3)), np.zeros((1, 1)), has_bias=True)
    assert np.allclose(found.matrix, 1.0, atol=1e-4)


def test_no_rows_change_nothing():
    fit, held = sums(np.zeros((0, 3)).reshape(0, 3), np.zeros((0, 2)))
    old = np.ones((1, 2, 3))
    found = solve(fit, held, old, np.zeros((1, 2)), has_bias=True)
    assert np.array_equal(found.matrix, old)
    assert found.ridge is None


def test_a_large_mean_does_not_drown_the_spread():
    rng = np.random.default_rng(8)
    x = 1000.0 + rng.normal(size=(400, 4))
    W = rng.normal(size=(2, 4))
    found = solve(*sums(x, (x - 1000) @ W.T), np.zeros((1, 2, 4)), np.zeros((1, 2)), has_bias=True)
    assert np.allclose(found.matrix[0], W, atol=1e-2)


def test_spread_is_kept_where_least_squares_would_fade_it():
    rng = np.random.default_rng(9)
    clean = rng.normal(size=(4000, 6))
    y = clean @ rng.normal(size=(3, 6)).T + 2.0
    x = clean + 0.7 * rng.normal(size=clean.shape)  # errors of the layers before
    now = np.zeros((1, 3, 6)), np.zeros((1, 3))
    faded = solve(*sums(x, y), *now, has_bias=True)
    found = solve(*sums(x, y), *now, has_bias=True, spread=True)
    answers = [x @ s.matrix[0].T + s.bias[0] for s in (faded, found)]
    assert (answers[0].std(axis=0) < 0.9 * y.std(axis=0)).all()
    assert np.allclose(answers[1].std(axis=0), y.std(axis=0), rtol=1e-3)
    assert np.allclose(answers[1].mean(axis=0), y.mean(axis=0), atol=1e-3)
