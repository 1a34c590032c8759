"""From a profile to the time of one kernel: measured kernels of its kind where there are any, else the roofline.

*Measured*: a kind with several sizes is a sum of what it does (multiply-accumulates, elements read and written, weights
read, one start), each at a cost that is never negative and fits the measured times best in proportion (non-negative
least squares: Lawson and Hanson 1974), corrected by what is left over at measured points near by. A kind with one size
is read off the measured points, straight between neighbours.
*Roofline* (Williams et al. 2009): max(macs / rate, bytes / bandwidth).
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from featherweight.device import Profile
from featherweight.edge.work import DYNAMIC, FLOAT, INTEGER, NBITS, Work

# Precision whose kernels or rate stand in where a profile has none of the asked one.
_STAND_IN = {DYNAMIC: (DYNAMIC, INTEGER, FLOAT), INTEGER: (INTEGER, DYNAMIC, FLOAT), NBITS: (NBITS, FLOAT)}
_KIND_STAND_IN = {"conv_first": "conv", "conv_plain": "conv", "gru": "lstm", "conv1x1": "matmul", "attention": "matmul"}
_RATE = {DYNAMIC: INTEGER}
_MIN_POINTS = 3
NEAR, FAITH = 1.0, 0.2
CACHE_ELEMENTS = (1 << 20) // 4


@dataclass
class Estimator:
    """Times of kernels on one device, in microseconds. `block`: channels a float convolution works on at once."""

    profile: Profile
    block: int = 8
    _fits: dict[tuple[str, str], _Fit] = field(default_factory=dict)
    _lines: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        flags = self.profile.cpu_flags
        self.block = 16 if any(f.startswith("avx512") for f in flags) else 8
        groups: dict[tuple[str, str], list[tuple[tuple[int, ...], float]]] = defaultdict(list)
        for kernel in self.profile.kernels:
            groups[kernel.kind, kernel.precision].append((kernel.dims, kernel.us))
        for (kind, precision), points in groups.items():
            rule = FEATURES.get(kind)
            if rule is None:
                self._lines[kind, precision] = _rising(points)
            elif len(points) >= _MIN_POINTS:
                self._fits[kind, precision] = _Fit(kind, points, self.block)

    def us(self, work: Work) -> tuple[float, str]:
        """Microseconds of one kernel on the device's threads, and how they were found: "measured" or "roofline"."""
        for kind in (work.kind, _KIND_STAND_IN.get(work.kind, "")):
            dims = work.dims if kind == work.kind else _as(kind, work)
            for precision in _STAND_IN.get(work.precision, (work.precision, FLOAT)):
                if dims and (kind, precision) in self._fits:
                    return self._fits[kind, precision].us(dims), "measured"
                if dims and (kind, precision) in self._lines:
                    return _between(self._lines[kind, precision], dims[0]), "measured"
        return self.roofline_us(work), "roofline"

    def roofline_us(self, work: Work) -> float:
        """max(macs / rate, bytes / bandwidth); a limit the profile does not know counts as none."""
        precision = _RATE.get(work.precision, work.precision)
        rates = self.profile.rates
        rate = next((rates[p] for p in (precision, FLOAT) if rates.get(p)), math.inf)
        bandwidth = self.profile.memory_gb_per_s or math.inf
        return max(work.macs / rate, work.moved_bytes / bandwidth) / 1e3


def _as(kind: str, work: Work) -> tuple[int, ...]:
    """The dims of a job as another kind counts them; () where that kind cannot stand in."""
    if work.kind in ("conv_first", "conv_plain", "gru"):
        return work.dims
    if work.kind == "conv1x1":
        c, d, pixels = work.dims
        return (pixels, c, d)
    if work.kind == "attention" and kind == "matmul":
        batch, m, depth, n = work.dims
        return (batch * m, depth, n)
    return ()


def _over(elements: float) -> float:
    """Elements (4 bytes each) beyond what a core's own cache holds."""
    return max(elements - CACHE_ELEMENTS, 0.0)


