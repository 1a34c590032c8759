"""Convolutions as k x 1, then 1 x k (Jaderberg 2014, arXiv:1405.3866), fitted to the inputs.

The first layer has the `rank` filters along the first kernel axis that hold most of the output, seen through the
inputs' second moments; the second layer, along the other axes, is the best one for them in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from featherweight.graph.weights import Weight, WeightUse
from featherweight.techniques import _factor_conv
from featherweight.techniques._factor import F64, Onto, onto
from featherweight.techniques._factor_graph import Link, conv_link, window
from featherweight.techniques._factor_site import Decomposition, Layer, Method, Params, Solved, ladder
from featherweight.techniques._protocol import Technique

#: Depthwise kernels up to this size: two layers took 0.97 to 1.12 times as long as one in ONNX Runtime on one core
#: (3 x 3, 32 to 480 channels), while 5 x 5 ones took 0.7 to 0.8 times as long.
SMALL = 9


def _why(weight: Weight) -> str:
    kernel = weight.seen_shape(weight.main_use)[2:]
    if kernel[0] == 1 or math.prod(kernel[1:]) == 1:
        return f"no gain: its kernel {'x'.join(map(str, kernel))} does not extend along two axes"
    if weight.seen_shape(weight.main_use)[1] == 1 and math.prod(kernel) <= SMALL:
        return "no gain: a depthwise kernel this small runs no faster in two parts"
    return ""


def _sizes(of: Layer) -> tuple[int, int, int]:
    """Size of the first kernel axis, of the others together, and the largest rank."""
    first, rest = of.kernel[0], math.prod(of.kernel[1:])
    return first, rest, min(of.channels * first, of.matrix.shape[1] * rest)


def _propose(of: Layer) -> Sequence[Params]:
    _, out, k = of.matrix.shape
    first, rest, largest = _sizes(of)
    most = -(-out * k // (of.channels * first + out * rest)) - 1
    return [(r,) for r in ladder(min(most, largest))] if min(most, largest) >= 1 else []


def _prepared(of: Layer) -> tuple[F64, Onto]:
    """Filters (g, n, c, first) of every rank that can pay, and the problem with all of them."""
    if "spatial" not in of.memo:
        _, out, k = of.matrix.shape
        first, rest, largest = _sizes(of)
        most = min(largest, max(out * k // (of.channels * first + out * rest) + 1, 1))
        basis = _factor_conv.column_basis(of.tensor, of.moments)[:, :most]
        of.memo["spatial"] = basis, onto(of.matrix, of.moments, _factor_conv.with_rest(basis, rest))
    found: tuple[F64, Onto] = of.memo["spatial"]
    return found


def _rank(of: Layer, params: Params) -> int:
    return min(params[0], _sizes(of)[2])


def _errors(of: Layer, asked: Sequence[Params]) -> list[float]:
    rest = _sizes(of)[1]
    return _whole(of, asked)[1].errors([_rank(of, params) * rest for params in asked])


def _whole(of: Layer, asked: Sequence[Params]) -> tuple[F64, Onto]:
    """As `_prepared`, with more filters if a larger rank is asked for."""
    basis, problem = _prepared(of)
    if max(_rank(of, params) for params in asked) <= basis.shape[1]:
        return basis, problem
    basis = _factor_conv.column_basis(of.tensor, of.moments)
    return basis, onto(of.matrix, of.moments, _factor_conv.with_rest(basis, _sizes(of)[1]))


def _shapes(of: Layer, params: Params) -> list[tuple[int, ...]]:
    g, out, _ = of.matrix.shape
    rank, others = _rank(of, params), of.kernel[1:]
    return [(g * rank, of.channels, of.kernel[0], *[1] * len(others)), (g * out, rank, 1, *others)]


def _solve(of: Layer, params: Params) -> Solved:
    rank, rest = _rank(of, params), _sizes(of)[1]
    basis, problem = _whole(of, [params])
    outer = problem.solve(rank * rest)
    inner = _factor_conv.with_rest(basis[:, :rank], rest)
    arrays = (basis[:, :rank], outer)
    shaped = tuple(a.reshape(s).astype(np.float32) for a, s in zip(arrays, _shapes(of, params), strict=True))
    return Solved(shaped, outer @ inner)


def _links(weight: Weight, _: Params) -> Callable[[WeightUse], Sequence[Link]]:
    def links(use: WeightUse) -> Sequence[Link]:
        of, g = window(use, weight), use.groups
        return conv_link(of, g, [0]), conv_link(of, g, range(1, len(of.kernel)))

    return links


METHOD = Method("conv_spatial", ("rank",), frozenset({"conv"}), True, _why, _propose, _shapes, _errors, _solve, _links)


class ConvSpatial(Decomposition):
    """See the module's text. Sites are the stored kernels of Conv of more than one position, in sub-graphs too."""

    name: ClassVar[str] = "conv_spatial"
    factors: ClassVar[int] = 2
    method: ClassVar[Method] = METHOD


TECHNIQUE: Technique = ConvSpatial()
