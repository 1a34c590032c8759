"""Convolutions as a depthwise k x k and a 1 x 1 behind it (as in MobileNet), the best such pair for the inputs.

Each input channel gets `multiplier` spatial filters of its own: the directions that hold most of the output, from the
SVD of its part of the kernel seen through its second moments; then both layers are refined in turn by least squares
over all inputs where the layer is small enough. The 1 x 1 is always the best one for the filters, in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from featherweight.graph.weights import Weight, WeightUse
from featherweight.techniques import _factor_conv
from featherweight.techniques._factor import F64, onto, spread
from featherweight.techniques._factor_graph import Link, conv_link, point_link, window
from featherweight.techniques._factor_site import Decomposition, Layer, Method, Params, Solved
from featherweight.techniques._protocol import Technique

MOST = 6


def _why(weight: Weight) -> str:
    shape = weight.seen_shape(weight.main_use)
    if math.prod(shape[2:]) == 1:
        return "no gain: a kernel of one position has no spatial part"
    if shape[1] == 1:
        return "no gain: it is depthwise already"
    return ""


def _propose(of: Layer) -> Sequence[Params]:
    _, out, k = of.matrix.shape
    c, positions = of.channels, k // of.channels
    most = min(MOST, out, positions)
    return [(m,) for m in range(most, 0, -1) if m * (c * positions + out * c) < out * k]


def _filters(of: Layer, params: Params) -> F64:
    """(g, c, m, positions)."""
    m = _multiplier(of, params)
    key = f"filters {m}"
    if key not in of.memo:
        if "filters" not in of.memo:
            of.memo["filters"] = _factor_conv.depthwise_basis(of.tensor, of.moments)
        of.memo[key] = _factor_conv.refined_depthwise(of.tensor, of.moments, of.memo["filters"][:, :, :m])
    found: F64 = of.memo[key]
    return found


def _multiplier(of: Layer, params: Params) -> int:
    return min(params[0], int(of.matrix.shape[1]), math.prod(of.kernel))


def _errors(of: Layer, asked: Sequence[Params]) -> list[float]:
    inner = [_factor_conv.by_channel(_filters(of, params)) for params in asked]
    return [onto(of.matrix, of.moments, rows).error() for rows in inner]


def _shapes(of: Layer, params: Params) -> list[tuple[int, ...]]:
    (g, out, _), m = of.matrix.shape, _multiplier(of, params)
    return [(g * of.channels * m, 1, *of.kernel), (g * out, of.channels * m, *[1] * len(of.kernel))]


def _solve(of: Layer, params: Params) -> Solved:
    filters = _filters(of, params)
    size = spread(_factor_conv.by_channel(filters), of.moments)
    filters = filters / size.reshape(*filters.shape[:3], 1)
    inner = _factor_conv.by_channel(filters)
    outer = onto(of.matrix, of.moments, inner).solve()
    first, second = _shapes(of, params)
    return Solved((filters.reshape(first).astype(np.float32), outer.reshape(second).astype(np.float32)), outer @ inner)


def _links(weight: Weight, _: Params) -> Callable[[WeightUse], Sequence[Link]]:
    def links(use: WeightUse) -> Sequence[Link]:
        of, channels = window(use, weight), weight.seen_shape(use)[1] * use.groups
        rank = len(of.kernel)
        return conv_link(of, channels, range(rank)), point_link(rank, use.groups)

    return links


METHOD = Method(
    "conv_depthwise_separable",
    ("multiplier",),
    frozenset({"conv"}),
    True,
    _why,
    _propose,
    _shapes,
    _errors,
    _solve,
    _links,
)


class ConvDepthwiseSeparable(Decomposition):
    """See the module's text. Sites are the stored kernels of Conv of more than one position, in sub-graphs too."""

    name: ClassVar[str] = "conv_depthwise_separable"
    factors: ClassVar[int] = 2
    method: ClassVar[Method] = METHOD


TECHNIQUE: Technique = ConvDepthwiseSeparable()