def _up(n: int, block: int) -> int:
    return -(-n // block) * block


def _product(dims: tuple[int, ...], _: int) -> npt.NDArray[np.float64]:
    m, k, n = dims
    return np.array([1, m * k * n, m * (k + n), k * n, _over(m * (k + n))], np.float64)


def _pointwise(dims: tuple[int, ...], block: int) -> npt.NDArray[np.float64]:
    c, d, pixels = (_up(dims[0], block), _up(dims[1], block), dims[2])
    return np.array([1, c * d * pixels, (c + d) * pixels, c * d, _over((c + d) * pixels)], np.float64)


def _spatial(dims: tuple[int, ...], block: int) -> npt.NDArray[np.float64]:
    c, d, into, out, taps = dims
    c, d = (c if c <= 4 else _up(c, block)), _up(d, block)
    return np.array([1, c * d * out * taps, c * into + d * out, c * d * taps, _over(c * into + d * out)], np.float64)


def _depthwise(dims: tuple[int, ...], block: int) -> npt.NDArray[np.float64]:
    c, into, out, taps = dims
    c = _up(c, block)
    return np.array([1, c * out * taps, c * (into + out), _over(c * (into + out))], np.float64)


def _batched(dims: tuple[int, ...], _: int) -> npt.NDArray[np.float64]:
    batch, m, k, n = dims
    return batch * np.array([1, m * k * n, m * k + k * n + m * n], np.float64)


def _steps(dims: tuple[int, ...], _: int) -> npt.NDArray[np.float64]:
    steps, batch, into, hidden = dims
    weights = hidden * (into + hidden)
    return np.array([1, steps, steps * batch * weights, weights, steps * _over(4 * weights)], np.float64)


def _rows(dims: tuple[int, ...], _: int) -> npt.NDArray[np.float64]:
    rows, cols = dims
    return np.array([1, rows, rows * cols], np.float64)


FEATURES: dict[str, Callable[[tuple[int, ...], int], npt.NDArray[np.float64]]] = {
    "matmul": _product,
    "conv1x1": _pointwise,
    "conv": _spatial,
    "conv_first": _spatial,
    "conv_plain": _spatial,
    "depthwise": _depthwise,
    "attention": _batched,
    "lstm": _steps,
    "gru": _steps,
    "softmax": _rows,
    "layernorm": _rows,
    "gather": _rows,
}
"""Kinds with several sizes and what their time is a sum of; all others have one size, the elements."""


class _Fit:
    """Costs of a kind's features, >= 0, with the least squared relative error; near measured points their residuals."""

    def __init__(self, kind: str, points: list[tuple[tuple[int, ...], float]], block: int) -> None:
        from scipy.optimize import nnls

        self.rule, self.block = FEATURES[kind], block
        rows = np.array([self.rule(dims, block) / us for dims, us in points])
        scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
        scaled = rows / scale
        try:
            costs = nnls(scaled, np.ones(len(points)))[0]
        except RuntimeError:  # it went round in circles: one cost for all, in their own units
            costs = np.full(scaled.shape[1], 1 / max(scaled.sum(axis=1).mean(), 1e-300))
        self.costs = costs / scale
        self.at = np.log2([dims for dims, _ in points])
        self.residuals = np.log([max(us, 1e-3) / max(self.fitted_us(dims), 1e-3) for dims, us in points])

    def fitted_us(self, dims: tuple[int, ...]) -> float:
        """Without the residual: never falls as any size grows."""
        return float(self.rule(dims, self.block) @ self.costs)

    def us(self, dims: tuple[int, ...]) -> float:
        """Microseconds; the residual of measured points fades with distance (in doublings)."""
        distance2 = ((self.at - np.log2(dims)) ** 2).sum(axis=1)
        weights = np.exp(-distance2 / (2 * NEAR**2))
        return self.fitted_us(dims) * math.exp(float(weights @ self.residuals / (weights.sum() + FAITH)))


def _rising(points: list[tuple[tuple[int, ...], float]]) -> list[tuple[float, float]]:
    """(elements, us) by size, a larger one never faster than a smaller one."""
    line: list[tuple[float, float]] = []
    for dims, us in sorted(points):
        line.append((float(dims[0]), max(us, line[-1][1] if line else 0.0)))
    return line


def _between(line: list[tuple[float, float]], size: float) -> float:
    """Straight between measured sizes; below the first in proportion, beyond the last as the last one went."""
    sizes = [s for s, _ in line]
    i = bisect.bisect_left(sizes, size)
    if i == 0:
        return line[0][1] * min(size / line[0][0], 1.0)
    if i == len(line):
        return line[-1][1] * size / line[-1][0]
    (a, low), (b, high) = line[i - 1], line[i]
    return low + (high - low) * (size - a) / (b - a)
