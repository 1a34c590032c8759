"""Weights as indices into a small codebook (Han 2016, Deep Compression, arXiv:1510.00149), error-compensated.

Codebooks are clustered with the inputs' second moments as importance, indices chosen with error feedback and
codebooks re-fitted by least squares (`_codebook`). Decoded once at load: float speed, 1 to 8 bits a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from featherweight.core import Action, Site, Stage
from featherweight.errors import TechniqueError
from featherweight.graph import encode
from featherweight.graph.encode.layout import Kind
from featherweight.graph.weights import Weight
from featherweight.techniques import _absorb, _codebook, _place
from featherweight.techniques._profile import RowProfile, profile, refusal
from featherweight.techniques._protocol import Context, Estimate, Technique
from featherweight.techniques._scales import F32

BITS = (8, 7, 6, 5, 4, 3, 2, 1)
GROUPS = (1, 4, 16)
USEFUL_BITS, USEFUL_GROUPS = (5, 4, 3, 2, 1), (1, 16)
#: Codebooks may take this share of the bytes of the indices.
BOOK_SHARE = 0.06
SAMPLE = 60_000  # weights looked at for an estimate


class Palette:
    """See the module's text. Sites are all stored float weights, in sub-graphs too."""

    name: ClassVar[str] = "palette"
    stage: ClassVar[Stage] = "numeric"
    integer: ClassVar[bool] = False

    def sites(self, model: ir.Model) -> Iterable[Site]:
        """Every weight that is worth encoding."""
        return _place.sites(model)

    def options(self, model: ir.Model, site: Site, ctx: Context) -> Iterable[Action]:
        """1 to 8 bits; one codebook a tensor, or one for each of 4 or 16 runs of output channels."""
        weight = ctx.weight(model, site.name)
        reason = refusal(weight, ctx)
        if reason:
            ctx.note(site.name, f"weights stay as they are: {reason}")
            return
        # With many levels a codebook gains nothing over a uniform grid, and four codebooks little over one or sixteen.
        for bits in BITS if ctx.thorough else USEFUL_BITS:
            for groups in GROUPS if ctx.thorough else USEFUL_GROUPS:
                small = 4 * groups * 2**bits <= BOOK_SHARE * weight.array().size * bits / 8
                if groups == 1 or (small and _groups_fit(weight, groups)):
                    yield Action.of(self.name, bits=bits, groups=groups)

    def estimate(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:
        """Exact bytes (full codebooks); noise is clustering's error on a sample times what compensation leaves."""
        weight = ctx.weight(model, site.name)
        bits, groups = _params(action, weight)
        facts = profile(weight, ctx)
        levels = 2**bits
        if weight.array().size <= 4096:
            levels = min(levels, len(np.unique(weight.array())))
        kind: Kind = "lookup" if _place.looked_up(weight) and groups == 1 else "palette"
        size = encode.sizes(weight.shape, kind, bits, groups=groups, levels=levels) + facts.added_bytes
        return Estimate(size, _clustering_noise(facts, bits, groups) if facts.signal > 0 else 0.0)

    def apply(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:
        """Write indices and codebook, and correct the bias."""
        weight = _place.find(model, site.name)
        reason = refusal(weight, ctx)
        if reason:
            raise TechniqueError(f"palette cannot cluster {site.name!r}: {reason}")
        bits, groups = _params(action, weight)
        found = _absorb.moments(weight, ctx)
        matrix = weight.to_matrix(weight.array())
        key = (self.name, ctx.stats.key if ctx.stats else "", weight.name, bits, groups)
        if key not in ctx.cache:
            ctx.cache[key] = _codebook.quantize(matrix, found.matrix, bits=bits, books=groups)
        chosen: _codebook.Palette = ctx.cache[key]
        books = chosen.codebook[0] if groups == 1 else chosen.codebook
        coded = encode.palette(weight.from_matrix(chosen.indices), books, bits)
        error = matrix - chosen.decoded()
        shift, place = _absorb.mean_shift(error, found), _absorb.slot(weight)
        stored, size = _place.attach(model, weight, coded)
        extra = 0
        if shift is not None and place is not None:
            _absorb.absorb(model, place, shift, weight.name)
            extra = _absorb.added_bytes(place)
        return (Site(site.name, "weight", (stored.name or "",), site.nodes, size + extra),)

    def finish(self, model: ir.Model, ctx: Context) -> None:
        """Nothing is left to do."""


def _groups_fit(weight: Weight, groups: int) -> bool:
    """True if runs of matrix rows are runs of the stored tensor's axis 0, as grouped codebooks need."""
    g, out, _ = weight.matrix_shape
    place = _place.row_place(weight)
    return place.axis == 0 and place.block == 0 and len(place.rows) == g * out and (g * out) % groups == 0


def _params(action: Action, weight: Weight) -> tuple[int, int]:
    """(bits, groups) of an action, checked. Raises TechniqueError."""
    bits, groups = int(action.get("bits", 4)), int(action.get("groups", 1))
    if bits not in BITS:
        raise TechniqueError(f"bits must be one of {BITS}, but got {bits}")
    if groups < 1 or (groups > 1 and not _groups_fit(weight, groups)):
        raise TechniqueError(
            f"groups must be 1, or divide the {weight.matrix_shape[0] * weight.matrix_shape[1]} output channels of a "
            f"weight that has them on axis 0, but got {groups} for {weight.name!r} of shape {weight.shape}"
        )
    return bits, groups


def _clustering_noise(facts: RowProfile, bits: int, groups: int) -> float:
    """Noise of clustering a sample of rows, less what error feedback takes away."""
    g, rows, k = facts.rows.shape
    weight = facts.importance[:, None] * (facts.row_weight * facts.left[:, None])[..., None]
    flat, mass = facts.rows.reshape(g * rows, k), np.broadcast_to(weight, facts.rows.shape).reshape(g * rows, k)
    owner = _codebook.book_of_rows(g * rows, min(groups, g * rows))
    total = 0.0
    for book in range(owner[-1] + 1):
        picked = owner == book
        total += _distortion(flat[picked], mass[picked].astype(np.float64), 2**bits)
    return total / facts.signal


def _distortion(values: F32, mass: F32, levels: int) -> float:
    """Weighted squared error of the best clustering; above 64 levels it falls with their square (many values)."""
    if levels > 64 and values.size > 8 * levels:
        return _distortion(values, mass, 64) * (64 / levels) ** 2
    flat, weight = values.ravel(), mass.ravel()
    step = max(1, flat.size // SAMPLE)
    centroids = _codebook.kmeans(flat[::step], weight[::step].astype(np.float32), levels)
    edges = (centroids[1:] + centroids[:-1]) / 2
    error = flat[::step] - centroids[np.searchsorted(edges, flat[::step])]
    share = float(weight.sum()) / max(float(weight[::step].sum()), 1e-300)
    return float((weight[::step] * np.square(error, dtype=np.float64)).sum()) * share


TECHNIQUE: Technique = Palette()
