"""Order of removal and re-solved columns against brute-force least squares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.errors import TechniqueError
from featherweight.techniques import _obs

F64 = np.ndarray


def least_error(W: F64, C: F64, keep: np.ndarray, damping: float = _obs.DAMPING) -> float:
    """min over W' on `keep` of tr(dW (C + d I) dW^T), by least squares on a square root of C."""
    D = C + damping * np.trace(C) / len(C) * np.eye(len(C))
    values, vectors = np.linalg.eigh(D)
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T  # D = root^T root
    target = root @ W.T.astype(np.float64)
    if not len(keep):
        return float((target**2).sum())
    found = np.linalg.lstsq(root[:, keep], target, rcond=None)[0]
    return float(((target - root[:, keep] @ found) ** 2).sum())


def case(seed: int, k: int, out: int, rows: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k)) @ rng.standard_normal((k, k)) + 0.3
    return rng.standard_normal((out, k)).astype(np.float32), x.T @ x / rows


def greedy(weights, seconds, blocks, scales):
    """The same search by solving every candidate from scratch."""
    units = len(blocks[0])
    gone: list[int] = []
    errors = []
    while len(gone) < units:
        best = None
        for u in sorted(set(range(units)) - set(gone)):
            found = []
            for W, C, own in zip(weights, seconds, blocks, strict=True):
                lost = np.concatenate([np.asarray(own[v], int) for v in [*gone, u]])
                found.append(least_error(W, C, np.setdiff1d(np.arange(W.shape[1]), lost)))
            value = float(np.dot(scales, found))
            if best is None or value < best[0] * (1 - 1e-9):
                best = (value, u, found)
        assert best is not None
        gone.append(best[1])
        errors.append(best[2])
    return np.array(gone), np.array(errors)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 5), st.integers(1, 7))
def test_one_consumer_is_as_brute_force(seed: int, width: int, units: int, out: int) -> None:
    W, C = case(seed, width * units, out)
    columns = np.random.default_rng(seed).permutation(width * units)
    blocks = [[columns[u * width : (u + 1) * width] for u in range(units)]]
    order, errors = _obs.removal_order([W], [C], blocks, [1.0])
    wanted_order, wanted = greedy([W], [C], blocks, [1.0])
    np.testing.assert_array_equal(order, wanted_order)
    np.testing.assert_allclose(errors, wanted, rtol=1e-7, atol=1e-12)


def test_several_consumers_with_ragged_and_empty_blocks_are_as_brute_force() -> None:
    (W0, C0), (W1, C1) = case(1, 6, 4), case(2, 9, 20)
    # The second consumer keeps column 8 for ever, and does not read unit 2 at all.
    blocks = [
        [np.array([u]) for u in (5, 3, 1, 0, 2, 4)],
        [np.array(b, int) for b in ([0, 1], [2], [], [3, 4, 5], [7], [6])],
    ]
    scales = [0.5, 2.0]
    order, errors = _obs.removal_order([W0, W1], [C0, C1], blocks, scales)
    wanted_order, wanted = greedy([W0, W1], [C0, C1], blocks, scales)
    np.testing.assert_array_equal(order, wanted_order)
    np.testing.assert_allclose(errors, wanted, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("width", [1, 4])
def test_long_runs_stay_exact(width: int) -> None:
    """Past several runs and fresh inversions, errors equal those of one direct solution."""
    W, C = case(3, 240, 30, rows=400)
    blocks = [[np.arange(u * width, (u + 1) * width) for u in range(240 // width)]]
    order, errors = _obs.removal_order([W], [C], blocks, [1.0])
    assert sorted(order) == list(range(240 // width))
    for n in (0, 70 // width, 130 // width, 200 // width, 240 // width - 1):
        lost = np.concatenate([blocks[0][u] for u in order[: n + 1]])
        wanted = least_error(W, C, np.setdiff1d(np.arange(240), lost))
        assert errors[n, 0] == pytest.approx(wanted, rel=1e-6)
    assert errors[-1, 0] == pytest.approx(np.einsum("ok,kl,ol->", W, C, W, dtype=float), rel=1e-4)
    assert (np.diff(errors[:, 0]) >= 0).all()


def test_what_is_dead_or_double_goes_first_for_nothing() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((500, 6))
    x[:, 2] = 0
    x[:, 4] = -2 * x[:, 1]
    W = rng.standard_normal((5, 6)).astype(np.float32)
    order, errors = _obs.removal_order([W], [x.T @ x / 500], [[np.array([u]) for u in range(6)]], [1.0])
    assert 2 in order[:2]
    assert set(order[:2]) - {2} <= {1, 4}
    signal = errors[-1, 0]
    assert errors[1, 0] < 1e-4 * signal < errors[2, 0]


def test_an_input_of_zeros_costs_nothing() -> None:
    W = np.ones((3, 4), np.float32)
    order, errors = _obs.removal_order([W], [np.zeros((4, 4))], [[np.array([u]) for u in range(4)]], [1.0])
    np.testing.assert_array_equal(order, [0, 1, 2, 3])
    assert not errors.any()


def test_resolved_columns_are_the_best_there_are() -> None:
    W, C = case(7, 8, 5)
    keep = np.array([1, 2, 5, 7])
    found = _obs.resolved(W, C, keep)
    assert found.shape == (5, 4)
    assert found.dtype == np.float32
    change = W.astype(float)
    change[:, keep] -= found
    assert np.einsum("ok,kl,ol->", change, C, change) == pytest.approx(least_error(W, C, keep), rel=1e-4)
    # No other matrix on these columns does better.
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = change.copy()
        other[:, keep] += 0.05 * rng.standard_normal((5, 4))
        assert np.einsum("ok,kl,ol->", other, C, other) >= least_error(W, C, keep) * (1 - 1e-6)
    np.testing.assert_array_equal(_obs.resolved(W, C, np.arange(8)), W)
    assert _obs.resolved(W, C, np.arange(0)).shape == (5, 0)


def test_what_does_not_fit_is_refused() -> None:
    W, C = case(9, 3, 2)
    one = [[np.array([0]), np.array([1])]]
    bad = {
        "as many": ([W], [C], one, [1.0, 2.0]),
        r"\(k, k\), but got \(2, 3\)": ([W], [C[:2, :2]], one, [1.0]),
        "0..2, but the units name 0..3": ([W], [C], [[np.array([0]), np.array([3])]], [1.0]),
        "one unit at most": ([W], [C], [[np.array([0]), np.array([0])]], [1.0]),
        "same units": ([W, W], [C, C], [one[0], one[0][:1]], [1.0, 1.0]),
        "finite": ([W * np.nan], [C], one, [1.0]),
    }
    for text, arguments in bad.items():
        with pytest.raises(TechniqueError, match=text):
            _obs.removal_order(*arguments)


def test_greedy_is_near_the_best_subset() -> None:
    """On small problems the greedy pair is rarely far from the best of all pairs."""
    worse = []
    for seed in range(10):
        W, C = case(seed, 6, 4)
        _, errors = _obs.removal_order([W], [C], [[np.array([u]) for u in range(6)]], [1.0])
        best = min(least_error(W, C, np.setdiff1d(np.arange(6), pair)) for pair in itertools.combinations(range(6), 2))
        worse.append(errors[1, 0] / best)
    assert min(worse) >= 1 - 1e-6
    assert np.median(worse) < 1.5
