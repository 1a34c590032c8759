"""Layers as two thinner ones: SVD whitened by the second moments of the inputs (Wang 2024, SVD-LLM, arXiv:2403.07378).

Gemm, MatMul and Conv (any kernel: k x k to `rank` channels, then 1 x 1; ConvTranspose alike). With C = E[x x^T] the
product of rank r that minimises tr((W - W') C (W - W')^T) keeps the r largest singular values of W C^(1/2); the mean
error goes into the bias, so where there is one C is the covariance. One decomposition gives the errors of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from featherweight.graph.weights import Weight, WeightUse
from featherweight.techniques._factor import F64, pair, tail
from featherweight.techniques._factor_graph import Link, conv_link, point_link, window
from featherweight.techniques._factor_site import EXACT, Decomposition, Layer, Method, Params, Solved, ladder
from featherweight.techniques._protocol import Technique


def _why(weight: Weight) -> str:
    if len(weight.seen_shape(weight.main_use)) < 2 or min(weight.matrix_shape[1:]) < 2:
        return "no gain: it has one row or column a group, which is of rank 1 already"
    return ""


def _propose(of: Layer) -> Sequence[Params]:
    _, out, k = of.matrix.shape
    energy = _energy(of)
    most = -(-out * k // (out + k)) - 1
    total = float(energy.sum())
    exact = next((r for r in range(1, energy.shape[1]) if tail(energy, r) <= EXACT * total), None)
    ranks = ladder(most) if most >= 1 else []
    if exact is not None and exact <= most:
        ranks = [exact, *(ladder(exact - 1) if exact > 1 else ())]
    return [(r,) for r in ranks]


def _energy(of: Layer) -> F64:
    if "energy" not in of.memo:
        of.memo["energy"] = pair(of.matrix, of.moments).energy
    found: F64 = of.memo["energy"]
    return found


def _errors(of: Layer, asked: Sequence[Params]) -> list[float]:
    energy = _energy(of)
    return [tail(energy, rank) for (rank,) in asked]


def _shapes(of: Layer, params: Params) -> list[tuple[int, ...]]:
    (g, out, k), use = of.matrix.shape, of.weight.main_use
    rank = min(params[0], out, k)
    match use.role:
        case "conv":
            return [(g * rank, of.channels, *of.kernel), (g * out, rank, *[1] * len(of.kernel))]
        case "conv_transpose":
            return [(g * of.channels, rank, *of.kernel), (g * out, rank, *[1] * len(of.kernel))]
        case "gemm":
            return [(rank, k), (out, rank)]
    lead = of.weight.seen_shape(use)[:-2]
    if use.role == "matmul_left":
        return [(*lead, rank, k), (*lead, out, rank)]
    return [(*lead, k, rank), (*lead, rank, out)]


def _solve(of: Layer, params: Params) -> Solved:
    outer, inner = pair(of.matrix, of.moments).cut(params[0])
    first, second = _shapes(of, params)
    role = of.weight.main_use.role
    a, b = inner, outer
    if role == "conv_transpose":
        g, rank, _ = inner.shape
        a = inner.reshape(g, rank, of.channels, -1).transpose(0, 2, 1, 3)
    elif role == "matmul":
        a, b = inner.transpose(0, 2, 1), outer.transpose(0, 2, 1)
    return Solved((a.reshape(first).astype(np.float32), b.reshape(second).astype(np.float32)), outer @ inner)


def _links(weight: Weight, _: Params) -> Callable[[WeightUse], Sequence[Link]]:
    def links(use: WeightUse) -> Sequence[Link]:
        if use.role in ("conv", "conv_transpose"):
            of = window(use, weight)
            rank = len(of.kernel)
            return conv_link(of, use.groups, range(rank)), point_link(rank, use.groups)
        if use.role == "gemm":
            return Link("Gemm", {"transB": 1}, keeps=("transA",)), Link("Gemm", {"transB": 1}, keeps=("alpha", "beta"))
        left = use.role == "matmul_left"
        return Link("MatMul", left=left), Link("MatMul", left=left)

    return links


METHOD = Method(
    "low_rank",
    ("rank",),
    frozenset({"gemm", "matmul", "matmul_left", "conv", "conv_transpose"}),
    False,
    _why,
    _propose,
    _shapes,
    _errors,
    _solve,
    _links,
)


class LowRank(Decomposition):
    """See the module's text. Sites are the stored weights of matrix products and convolutions, in sub-graphs too."""

    name: ClassVar[str] = "low_rank"
    factors: ClassVar[int] = 2
    method: ClassVar[Method] = METHOD


TECHNIQUE: Technique = LowRank()
