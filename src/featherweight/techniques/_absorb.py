"""Where the mean error of a rounded weight goes, and which second moments its rounding should minimise.

Rounding W by dW moves the outputs by dW x. Its mean dW E[x] is a constant: a bias can take it away for nothing
(bias correction, Nagel 2019, arXiv:1906.04721). So where there is a bias, what rounding must minimise is
tr(dW Cov dW^T) with the covariance Cov = C - E[x] E[x]^T, which is much smaller behind a Relu.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph.weights import Weight
from featherweight.techniques._protocol import Context

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Slot:
    """Input `index` of `node` is the bias (None: absent, may be added); the bias counts `factor` times."""

    node: ir.Node
    index: int
    bias: F32 | None
    factor: float
    channels: int


@dataclass(frozen=True)
class Moments:
    """What to minimise: `matrix` (g, k, k) or (g, k); `mean` (g, k) where a bias takes the mean error."""

    matrix: F64 | None
    mean: F64 | None


def slot(weight: Weight) -> Slot | None:
    """The bias that can take the mean error of `weight`, or None (several uses, a table, a recurrent weight)."""
    if len(weight.uses) != 1:
        return None
    use, channels = weight.uses[0], weight.matrix_shape[0] * weight.matrix_shape[1]
    if use.role in ("conv", "conv_transpose"):
        return _of_input(use.node, 2, 1.0, channels)
    if use.role == "gemm":
        alpha, beta = _float(use.node, "alpha"), _float(use.node, "beta")
        return _of_input(use.node, 2, alpha / beta, channels) if beta else None
    if use.role == "matmul" and weight.matrix_shape[0] == 1:
        readers = list(use.node.outputs[0].uses())
        if len(readers) == 1 and readers[0].node.op_type == "Add" and not use.node.outputs[0].is_graph_output():
            add, index = readers[0].node, 1 - readers[0].idx
            found = _of_input(add, index, 1.0, channels)
            return found if found is not None and found.bias is not None else None
    return None


def _of_input(node: ir.Node, index: int, factor: float, channels: int) -> Slot | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return Slot(node, index, None, factor, channels)
    array = surgery.constant(value)
    if array is None or array.dtype != np.float32 or array.size != channels or array.shape[-1] != channels:
        return None
    return Slot(node, index, array.reshape(channels), factor, channels)


def _float(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None else float(attribute.as_float())


def added_bytes(place: Slot | None) -> int:
    """What absorbing costs in the file: nothing, or a bias that was not there."""
    return 4 * place.channels + 40 if place is not None and place.bias is None else 0


def absorb(model: ir.Model, place: Slot, shift: F64, hint: str) -> None:
    """Add `shift` (channels,), in units of the layer's output before alpha and beta, to a private copy of the bias."""
    base = np.zeros(place.channels, np.float32) if place.bias is None else place.bias
    fresh = (base + place.factor * shift).astype(np.float32)
    if not np.isfinite(fresh).all():
        return
    old = place.node.inputs[place.index] if place.index < len(place.node.inputs) else None
    shape = (place.channels,) if old is None or old.const_value is None else tuple(old.const_value.shape.numpy())
    graph = place.node.graph
    if not isinstance(graph, ir.Graph):
        return
    name = surgery.fresh_name(model, f"{hint}_bias")
    surgery.replace_input(place.node, place.index, surgery.add_initializer(graph, name, fresh.reshape(shape)))
    if old is not None and old.is_initializer() and not list(old.uses()) and not old.is_graph_output():
        surgery.remove_initializer(old)


def moments(weight: Weight, ctx: Context) -> Moments:
    """Covariance and mean where a bias can take the mean; else E[x x^T]; else nothing. Bad statistics are noted."""
    g, _, k = weight.matrix_shape
    if ctx.stats is None or weight.main_use.role == "gather":
        return Moments(None, None)
    second = ctx.stats.second_moment(weight.name)
    mean = ctx.stats.mean(weight.name)
    if second is None:
        return Moments(None, None)
    if second.shape not in ((g, k, k), (g, k)) or not np.isfinite(second).all():
        ctx.note(weight.name, "its input statistics are not usable: rounded without them")
        return Moments(None, None)
    if any(use.role == "gather" for use in weight.uses):
        # A tied table is also read row by row, where every error counts alike.
        return Moments(_half_white(second), None)
    if mean is None or mean.shape != (g, k) or not np.isfinite(mean).all() or slot(weight) is None:
        return Moments(second, None)
    if second.ndim == 2:
        return Moments(np.maximum(second - mean**2, 0.0), mean)
    return Moments(second - mean[:, :, None] * mean[:, None, :], mean)


def _half_white(second: F64) -> F64:
    """Half `second`, half its mean diagonal."""
    diagonal = second if second.ndim == 2 else np.einsum("gii->gi", second)
    level = diagonal.mean(axis=1)
    if second.ndim == 2:
        return np.asarray(0.5 * second + 0.5 * level[:, None])
    return np.asarray(0.5 * second + 0.5 * level[:, None, None] * np.eye(second.shape[1]))


def signal(matrix: F32, found: Moments, weight: Weight, ctx: Context) -> float:
    """E||y - mean y||^2 over all outputs, the unit of an Estimate's noise."""
    C = found.matrix
    if C is None:
        counts = row_weights(weight, ctx)
        centred = matrix - np.average(matrix[0], axis=0, weights=counts) if counts is not None else matrix
        weight_of = np.ones(matrix.shape[1]) if counts is None else counts
        return float(np.einsum("o,gok,gok->", weight_of, centred, centred, dtype=np.float64))
    mean = ctx.stats.mean(weight.name) if found.mean is None and ctx.stats is not None else None
    if C.ndim == 2:
        spread = C if mean is None else np.maximum(C - mean**2, 0)
        return float(np.einsum("gok,gk->", np.square(matrix, dtype=np.float64), spread))
    wide = matrix.astype(np.float64)
    spread = C if mean is None else C - mean[:, :, None] * mean[:, None, :]
    return max(float(np.einsum("gok,gok->", wide @ spread, wide)), 0.0)


def row_weights(weight: Weight, ctx: Context) -> F64 | None:
    """How often each row of a table is read (rows,), smoothed so that unseen rows count too; None for no table."""
    if weight.main_use.role != "gather" or weight.matrix_shape[0] != 1:
        return None
    counts = ctx.stats.gather_counts(weight.name) if ctx.stats is not None else None
    rows = weight.matrix_shape[1]
    if counts is None or len(counts) != rows:
        return np.ones(rows)
    return counts.astype(np.float64) + max(float(counts.mean()), 1e-3)


def mean_shift(error: F32, found: Moments) -> F64 | None:
    """Mean output error of each output channel (g * out,), to be added to the bias; error = W - rounded (g, out, k)."""
    if found.mean is None:
        return None
    return np.asarray(np.einsum("gok,gk->go", error.astype(np.float64), found.mean)).ravel()
