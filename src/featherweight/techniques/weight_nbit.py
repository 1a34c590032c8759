"""Weights of 8 to 2 bits on a linear grid, computed in float (Frantar 2022, GPTQ, arXiv:2210.17323).

Codes are decoded once at load, so speed is that of the float model. Rounding is error-compensated with the
covariance of the layer's inputs (`_gptq`), the mean error goes into the bias (`_absorb`). With kernel="nbits" the
runtime keeps 4-bit blocks in memory and computes with them (MatMulNBits).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Action, Site, Stage
from featherweight.errors import TechniqueError
from featherweight.graph import encode
from featherweight.graph.weights import Weight
from featherweight.techniques import _absorb, _gptq, _place, _scales
from featherweight.techniques._profile import profile, refusal
from featherweight.techniques._protocol import Context, Estimate, Technique

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
BITS = (8, 7, 6, 5, 4, 3, 2)
BLOCKS = (32, 64, 128)
BLOCK_BITS = 4  # above it the scales of blocks cost more bytes than one more bit would
#: MatMulNBits rounds activations to 8 bits a block: relative squared error of blocks of 32 normal values.
NBITS_ACTIVATION_NOISE = 5e-5


class WeightNbit:
    """See the module's text. Sites are all stored float weights, in sub-graphs too."""

    name: ClassVar[str] = "weight_nbit"
    stage: ClassVar[Stage] = "numeric"
    integer: ClassVar[bool] = False

    def sites(self, model: ir.Model) -> Iterable[Site]:
        """Every weight that is worth encoding."""
        return _place.sites(model)

    def options(self, model: ir.Model, site: Site, ctx: Context) -> Iterable[Action]:
        """8 to 2 bits, one scale a channel or a block of 32, 64, 128 reduced entries; MatMulNBits for MatMul."""
        weight = ctx.weight(model, site.name)
        reason = refusal(weight, ctx)
        if reason:
            ctx.note(site.name, f"weights stay as they are: {reason}")
            return
        blocks = [b for b in BLOCKS if _place.block_axis(weight) is not None and weight.matrix_shape[2] > b]
        for bits in BITS:
            yield Action.of(self.name, bits=bits)
            for block in blocks if ctx.thorough or bits <= BLOCK_BITS else ():
                yield Action.of(self.name, bits=bits, block=block)
        if blocks and _place.nbits_kernel(weight):
            for block in blocks:
                yield Action.of(self.name, bits=4, block=block, kernel="nbits")

    def estimate(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:
        """Exact bytes; noise is plain rounding's error (some rows) times what compensation leaves of it."""
        weight = ctx.weight(model, site.name)
        bits, block, nbits = _params(action, weight)
        facts = profile(weight, ctx)
        unit = _gptq.power_of_two(facts.rows)
        rows = np.ascontiguousarray(facts.rows.transpose(0, 2, 1) / unit)
        grid = _scales.first_grid(rows, facts.importance, bits=bits, block=block)
        half = _place.half_scale(grid.scale * unit, bits)
        size = _place.encoded_bytes(weight, bits, block, nbits=nbits, half=half) + facts.added_bytes
        if facts.signal <= 0:
            return Estimate(size, 0.0)
        E = _rounding_error(rows, grid)
        error = np.einsum("gk,gko,gko->go", facts.importance, E, E, dtype=np.float64)
        noise = float((error * facts.row_weight * facts.left[:, None]).sum()) * float(unit) ** 2 / facts.signal
        return Estimate(size, noise + (NBITS_ACTIVATION_NOISE if nbits else 0.0))

    def apply(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:
        """Write the codes and correct the bias."""
        weight = _place.find(model, site.name)
        reason = refusal(weight, ctx)
        if reason:
            raise TechniqueError(f"weight_nbit cannot round {site.name!r}: {reason}")
        bits, block, nbits = _params(action, weight)
        found = _absorb.moments(weight, ctx)
        matrix = weight.to_matrix(weight.array())
        key = (self.name, ctx.stats.key if ctx.stats else "", weight.name, bits, block)
        if key not in ctx.cache:
            ctx.cache[key] = _gptq.quantize(matrix, found.matrix, bits=bits, block=block)
        q: _gptq.Quantized = ctx.cache[key]
        coded = _place.encoded(weight, q.codes, q.scale, bits, block, nbits=nbits)
        error = matrix - weight.to_matrix(encode.decode(coded))
        shift, place = _absorb.mean_shift(error, found), _absorb.slot(weight)
        stored, size = _place.attach(model, weight, coded)
        extra = 0
        if shift is not None and place is not None:
            _absorb.absorb(model, place, shift, weight.name)
            extra = _absorb.added_bytes(place)
        return (Site(site.name, "weight", (stored.name or "",), site.nodes, size + extra),)

    def finish(self, model: ir.Model, ctx: Context) -> None:
        """Nothing is left to do."""


def _params(action: Action, weight: Weight) -> tuple[int, int, bool]:
    """(bits, block, use MatMulNBits) of an action, checked. Raises TechniqueError."""
    bits, block, kernel = int(action.get("bits", 8)), int(action.get("block", 0)), action.get("kernel", "fold")
    if bits not in BITS:
        raise TechniqueError(f"bits must be one of {BITS}, but got {bits}")
    if kernel not in ("fold", "nbits"):
        raise TechniqueError(f"kernel must be 'fold' or 'nbits', but got {kernel!r}")
    if block < 0 or (block and _place.block_axis(weight) is None):
        raise TechniqueError(
            f"block must be 0 for {weight.name!r} ({weight.main_use.role}, shape {weight.shape}): its reduced entries "
            f"are not one axis; got {block}"
        )
    if kernel == "nbits" and (bits != 4 or block < 16 or not _place.nbits_kernel(weight)):
        raise TechniqueError(
            f"kernel='nbits' needs the right operand of one MatMul, bits=4 and block >= 16, but {weight.name!r} has "
            f"{[u.role for u in weight.uses]} with bits={bits}, block={block}"
        )
    return bits, block, kernel == "nbits"


def _rounding_error(rows: F32, grid: _scales.LinearGrid) -> F32:
    """W - plainly rounded, (g, k, out), all indices at once."""
    scale = grid.scale[:, grid.span]
    return np.asarray(rows - np.clip(np.rint(rows / scale), grid.low, grid.high) * scale)


TECHNIQUE: Technique = WeightNbit()
