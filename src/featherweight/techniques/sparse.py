"""Weights that are mostly zero, with the rest in few bits (SparseGPT, Frantar and Alistarh 2023, arXiv:2301.00774).

Stored as one bit an element and the values that are not zero, decoded once at load. That is for the size of the file
only: the runtime multiplies the zeros like any other value, so nothing becomes faster. The kept weights make up for
the zeros (`_sparse`), are rounded with error feedback (`_gptq`), and the mean error goes into the bias (`_absorb`).

Where it pays (measured on EfficientNet-Lite0 and MiniLM): weights with heavy tails and many columns, with 3 or 4 bits
and 40 to 70 % zeros, leave 0.7 to 0.9 of the error of n-bit weights in as many bytes (a few layers 0.2 to 0.5);
normally distributed weights 1.2 to 2 times as much, depthwise kernels more. So options that cannot win by their
estimates are left out unless the context is thorough; of those offered, two in three really win.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Action, Site, Stage
from featherweight.errors import TechniqueError
from featherweight.graph import encode
from featherweight.graph.encode import Encoded
from featherweight.graph.weights import Weight
from featherweight.techniques import _absorb, _gptq, _place, _scales, _sparse
from featherweight.techniques._profile import COMPENSATION, RowProfile, profile, refusal
from featherweight.techniques._protocol import Context, Estimate, Technique

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
FLOAT = 32  # bits of values that are not rounded
BITS = (8, 6, 5, 4, 3, FLOAT)
USEFUL_BITS = (5, 4, 3)
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PATTERN = "2:4"
DENSE_BITS = (5, 4, 3, 2)
#: An option must leave at most this share of the noise of dense n-bit weights in as many bytes, both as estimated:
#: dense codes end up some 10 % better than estimated and sparse ones as much worse.
GAIN = 0.85
SAMPLE = 40_000  # weights looked at for an estimate
IN_EARNEST = 128  # up to as many columns an estimate prunes its sample


@dataclass(frozen=True)
class _Asked:
    """An action's parameters."""

    sparsity: float
    bits: int
    pattern: _sparse.Pattern


