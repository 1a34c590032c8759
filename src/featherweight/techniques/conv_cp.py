"""Convolutions as 1 x 1, one depthwise layer a kernel axis, 1 x 1: CP (Lebedev 2015, arXiv:1412.6553).

Alternating least squares on the kernel whose input channels are whitened by their second moments; the last layer is
then the best one for the data in closed form. Each rank is a decomposition of its own, so few are tried.
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

SHARES = (0.8, 0.5, 0.3, 0.18)


def _why(weight: Weight) -> str:
    shape = weight.seen_shape(weight.main_use)
    if math.prod(shape[2:]) == 1:
        return "no gain: a kernel of one position has no spatial part"
    if shape[1] == 1:
        return "no gain: it is depthwise already"
    return ""


def _propose(of: Layer) -> Sequence[Params]:
    _, out, k = of.matrix.shape
    one = of.channels + out + sum(of.kernel[a] for a in _axes(of.kernel))
    ranks = dict.fromkeys(int(share * out * k / one) for share in SHARES)
    size = out * k
    return [(r,) for r in ranks if r >= 1 and _factor_conv.cp_rounds(size, r)]


def _axes(kernel: Sequence[int]) -> list[int]:
    """Kernel axes that get a layer of their own."""
    return [a for a, size in enumerate(kernel) if size > 1]


def _found(of: Layer, params: Params) -> tuple[F64, list[F64]]:
    """Mixtures (g, rank, c) and filters (g, rank, size), one for each axis that has a layer."""
    key = f"cp {params[0]}"
    if key not in of.memo:
        g, out, _ = of.matrix.shape
        squeezed = of.matrix.reshape(g, out, of.channels, *(of.kernel[a] for a in _axes(of.kernel)))
        of.memo[key] = _factor_conv.cp_basis(squeezed, of.moments, params[0], of.seed)
    found: tuple[F64, list[F64]] = of.memo[key]
    return found


def _errors(of: Layer, asked: Sequence[Params]) -> list[float]:
    inner = [_factor_conv.cp_inner(*_found(of, params)) for params in asked]
    return [onto(of.matrix, of.moments, rows).error() for rows in inner]


def _shapes(of: Layer, params: Params) -> list[tuple[int, ...]]:
    (g, out, _), rank, ones = of.matrix.shape, params[0], [1] * len(of.kernel)
    middle = [(g * rank, 1, *(n if a == axis else 1 for a, n in enumerate(of.kernel))) for axis in _axes(of.kernel)]
    return [(g * rank, of.channels, *ones), *middle, (g * out, rank, *ones)]


def _solve(of: Layer, params: Params) -> Solved:
    mixtures, filters = _found(of, params)
    rows = _factor_conv.cp_inner(mixtures, filters)
    size = spread(rows, of.moments)[:, :, None]
    mixtures, rows = mixtures / size, rows / size
    outer = onto(of.matrix, of.moments, rows).solve()
    arrays = [mixtures, *filters, outer]
    shaped = tuple(a.reshape(s).astype(np.float32) for a, s in zip(arrays, _shapes(of, params), strict=True))
    return Solved(shaped, outer @ rows)


def _links(weight: Weight, params: Params) -> Callable[[WeightUse], Sequence[Link]]:
    def links(use: WeightUse) -> Sequence[Link]:
        of, g = window(use, weight), use.groups
        rank, axes = len(of.kernel), _axes(of.kernel)
        flat = [a for a in range(rank) if a not in axes]
        owned = [[axis, *(flat if axis == axes[0] else [])] for axis in axes]
        middle = [conv_link(of, g * params[0], own) for own in owned]
        return [point_link(rank, g), *middle, point_link(rank, g)]

    return links


METHOD = Method("conv_cp", ("rank",), frozenset({"conv"}), True, _why, _propose, _shapes, _errors, _solve, _links)


class ConvCp(Decomposition):
    """See the module's text. Sites are the stored kernels of Conv of more than one position, in sub-graphs too."""

    name: ClassVar[str] = "conv_cp"
    factors: ClassVar[int] = 4
    method: ClassVar[Method] = METHOD


TECHNIQUE: Technique = ConvCp()
