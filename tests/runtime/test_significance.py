"""Intervals and tests against brute force, scipy and hand-worked values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from featherweight.core import Interval
from featherweight.errors import DataError
from featherweight.runtime import metrics
from featherweight.runtime.significance import (
    Drop,
    agresti_min,
    drop_interval,
    likely,
    likely_correlation,
    mcnemar,
    samples_needed,
    wilson,
)


def test_mcnemar_by_hand():
    base = np.array([1, 1, 1, 1, 1, 0, 1, 0.0])
    cand = np.array([0, 0, 0, 0, 0, 1, 1, 0.0])
    gained, lost, p = mcnemar(base, cand)
    assert (gained, lost) == (1, 5)
    assert p == pytest.approx(2 * (1 + 6) / 2**6)
    assert mcnemar(base, base) == (0, 0, 1.0)


def test_wilson_agrees_with_scipy():
    for k, n in [(0, 10), (3, 10), (500, 500), (17, 400)]:
        want = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((want.low, want.high), abs=1e-12)


def test_agresti_min_by_hand():
    # b = 5.5, c = 1.5, N = 102: (4/102) -+ 1.959964 * sqrt(7 - 16/102) / 102
    half = 1.959963985 * math.sqrt(7 - 16 / 102) / 102
    assert agresti_min(1, 5, 100) == pytest.approx((4 / 102 - half, 4 / 102 + half), abs=1e-9)


def test_agresti_min_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    n, lose, gain = 200, 0.03, 0.02
    draws = rng.multinomial(n, [lose, gain, 1 - lose - gain], size=2000)
    hits = [low <= lose - gain <= high for low, high in (agresti_min(int(g), int(b), n) for b, g, _ in draws)]
    assert 0.93 <= np.mean(hits) <= 0.99


def test_no_changed_sample_is_not_certainty():
    same = np.ones(500)
    drop = drop_interval(metrics.get("accuracy"), same, same)
    assert drop.value == 0
    assert drop.method == "agresti-min"
    assert drop.p_value == 1.0
    assert drop.interval.low < -0.002
    assert drop.interval.high > 0.002


def test_agreement_needs_no_baseline():
    cand = np.array([1.0] * 98 + [0.0] * 2)
    drop = drop_interval(metrics.get("agreement"), None, cand)
    assert drop.value == pytest.approx(0.02)
    assert drop.method == "wilson"
    assert (drop.interval.low, drop.interval.high) == pytest.approx(wilson(2, 100))
    with pytest.raises(DataError, match="accuracy needs the original's values too"):
        drop_interval(metrics.get("accuracy"), None, cand)


def test_bootstrap_agrees_with_all_possible_resamples():
    base = np.array([0.91, 0.83, 0.72, 0.95, 0.64, 0.77])
    cand = np.array([0.52, 0.86, 0.61, 0.93, 0.57, 0.83])
    metric = metrics.get("child_functions:hits")  # higher is better, mean
    drop = drop_interval(metric, base, cand, resamples=40_000, level=0.9)
    means = sorted(np.mean((base - cand)[list(rows)]) for rows in itertools.product(range(6), repeat=6))
    want = np.quantile(means, [0.05, 0.95], method="nearest")
    assert drop.method == "bootstrap"
    assert drop.value == pytest.approx(0.5 / 6)
    assert (drop.interval.low, drop.interval.high) == pytest.approx(tuple(want), abs=2e-3)


def test_bootstrap_agrees_with_scipy_on_means():
    rng = np.random.default_rng(1)
    base = rng.random(300)
    cand = base - 0.02 + 0.05 * rng.standard_normal(300)
    drop = drop_interval(metrics.get("child_functions:hits"), base, cand, resamples=4000)
    want = scipy.stats.bootstrap((base - cand,), np.mean, n_resamples=4000, method="percentile", rng=2)
    ci = want.confidence_interval
    assert (drop.interval.low, drop.interval.high) == pytest.approx((ci.low, ci.high), abs=4e-4)


def test_bootstrap_of_spearman_equals_a_plain_loop():
    rng = np.random.default_rng(3)
    gold = rng.integers(0, 6, 60).astype(float)
    base = gold + rng.standard_normal(60)
    cand = gold + 1.5 * rng.standard_normal(60)
    drop = drop_interval(metrics.get("spearman"), base, cand, gold, resamples=300, seed=5)
    rows = np.random.default_rng(5).integers(0, 60, (300, 60))
    rho = lambda x, r: scipy.stats.spearmanr(x[r], gold[r]).statistic  # noqa: E731
    want = np.quantile([rho(base, r) - rho(cand, r) for r in rows], [0.025, 0.975], method="nearest")
    assert (drop.interval.low, drop.interval.high) == pytest.approx(tuple(want))
    assert drop == drop_interval(metrics.get("spearman"), base, cand, gold, resamples=300, seed=5)
    assert drop != drop_interval(metrics.get("spearman"), base, cand, gold, resamples=300, seed=6)


def test_bootstrap_of_sqnr_and_cosine_holds_the_value():
    rng = np.random.default_rng(4)
    ref = {"y": rng.standard_normal((50, 8)), "z": rng.standard_normal((50, 4))}
    out = {k: v + 0.1 * rng.standard_normal(v.shape) for k, v in ref.items()}
    for name in ("sqnr", "cosine", "kl"):
        metric = metrics.get(name, output="y" if name == "kl" else None)
        each = metric.per_sample(out, ref)
        drop = drop_interval(metric, None, each, resamples=500)
        assert drop.method == "bootstrap"
        assert 0 < drop.interval.low <= drop.value <= drop.interval.high
        assert drop.value == pytest.approx(metric.drop(metric.perfect, metric.aggregate(each)))


def test_one_number_metrics_have_no_interval():
    drop = drop_interval(metrics.get("child_functions:hit_rate"), None, None, values=(0.9, 0.8))
    assert drop.value == pytest.approx(0.1)
    assert drop.interval is None
    assert drop.verdict(0.5) == "undecided"
    assert samples_needed(drop, 0.5) is None


def test_unpaired_values_are_refused():
    with pytest.raises(DataError, match=r"of the same samples, but got \(3,\) and \(4,\)"):
        drop_interval(metrics.get("accuracy"), np.ones(3), np.ones(4))


def test_verdicts():
    drop = Drop(0.01, Interval(-0.01, 0.03), "x", n_samples=100)
    assert drop.verdict(0.03) == "within"
    assert drop.verdict(0.02) == "undecided"
    assert drop.verdict(-0.02) == "beyond"


def test_samples_needed_by_hand():
    drop = Drop(0.01, Interval(-0.01, 0.03), "x", n_samples=100)
    assert samples_needed(drop, 0.02) == 400  # half the reach: four times the samples
    assert samples_needed(drop, 0.0) == 400  # from the other side
    assert samples_needed(drop, 0.05) == 100  # decided already
    assert samples_needed(drop, 0.01) is None  # exactly at the limit


def test_samples_needed_is_about_right():
    """With that many samples of the same kind the interval decides in most tries."""
    rng = np.random.default_rng(0)
    base = np.ones(300)
    base[:30] = 0
    cand = base.copy()
    cand[100:103] = 0  # a drop of 0.01
    metric, limit = metrics.get("accuracy"), 0.02
    need = samples_needed(drop_interval(metric, base, cand), limit)
    assert 300 < need < 5000
    decided = 0
    for _ in range(50):
        rows = rng.integers(0, 300, need)
        decided += drop_interval(metric, base[rows], cand[rows]).verdict(limit) == "within"
    assert decided >= 20


def scored(n: int, lost: int, gained: int) -> Drop:
    base = np.array([1.0] * (n - gained) + [0.0] * gained)
    candidate = np.array([0.0] * lost + [1.0] * (n - lost))
    return drop_interval(metrics.get("accuracy"), base, candidate, np.zeros(n, int))


def test_the_likely_drop_weighs_the_measured_one_against_changed_answers_by_hand():
    drop = scored(100, 3, 2)
    assert drop.value == pytest.approx(0.01)
    # Variances: measured 6 / 100^2, of the prior (0.2 * 0.1)^2 + 0.4^2 * 0.1 * 0.9 / 100; its mean 0.4 * 0.1.
    assert likely(drop, 0.1) == pytest.approx((0.01 / 6e-4 + 0.04 / 5.44e-4) / (1 / 6e-4 + 1 / 5.44e-4))


def test_a_gain_by_compression_counts_as_luck():
    # Measured 0, variance 4 / 100^2; the prior's mean 0.4 * 0.05, variance 0.01^2 + 0.16 * 0.05 * 0.95 / 100.
    assert likely(scored(100, 0, 3), 0.05) == pytest.approx((0.02 / 1.76e-4) / (1 / 4e-4 + 1 / 1.76e-4))


def test_nothing_changed_is_no_drop_and_other_metrics_have_no_likely_one():
    assert likely(scored(100, 0, 0), 0.0) == 0
    assert likely(scored(100, 3, 2), None) is None
    agreement = drop_interval(metrics.get("agreement"), None, np.array([1.0, 0.0, 1.0]), None)
    assert likely(agreement, 0.3) is None


def test_with_many_samples_the_likely_drop_is_the_measured_one():
    assert likely(scored(200_000, 4000, 0), 0.02) == pytest.approx(0.02, abs=5e-4)
    assert likely(scored(200, 12, 12), 0.2) > 0.02


def test_as_many_answers_changed_as_scores():
    assert likely(scored(100, 50, 0), 0.0) == likely(scored(100, 50, 0), 0.5) > 0.3


def correlated(n: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gold scores, an original's scores, and those with noise of so much of their spread."""
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=n)
    before = gold + rng.normal(size=n) * 0.6
    return gold, before, before + rng.normal(size=n) * noise * before.std()


