"""Noise of an integer layer in closed form: weight part tr(dW C dW^T), input and output rounding.

The weight part needs no rounding: error-compensated rounding leaves about s^2 / 12 times the sum of the pivots of C,
C = (I + U) D (I + U)^T (what is left of each input once the later ones are known), for each row of step s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from featherweight.techniques import _kernels, _ranges, _units
from featherweight.techniques._gptq import damped
from featherweight.techniques._protocol import Context, Estimate

if TYPE_CHECKING:
    from featherweight.graph.weights import Weight

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
#: Best step over the covering one for Gaussian rows, and the factor that clipping then adds to s^2 / 12.
STEP = {8: 1.0, 7: 0.97, 6: 0.92, 5: 0.85, 4: 0.75, 3: 0.65, 2: 0.55}
CLIPPED = {8: 1.0, 7: 1.0, 6: 1.05, 5: 1.1, 4: 1.2, 3: 1.5, 2: 2.0}


def pivots(second: F64) -> F64:
    """E[x x^T] (g, k, k), or its diagonal (g, k) -> sum of the pivots of its triangular factorisation, (g,)."""
    if second.ndim == 2:
        return np.asarray(second.sum(axis=1), np.float64)
    order = np.argsort(-np.einsum("gii->i", second))
    H = damped(second[:, order[:, None], order], 0.01)
    try:
        lower = np.linalg.cholesky(H[:, ::-1, ::-1])
    except np.linalg.LinAlgError:
        return np.asarray(np.einsum("gii->g", second), np.float64)
    return np.asarray(np.square(np.einsum("gii->gi", lower), dtype=np.float64).sum(axis=1), np.float64)


def signal(matrix: F32, second: F64, mean: F64) -> float:
    """E||y - mean y||^2 of y = W x over all output channels; matrix (g, out, k)."""
    if second.ndim == 2:
        centred = np.maximum(second - mean**2, 0.0)
        return float(np.einsum("gok,gk->", np.square(matrix, dtype=np.float64), centred))
    covariance = second - mean[:, :, None] * mean[:, None, :]
    pushed = matrix.astype(np.float64) @ covariance
    return max(float(np.einsum("gok,gok->", pushed, matrix)), 0.0)


def steps(matrix: F32, bits: int, order: npt.NDArray[np.int64] | None) -> F64:
    """Likely step of each row, (g, out). `order` gives the pairs that must fit together, or None."""
    size = np.abs(matrix.astype(np.float64))
    top = size.max(axis=2)
    if order is not None and bits == 8 and matrix.shape[2] > 1:
        even = order[: len(order) // 2 * 2].reshape(-1, 2)
        top = np.maximum(top, (size[..., even[:, 0]] + size[..., even[:, 1]]).max(axis=2))
    return np.asarray(top / (2 ** (bits - 1) - (1 if bits == 8 else 0.5)) * STEP[bits], np.float64)


def estimate(weight: Weight, bits: int, ctx: Context) -> Estimate:
    """Bytes and relative output noise of a weight at `bits` computed in int8. Without statistics C is the identity."""
    matrix = weight.to_matrix(weight.array())
    g, out, k = matrix.shape
    positions = int(np.prod(weight.shape[2:], dtype=np.int64)) if weight.main_use.role == "conv" else 1
    order = _kernels.reduction_order(k // positions, (positions,)) if not ctx.profile.int8_dot else None
    # Codes, scales of weight and bias, and about 1 kB of Q/DQ nodes, names and scales around one node.
    size = -(-matrix.size * bits // 8) + 8 * g * out + 1000
    second = ctx.stats.second_moment(weight.name) if ctx.stats is not None else None
    mean = ctx.stats.mean(weight.name) if ctx.stats is not None else None
    if second is None or mean is None or second.shape[:2] != (g, k):
        second, mean = np.ones((g, k)), np.zeros((g, k))
    key = ("noise", ctx.stats.key if ctx.stats else "", weight.name)
    if key not in ctx.cache:
        ctx.cache[key] = (pivots(second), signal(matrix, second, mean), _rounding(weight, matrix, positions, ctx))
    left, power, rounding = ctx.cache[key]
    step = steps(matrix, bits, order)
    weight_part = float((np.square(step) * left[:, None]).sum()) / 12 * CLIPPED[bits]
    # No row can lose more than all of it.
    whole = float(np.einsum("gok,gk->", np.square(matrix, dtype=np.float64), _diagonal(second)))
    if power <= 0:
        return Estimate(size, 0.0 if whole == 0 else 1.0)
    return Estimate(size, (min(weight_part, whole) + rounding) / power)


def _diagonal(second: F64) -> F64:
    return second if second.ndim == 2 else np.einsum("gii->gi", second)


def _rounding(weight: Weight, matrix: F32, positions: int, ctx: Context) -> float:
    """E||y error||^2 of rounding the input, and the output where the kernel wants it 8-bit."""
    if ctx.stats is None:
        return 0.0
    use = weight.main_use
    total = 0.0
    x = use.input_value
    found = ctx.stats.values.get(x.name or "") if x is not None else None
    if found is not None and found.finite and found.rows.size:
        g, _, k = matrix.shape
        energy = np.square(matrix, dtype=np.float64).reshape(g, -1, k // positions, positions).sum(axis=(1, 3)).ravel()
        grid = _ranges.grid_of(found.low, found.high)
        by_channel = np.square(grid.round(found.rows) - found.rows).mean(axis=0, dtype=np.float64)
        if by_channel.shape == energy.shape:
            total += float(by_channel @ energy)
    last, _, bounds = _units.folded(use.node.outputs[0])
    after = ctx.stats.values.get(last.name or "")
    if use.role == "conv" and after is not None and after.finite:
        step = _ranges.grid_of(max(after.low, bounds[0]), min(after.high, bounds[1])).scale
        total += step**2 / 12 * matrix.shape[0] * matrix.shape[1]
    return total
