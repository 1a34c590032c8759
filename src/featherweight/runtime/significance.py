"""Is the drop within the limit, beyond chance? Paired intervals and tests on per-sample values.

Both models saw the same samples, so differences are taken sample by sample: this sees drops many times smaller than
comparing two accuracies would.
- 0/1 scores against labels: Agresti and Min's adjusted interval for paired proportions (Biometrics 2005), and the exact
  McNemar test. A bootstrap of "no sample changed" would claim certainty; this does not.
- 0/1 agreement with the original: Wilson's score interval.
- anything else: percentile bootstrap over samples, seeded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from featherweight.core import Interval
from featherweight.errors import DataError
from featherweight.runtime import scores
from featherweight.runtime.metrics import Metric
from featherweight.runtime.outputs import Array
from featherweight.runtime.scores import Float

if TYPE_CHECKING:
    from featherweight.runtime.evaluate import Evaluation

Verdict = Literal["within", "beyond", "undecided"]
#: Share of the changed answers by which accuracy falls: .28 to .55 for EfficientNet-Lite0 and MobileNetV2 compressed so
#: that they lose up to 8 points on photos; more where more is lost. Of the fall of a correlation that noise would bring
#: it is .23 to .53 for MiniLM where it lost .004 to .03 (docs/decisions.md).
LOST_PER_CHANGE, LOST_SPREAD = 0.4, 0.2
_CELLS = 200_000  # values gathered at once by the bootstrap: what fits a cache is five times faster than all at once


@dataclass(frozen=True, slots=True)
class Drop:
    """How much worse the candidate is (`value` > 0: worse), with its interval and how it was found.

    `p_value` is McNemar's exact one where scores are 0/1 against labels, else None; `gained` and `lost` count the
    samples that only the candidate, or only the original, has right. `interval` is None for one-number metrics.
    """

    value: float
    interval: Interval | None
    method: str
    p_value: float | None = None
    gained: int = 0
    lost: int = 0
    n_samples: int = 0

    def verdict(self, limit: float) -> Verdict:
        """Whether the interval lies within `limit`, beyond it, or across it."""
        if self.interval is None:
            return "undecided"
        if self.interval.high <= limit:
            return "within"
        return "beyond" if self.interval.low > limit else "undecided"


def drop_interval(
    metric: Metric,
    baseline: Float | None,
    candidate: Float | None,
    labels: Array | None = None,
    *,
    values: tuple[float, float] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Drop:
    """The paired drop of `metric` from `baseline` to `candidate`, per-sample values (n, ...) of the same samples.

    Args:
        metric: how per-sample values make one number.
        baseline: the original's; None for a metric of agreement (it is perfect against itself).
        candidate: the compressed model's; None, with `values`, for a metric that is one number over all.
        labels: (n, ...), where the aggregate needs them.
        values: (baseline, candidate) aggregates of a one-number metric.
        level: of the two-sided interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: the two are not of the same samples.
    """
    if not 0.5 <= level < 1:
        raise DataError(f"level must be in 0.5..1, but got {level}")
    if candidate is None:
        if values is None:
            raise DataError("a drop needs per-sample values or the two aggregates, but got neither")
        return Drop(metric.drop(*values), None, "one number, no interval")
    n = len(candidate)
    if n == 0 or (baseline is not None and baseline.shape != candidate.shape):
        shape = None if baseline is None else baseline.shape
        raise DataError(f"paired values must be of the same samples, but got {shape} and {candidate.shape}")
    if baseline is None and metric.perfect is None:
        raise DataError(f"the metric {metric.name} needs the original's values too, but got none")
    start = metric.perfect if baseline is None else metric.aggregate(baseline, labels)
    assert start is not None
    value = metric.drop(start, metric.aggregate(candidate, labels))
    if _binary(candidate) and (baseline is None or _binary(baseline)):
        return _binary_drop(baseline, candidate, value, metric.higher_is_better, level)
    low, high = _bootstrap(metric, baseline, candidate, labels, level, resamples, seed)
    return Drop(value, Interval(min(low, value), max(high, value), level), "bootstrap", n_samples=n)


def paired(metric: Metric, before: Evaluation, after: Evaluation, *, seed: int = 0) -> Drop:
    """The drop between two evaluations of the same data: `before` is the original's."""
    return drop_interval(
        metric,
        None if metric.perfect is not None else before.per_sample,
        after.per_sample,
        after.labels,
        values=(before.value, after.value) if after.per_sample is None else None,
        seed=seed,
    )


def likely(drop: Drop, changed: float | None) -> float | None:
    """The drop to expect on other data: as measured, and as the changed answers tell; None where nothing tells.

    That `LOST_PER_CHANGE` of the changed answers are lost is the prior, known to within `LOST_SPREAD`; the measured
    drop is weighed against it by variances. So few samples that happen to break even do not hide that many answers
    changed, and with many samples it is the measured drop. A gain counts as no drop: compression by itself brings none.
    """
    n = drop.n_samples
    if changed is None or drop.method != "agresti-min" or not n:
        return None
    changed = max(changed, (drop.gained + drop.lost) / n)
    measured = (drop.gained + drop.lost + 1) / n**2
    prior = (LOST_SPREAD * changed) ** 2 + LOST_PER_CHANGE**2 * changed * (1 - changed) / n
    return _weighed(drop.value, measured, LOST_PER_CHANGE * changed, prior)


