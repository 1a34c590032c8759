"""Shrunk covariances: exact by hand, untouched where there is plenty, honest where there is not."""

from __future__ import annotations

import numpy as np
import pytest

from featherweight.stats.shrinkage import shrunk_moments
from featherweight.stats.statistics import MomentStats


def test_off_diagonal_covariance_shrinks_by_hand():
    mean = np.array([[1.0, 2.0]])
    second = np.array([[[5.0, 3.0], [3.0, 8.0]]])  # covariance [[4, 1], [1, 4]]
    found = shrunk_moments(MomentStats(second, mean, rows=1))  # keeps 1 - 2 / (2 + 4) = 2/3 of it
    assert found.second == pytest.approx(np.array([[[5.0, 2 + 2 / 3], [2 + 2 / 3, 8.0]]]))
    assert second[0, 0, 1] == 3.0


def test_plenty_of_rows_change_next_to_nothing():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 50, 4))
    second = x.transpose(0, 2, 1) @ x / 50
    found = shrunk_moments(MomentStats(second, x.mean(axis=1), rows=1_000_000))
    assert found.second == pytest.approx(second, rel=1e-4)


def test_few_rows_no_longer_hide_error_in_unseen_directions():
    rng = np.random.default_rng(1)
    k, n = 64, 8
    seen = rng.normal(size=(n, k))
    second = (seen.T @ seen / n)[None]
    hidden = np.linalg.svd(seen)[2][-1]  # orthogonal to all rows seen
    found = shrunk_moments(MomentStats(second, np.zeros((1, k)), rows=n)).second[0]
    assert hidden @ second[0] @ hidden == pytest.approx(0.0, abs=1e-12)
    assert hidden @ found @ hidden > 0.4  # the true value is 1


def test_a_diagonal_second_moment_stays():
    found = MomentStats(np.ones((1, 3)), np.zeros((1, 3)), rows=2)
    assert shrunk_moments(found) is found