def test_the_likely_drop_of_a_correlation_weighs_both_by_hand():
    drop = Drop(0.01, Interval(-0.0096, 0.0296, 0.95), "bootstrap", n_samples=300)  # a standard error of .01
    before = np.arange(5.0)
    after = np.array([1.0, 0.0, 2.0, 3.0, 4.0])  # two neighbours changed places: 1 - 6 * 2 / (5 * 24) = 0.9
    fall = 0.8 * 0.1
    found = likely_correlation(drop, 0.8, before, after)
    z = 1.959964
    variance, prior = (0.0392 / (2 * z)) ** 2, (0.2 * fall) ** 2
    assert found == pytest.approx((0.01 / variance + 0.4 * fall / prior) / (1 / variance + 1 / prior), rel=1e-5)


@pytest.mark.parametrize("noise", [0.1, 0.2, 0.4])
def test_noise_alone_costs_a_correlation_what_the_models_do_not_share(noise):
    """With many samples the whole fall is measured, and the likely drop lies between it and the prior's share."""
    metric = metrics.get("spearman")
    gold, before, after = correlated(20_000, noise)
    drop = drop_interval(metric, before, after, gold, resamples=100)
    value = metric.aggregate(before, gold)
    fall = value * (1 - metric.aggregate(after, before))
    assert drop.value == pytest.approx(fall, rel=0.1)
    assert 0.4 * fall < likely_correlation(drop, value, before, after) <= drop.value * 1.0001


def test_a_lucky_gain_of_a_correlation_hides_nothing():
    _, before, after = correlated(60, 0.3, seed=3)
    drop = Drop(-0.02, Interval(-0.06, 0.02, 0.95), "bootstrap", n_samples=60)
    assert likely_correlation(drop, 0.8, before, after) > 0.005
    assert likely_correlation(drop, 0.8, before, before) == pytest.approx(0.0, abs=1e-9)


def test_where_nothing_tells_there_is_no_likely_drop():
    drop = Drop(0.8, Interval(0.7, 0.9, 0.95), "bootstrap", n_samples=4)
    z = 1.959964
    both = (0.8 / (0.1 / z) ** 2 + 0.32 / 0.16**2) / (1 / (0.1 / z) ** 2 + 1 / 0.16**2)  # all is lost: the fall is 0.8
    assert likely_correlation(drop, 0.8, np.arange(4.0), np.zeros(4)) == pytest.approx(both, rel=1e-5)
    assert likely_correlation(Drop(0.3, None, "one number, no interval"), 0.8, np.arange(4.0), np.arange(4.0)) is None
    assert likely_correlation(drop, -0.1, np.arange(4.0), np.arange(4.0)) is None