def likely_correlation(drop: Drop, value: float, before: Float, after: Float) -> float | None:
    """`likely` of a rank correlation with gold scores: `value` of the original, and both models' scores (n,).

    Were what compression changes in the scores pure noise, the correlation would fall by `value` times what the two
    models' scores lack of agreeing (attenuation; Spearman 1904). Part of what is lost was noise before: about
    `LOST_PER_CHANGE` of that fall is found on other data.
    """
    if drop.interval is None or not value > 0:
        return None
    fall = value * (1 - float(scores.spearman(after[None], before[None])[0]))
    if not math.isfinite(fall):
        return None
    error = (drop.interval.high - drop.interval.low) / (2 * _z(drop.interval.level))
    return _weighed(drop.value, error**2, LOST_PER_CHANGE * fall, (LOST_SPREAD * fall) ** 2)


def _weighed(measured: float, variance: float, prior: float, prior_variance: float) -> float:
    """The mean of a measured drop (none where it is a gain) and of what is known without it, by their variances."""
    if variance == 0 or prior_variance == 0:
        return max(measured, 0.0) if variance == 0 else prior
    return (max(measured, 0.0) / variance + prior / prior_variance) / (1 / variance + 1 / prior_variance)


def mcnemar(baseline: Float, candidate: Float) -> tuple[int, int, float]:
    """Exact two-sided McNemar test of 0/1 scores (n,): (gained, lost, p). p is 1 if nothing changed."""
    gained = int(((candidate == 1) & (baseline == 0)).sum())
    lost = int(((candidate == 0) & (baseline == 1)).sum())
    if gained + lost == 0:
        return 0, 0, 1.0
    return gained, lost, _two_sided(min(gained, lost), gained + lost)


def _two_sided(k: int, n: int) -> float:
    """P(as uneven as k of n or worse) when both sides are equally likely: exact, in whole numbers."""
    if 2 * k == n:
        return 1.0
    term, total = 1, 0
    for i in range(k + 1):
        total += term
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * total / (1 << n))


def agresti_min(gained: int, lost: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of the paired drop (lost - gained) / n, half a sample added to each cell of the 2 x 2 table."""
    b, c, total = lost + 0.5, gained + 0.5, n + 2
    middle = (b - c) / total
    half = _z(level) * math.sqrt(max(0.0, (b + c) - (b - c) ** 2 / total)) / total
    return middle - half, middle + half


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927)."""
    z = _z(level)
    p, denominator = successes / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / denominator
    half = z / denominator * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def samples_needed(drop: Drop, limit: float) -> int | None:
    """About how many samples in all would decide whether the drop is within `limit`, were it as seen so far.

    The interval's side that faces the limit shrinks with the square root of the samples. `n_samples` if it is decided
    already; None if no number would do (the drop is at the limit) or nothing is known about its spread.
    """
    if drop.interval is None or drop.n_samples == 0:
        return None
    if drop.verdict(limit) != "undecided":
        return drop.n_samples
    gap = limit - drop.value
    reach = drop.interval.high - drop.value if gap > 0 else drop.value - drop.interval.low
    # The drop is at the limit to within a thousandth of its spread: no number that could be gathered would tell.
    if not math.isfinite(reach) or abs(gap) < 1e-3 * reach:
        return None
    return max(drop.n_samples + 1, math.ceil(drop.n_samples * (reach / gap) ** 2))


def _binary(values: Float) -> bool:
    return values.ndim == 1 and bool(np.isin(values, (0.0, 1.0)).all())


def _binary_drop(baseline: Float | None, candidate: Float, value: float, higher: bool, level: float) -> Drop:
    n = len(candidate)
    if baseline is None:
        wrong = int((candidate == 0).sum()) if higher else int((candidate == 1).sum())
        low, high = wilson(wrong, n, level)
        return Drop(value, Interval(low, high, level), "wilson", None, 0, wrong, n)
    if not higher:
        baseline, candidate = 1 - baseline, 1 - candidate
    gained, lost, p = mcnemar(baseline, candidate)
    low, high = agresti_min(gained, lost, n, level)
    return Drop(value, Interval(min(low, value), max(high, value), level), "agresti-min", p, gained, lost, n)


def _bootstrap(
    metric: Metric,
    baseline: Float | None,
    candidate: Float,
    labels: Array | None,
    level: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Percentiles of the drop over samples drawn with replacement, the same ones for both models."""
    n = len(candidate)
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // max(1, candidate.size))
    drops: list[float] = []
    for start in range(0, resamples, step):
        rows = rng.integers(0, n, size=(min(step, resamples - start), n))
        after = metric.aggregate_many(candidate, labels, rows)
        if baseline is None:
            assert metric.perfect is not None
            before = np.full(len(rows), metric.perfect)
        else:
            before = metric.aggregate_many(baseline, labels, rows)
        drops.extend(metric.drop(float(b), float(a)) for b, a in zip(before, after, strict=True))
    values = np.asarray(drops)
    values = np.where(np.isnan(values), np.inf, values)  # infinite against infinite: as bad as can be
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail], method="nearest")
    return float(low), float(high)


def _z(level: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(0.5 + level / 2)
