"""Convolutions as 1 x 1, a core of k x k, 1 x 1: Tucker-2 (Kim 2016, arXiv:1511.06530), fitted to the inputs.

The input mode keeps the channel mixtures that hold most of the output, seen through the inputs' second moments; given
those the core and the last layer are the best ones of their rank in closed form (a whitened SVD, as in `low_rank`).
An `out_rank` of all output channels leaves the last layer out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from featherweight.graph.weights import Weight, WeightUse
from featherweight.techniques import _factor_conv
from featherweight.techniques._factor import F64, Onto, Pair, onto, pair, tail
from featherweight.techniques._factor_graph import Link, conv_link, point_link, window
from featherweight.techniques._factor_site import Decomposition, Layer, Method, Params, Solved, ladder
from featherweight.techniques._protocol import Technique

SHARES = (0.85, 0.6, 0.42, 0.3, 0.2, 0.14)


def _why(weight: Weight) -> str:
    shape = weight.seen_shape(weight.main_use)
    if math.prod(shape[2:]) == 1:
        return "no gain: a kernel of one position has no core; low_rank is the same with one layer less"
    if shape[1] < 2 or weight.matrix_shape[1] < 2:
        return "no gain: it has one input or output channel a group, so there is no mode to reduce"
    return ""


def _propose(of: Layer) -> Sequence[Params]:
    """The pair of least error below each share of the weight's values."""
    _, out, k = of.matrix.shape
    c, positions = of.channels, k // of.channels
    best: dict[float, tuple[float, Params]] = {}
    for a in (r for r in _in_ranks(c) if r <= out * positions):
        energy, rest = _cut(of, a)
        limit = min(out, a * positions)
        for share in SHARES:
            left = share * out * k - a * c
            b = int(left / (a * positions + out))
            whole = a * positions * out <= left
            b = out if whole else min(b, limit, out - 1)
            if b < 1 or left <= 0:
                continue
            error = rest + tail(energy, min(b, limit))
            if share not in best or error < best[share][0]:
                best[share] = error, (a, b)
    return list(dict.fromkeys(params for _, params in best.values()))


def _in_ranks(channels: int) -> list[int]:
    return [r for r in ladder(channels) if r < channels] or [max(channels // 2, 1)]


def _prepared(of: Layer) -> tuple[F64, Onto]:
    """Input mixtures (g, n, c) and the problem with all of them that may be asked for."""
    if "tucker" not in of.memo:
        basis = _factor_conv.channel_basis(of.tensor, of.moments)
        positions = of.matrix.shape[2] // of.channels
        of.memo["tucker"] = basis, onto(of.matrix, of.moments, _factor_conv.with_positions(basis, positions))
    found: tuple[F64, Onto] = of.memo["tucker"]
    return found


def _core(of: Layer, in_rank: int) -> tuple[Pair, F64, float]:
    """Core and last layer of every rank for the first `in_rank` mixtures, their product, the projection's error."""
    n = in_rank * (of.matrix.shape[2] // of.channels)
    problem = _prepared(of)[1]
    joined = problem.solve(n)
    return pair(joined, problem.gram[:, :n, :n]), joined, problem.error(n)


def _cut(of: Layer, in_rank: int) -> tuple[F64, float]:
    """Energies (g, n) of the core's ranks, and the error of the projection."""
    if in_rank not in of.memo:
        found, _, rest = _core(of, in_rank)
        of.memo[in_rank] = found.energy, rest
    known: tuple[F64, float] = of.memo[in_rank]
    return known


def _ranks(of: Layer, params: Params) -> tuple[int, int]:
    """Ranks that the layer as it is now can have."""
    _, out, k = of.matrix.shape
    in_rank = min(params[0], of.channels, out * k // of.channels)
    return in_rank, min(params[1], out)


def _errors(of: Layer, asked: Sequence[Params]) -> list[float]:
    found = []
    for params in asked:
        a, b = _ranks(of, params)
        energy, rest = _cut(of, a)
        found.append(rest + tail(energy, b))
    return found


def _shapes(of: Layer, params: Params) -> list[tuple[int, ...]]:
    g, out, _ = of.matrix.shape
    a, b = _ranks(of, params)
    ones = [1] * len(of.kernel)
    shapes: list[tuple[int, ...]] = [(g * a, of.channels, *ones), (g * b, a, *of.kernel)]
    return shapes if b == out else [*shapes, (g * out, b, *ones)]


def _solve(of: Layer, params: Params) -> Solved:
    a, b = _ranks(of, params)
    basis = _prepared(of)[0][:, :a]
    found, joined, _ = _core(of, a)
    outer, core = found.cut(b)
    factors = [basis, joined] if b == of.matrix.shape[1] else [basis, core, outer]
    whole = joined if len(factors) == 2 else outer @ core
    product = whole @ _factor_conv.with_positions(basis, of.matrix.shape[2] // of.channels)
    shapes = _shapes(of, params)
    arrays = tuple(f.reshape(s).astype(np.float32) for f, s in zip(factors, shapes, strict=True))
    return Solved(arrays, product)


def _links(weight: Weight, params: Params) -> Callable[[WeightUse], Sequence[Link]]:
    def links(use: WeightUse) -> Sequence[Link]:
        of, g = window(use, weight), use.groups
        rank = len(of.kernel)
        chain = [point_link(rank, g), conv_link(of, g, range(rank))]
        return chain if params[1] >= weight.matrix_shape[1] else [*chain, point_link(rank, g)]

    return links


METHOD = Method(
    "conv_tucker", ("in_rank", "out_rank"), frozenset({"conv"}), True, _why, _propose, _shapes, _errors, _solve, _links
)


class ConvTucker(Decomposition):
    """See the module's text. Sites are the stored kernels of Conv of more than one position, in sub-graphs too."""

    name: ClassVar[str] = "conv_tucker"
    factors: ClassVar[int] = 3
    method: ClassVar[Method] = METHOD


TECHNIQUE: Technique = ConvTucker()