class Sparse:
    """See the module's text. Sites are all stored float weights, in sub-graphs too."""

    name: ClassVar[str] = "sparse"
    stage: ClassVar[Stage] = "numeric"
    integer: ClassVar[bool] = False

    def sites(self, model: ir.Model) -> Iterable[Site]:
        """Every weight that is worth encoding."""
        return _place.sites(model)

    def options(self, model: ir.Model, site: Site, ctx: Context) -> Iterable[Action]:
        """30 to 90 % zeros anywhere, or 2 of each 4 neighbours; values of 8 to 3 bits (thorough: float too)."""
        weight = ctx.weight(model, site.name)
        reason = refusal(weight, ctx)
        if reason:
            ctx.note(site.name, f"weights stay as they are: {reason}")
            return
        widths = (b for b in (BITS if ctx.thorough else USEFUL_BITS) if b == FLOAT or _one_axis(weight))
        made = []
        for bits in widths:
            made += [Action.of(self.name, sparsity=s, bits=bits) for s in SPARSITIES]
            if weight.matrix_shape[2] % 4 == 0:
                made.append(Action.of(self.name, pattern=PATTERN, bits=bits))
        found = made if ctx.thorough else _winners(weight, made, ctx)
        if not found:
            ctx.note(site.name, "no gain: zeros with a bitmask leave more error than n-bit weights in as many bytes")
        yield from found

    def estimate(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:
        """Bytes of the zeros and of values that round to zero; noise of a sample of rows, weighted by pivots."""
        weight = ctx.weight(model, site.name)
        asked = _params(action, weight)
        return _estimate(weight, asked, ctx)

    def apply(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:
        """Write mask and values, and correct the bias."""
        weight = _place.find(model, site.name)
        reason = refusal(weight, ctx)
        if reason:
            raise TechniqueError(f"sparse cannot change {site.name!r}: {reason}")
        asked = _params(action, weight)
        found = _absorb.moments(weight, ctx)
        matrix = weight.to_matrix(weight.array())
        coded = _coded(weight, matrix, found.matrix, asked, ctx)
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


def _params(action: Action, weight: Weight) -> _Asked:
    """The parameters of an action, checked. Raises TechniqueError."""
    sparsity, bits, text = action.get("sparsity"), int(action.get("bits", FLOAT)), str(action.get("pattern", ""))
    if bits not in BITS:
        raise TechniqueError(f"bits must be one of {BITS}, but got {bits}")
    if bits != FLOAT and not _one_axis(weight):
        raise TechniqueError(
            f"bits must be {FLOAT} for {weight.name!r} ({weight.main_use.role}, shape {weight.shape}): the scales "
            f"of its rows do not lie along one axis; got {bits}"
        )
    if not text:
        if not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
            raise TechniqueError(f"sparsity must be between 0 and 1 (the share of zeros), but got {sparsity}")
        return _Asked(float(sparsity), bits, _sparse.ANYWHERE)
    kept, _, of = text.partition(":")
    if not (kept.isdecimal() and of.isdecimal() and 0 < int(kept) < int(of)) or sparsity is not None:
        raise TechniqueError(
            f"pattern must be N:M with 0 < N < M (as {PATTERN}) and without sparsity, but got {text!r} and {sparsity}"
        )
    return _Asked(1 - int(kept) / int(of), bits, _sparse.Pattern(int(kept), int(of)))


def _one_axis(weight: Weight) -> bool:
    """True if the rows of the matrix lie along one axis of the stored layout, where a bitmask has its scales."""
    return _place.row_place(weight).block == 0


def _coded(weight: Weight, matrix: F32, second: F64 | None, asked: _Asked, ctx: Context) -> Encoded:
    """Prune and round (both cached), in the stored layout."""
    key = ("sparse", ctx.stats.key if ctx.stats else "", weight.name, asked.sparsity, asked.pattern)
    if key not in ctx.cache:
        ctx.cache[key] = _sparse.prune(matrix, second, sparsity=asked.sparsity, pattern=asked.pattern)
    pruned: _sparse.Pruned = ctx.cache[key]
    if asked.bits == FLOAT:
        values = weight.from_matrix(pruned.values)
        return encode.bitmask(values[values != 0], values != 0)
    if (*key, asked.bits) not in ctx.cache:
        ctx.cache[*key, asked.bits] = _gptq.quantize(matrix, second, bits=asked.bits, near=pruned.values)
    q: _gptq.Quantized = ctx.cache[*key, asked.bits]
    scale = q.scale.astype(np.float16) if _place.half_scale(q.scale, asked.bits) else q.scale
    codes, place = weight.from_matrix(q.codes), _place.row_place(weight)
    return encode.bitmask(
        codes[codes != 0], codes != 0, scale=scale.reshape(-1)[place.rows], bits=asked.bits, axis=place.axis
    )


@dataclass(frozen=True)
class _Sample:
    """Rows looked at, transposed and divided by `unit` (g, k, rows), `pivots` (g, k), `mass` (1, 1, rows)."""

    rows: F32
    unit: float
    pivots: F64
    mass: F64
    second: F64 | None
    facts: RowProfile


def _sample(weight: Weight, ctx: Context) -> _Sample:
    """Cached facts for estimates."""
    key = ("sparse sample", ctx.stats.key if ctx.stats else "", weight.name)
    if key in ctx.cache:
        cached: _Sample = ctx.cache[key]
        return cached
    facts = profile(weight, ctx)
    g, _, k = facts.rows.shape
    step = max(1, -(-facts.rows.size // SAMPLE))
    picked = facts.rows[:, ::step].transpose(0, 2, 1)
    unit = _gptq.power_of_two(picked)
    mass = facts.row_weight[:, ::step] * (facts.row_weight.sum() / facts.row_weight[:, ::step].sum())
    second = _absorb.moments(weight, ctx).matrix
    pivots = _sparse.pivots(second, g, k)
    found = _Sample(np.ascontiguousarray(picked / unit), float(unit), pivots, mass[:, None], second, facts)
    ctx.cache[key] = found
    return found


def _estimate(weight: Weight, asked: _Asked, ctx: Context) -> Estimate:
    """Bytes and noise; a sparsity of 0 stands for dense n-bit weights, on the same sample."""
    key = ("sparse estimate", ctx.stats.key if ctx.stats else "", weight.name, asked)
    if key not in ctx.cache:
        ctx.cache[key] = _fresh_estimate(weight, asked, ctx)
    found: Estimate = ctx.cache[key]
    return found


def _fresh_estimate(weight: Weight, asked: _Asked, ctx: Context) -> Estimate:
    sample = _sample(weight, ctx)
    kept, zeroed = _zeros(weight, asked, sample, ctx)
    place, facts = _place.row_place(weight), sample.facts
    codes, half, rounding = kept, False, 0.0
    cost = sample.pivots[:, :, None] * sample.mass
    if asked.bits != FLOAT:
        grid = _scales.first_grid(kept, sample.pivots.astype(np.float32), bits=asked.bits)
        codes = np.clip(np.rint(kept / grid.scale), grid.low, grid.high)
        half = _place.half_scale(grid.scale * np.float32(sample.unit), asked.bits)
        rounding = float((cost * np.square(kept - codes * grid.scale, dtype=np.float64)).sum())
    if asked.sparsity:
        count = round(float((codes != 0).mean()) * weight.array().size)
        scaled = asked.bits != FLOAT
        size = encode.sizes(
            weight.shape, "bitmask", asked.bits, axis=place.axis if scaled else None, nnz=count,
            half_scale=half, scaled=scaled,
        )  # fmt: skip
    else:
        size = _place.encoded_bytes(weight, asked.bits, 0, nbits=False, half=half)
    noise = (zeroed + COMPENSATION * rounding) * sample.unit**2
    return Estimate(size + facts.added_bytes, noise / facts.signal if facts.signal > 0 else 0.0)


def _zeros(weight: Weight, asked: _Asked, sample: _Sample, ctx: Context) -> tuple[F32, float]:
    """The sampled weights with their zeros, and what the zeros cost in units of the sample.

    Few columns: pruned in earnest. Many: the lowest D_i w_i^2 go for that price (0.7 to 1.1 of it is found over the
    layers of Lite0 and MiniLM, `growth` included, which stands for how little is left to make up for many zeros).
    """
    W, second = sample.rows, sample.second
    if not asked.sparsity:
        return W, 0.0
    if second is not None and second.ndim == 3 and second.shape[1] <= IN_EARNEST:
        key = ("sparse zeros", ctx.stats.key if ctx.stats else "", weight.name, asked.sparsity, asked.pattern)
        if key not in ctx.cache:
            natural = np.ascontiguousarray(W.transpose(0, 2, 1))
            pruned = _sparse.prune(natural, second, sparsity=asked.sparsity, pattern=asked.pattern)
            whole = float(np.einsum("gok,gkl,gol->", natural, second, natural, optimize=True))
            ctx.cache[key] = np.ascontiguousarray(pruned.values.transpose(0, 2, 1)), pruned.error * whole
        kept, price = ctx.cache[key]
        return kept, price * float(sample.mass.mean())
    cost = sample.pivots[:, :, None] * sample.mass * np.square(W, dtype=np.float64)
    mask = _sparse.by_score(cost.astype(np.float32), W, round(asked.sparsity * W.size), asked.pattern)
    growth = 1 + 4 * max(0.0, asked.sparsity - 0.5) ** 2
    return W * mask, COMPENSATION * growth * float((cost * ~mask).sum())


def _winners(weight: Weight, made: list[Action], ctx: Context) -> list[Action]:
    """Those that leave clearly less noise than dense n-bit weights of as many bytes (between widths: log-linear)."""
    if not _one_axis(weight) or weight.groups > 1:
        return []  # the few weights of a depthwise kernel have little to make up with: dense codes do better
    sample, winners = _sample(weight, ctx), []
    dense = [_estimate(weight, _Asked(0.0, bits, _sparse.ANYWHERE), ctx) for bits in reversed(DENSE_BITS)]
    sizes = np.array([e.size_bytes for e in dense], np.float64)
    logs = np.log([max(e.noise, 1e-30) for e in dense])

    def dense_noise(size: float) -> float:
        level = np.interp(size, sizes, logs)
        if size < sizes[0] < sizes[1]:  # below 2 bits the line goes on
            level = logs[0] + (size - sizes[0]) * (logs[1] - logs[0]) / (sizes[1] - sizes[0])
        return float(np.exp(level))

    for action in made:
        asked = _params(action, weight)
        price = _zeros(weight, asked, sample, ctx)[1] * sample.unit**2 / (sample.facts.signal or 1.0)
        bits = 1 + (1 - asked.sparsity) * asked.bits
        if price > GAIN * dense_noise(weight.array().size * bits / 8):
            continue  # its zeros alone cost too much, however its values are rounded
        found = _estimate(weight, asked, ctx)
        if found.size_bytes < weight.size_bytes and found.noise < GAIN * dense_noise(found.size_bytes):
            winners.append(action)
    return winners


TECHNIQUE: Technique = Sparse()
