"""Gains: closed forms against sampled inputs, and a network whose gains are known."""

from __future__ import annotations

import numpy as np
import pytest

from featherweight.search.probe import gains, output_noise, perturbed, relative_noise


def test_relative_noise_is_what_samples_show():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5)
    w = rng.normal(size=(1, 3, 5)).astype(np.float32)
    changed = (w + 0.1 * rng.normal(size=w.shape)).astype(np.float32)
    y, z = x @ w[0].T, x @ changed[0].T
    shown = ((z - y) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum()
    second = (x.T @ x / len(x))[None]
    assert relative_noise(w, changed, second, x.mean(axis=0)[None]) == pytest.approx(shown, rel=1e-5)


def test_perturbation_leaves_the_mean_output_alone():
    rng = np.random.default_rng(1)
    w = rng.normal(size=(2, 4, 9)).astype(np.float32)
    mean = rng.normal(size=(2, 9))
    moved = perturbed(w, mean)
    assert not np.array_equal(moved, w)
    assert np.einsum("gok,gk->go", moved - w, mean) == pytest.approx(np.zeros((2, 4)), abs=1e-5)


def test_all_zero_channels_stay_zero():
    w = np.zeros((1, 2, 4), np.float32)
    w[0, 1] = 1.3
    assert np.array_equal(perturbed(w)[0, 0], np.zeros(4))


def test_output_noise_by_hand():
    y = np.array([[1.0, 3.0]])  # spread around 2: 1 + 1
    assert output_noise({"y": y}, {"y": y + np.array([[0.1, 0.3]])}) == pytest.approx(0.1 / 2)
    assert output_noise({"y": y}, {"y": y * np.nan}) == np.inf
    assert output_noise({"ids": np.array([1, 2])}, {"ids": np.array([3, 4])}) == 0.0


def test_minus_infinity_in_the_reference_is_no_noise():
    y = np.array([-np.inf, 1.0, 2.0])
    assert output_noise({"y": y}, {"y": y.copy()}) == 0.0


def test_sites_that_were_not_probed_get_the_median_gain():
    found = gains({"a": 0.2, "b": 0.4, "c": 0.6}, {"a": 0.1, "b": 0.1, "c": 0.1, "d": 0.1, "e": 0.0})
    assert found == pytest.approx({"a": 2.0, "b": 4.0, "c": 6.0, "d": 4.0, "e": 4.0})
