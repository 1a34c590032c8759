"""Tables of vectors as products of codebooks (Jegou 2011, product quantization, TPAMI 33): below 2 bits a number.

Each row is cut into runs of a few columns, and each run is named by one code of 8 or 6 bits. Codebooks are clustered
with the rows' use in the calibration data as weights, so that frequent words are kept best; zero rows stay zero. Rows
of a vocabulary are decoded as they are looked up. The same functions compress tables of word vectors.
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
from featherweight.graph.encode.layout import Kind
from featherweight.graph.weights import Weight
from featherweight.techniques import _absorb, _place, _vectors
from featherweight.techniques._profile import profile, refusal
from featherweight.techniques._protocol import Context, Estimate, Technique

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
WIDTHS, BITS = (2, 4, 8), (8, 6)
MIN_ROWS = 64
#: Codebooks may take this share of the bytes of the codes.
BOOK_SHARE = 0.5
FIT_ROWS, JUDGED_ROWS, SAMPLED_COLUMNS = 6144, 3072, 64
ALL_ROWS, ITERATIONS = 16384, 5


class EmbeddingPq:
    """See the module's text. Sites are stored tables that a Gather reads row by row, tied ones too."""

    name: ClassVar[str] = "embedding_pq"
    stage: ClassVar[Stage] = "numeric"
    integer: ClassVar[bool] = False

    def sites(self, model: ir.Model) -> Iterable[Site]:
        """Every table of at least MIN_ROWS rows."""
        for site in _place.sites(model):
            if is_table(_place.find(model, site.name)):
                yield site

    def options(self, model: ir.Model, site: Site, ctx: Context) -> Iterable[Action]:
        """Runs of 2, 4 or 8 columns, codes of 8 or 6 bits (at least a bit a number), where codebooks stay small."""
        weight = ctx.weight(model, site.name)
        reason = refusal(weight, ctx)
        if reason:
            ctx.note(site.name, f"vectors stay as they are: {reason}")
            return
        rows, columns = weight.shape
        found = False
        for width in WIDTHS:
            for bits in BITS:
                books = (columns // width) * (1 << bits) * width * 2
                if (
                    columns % width == 0
                    and bits >= width
                    and books <= BOOK_SHARE * rows * (columns // width) * bits / 8
                ):
                    found = True
                    yield Action.of(self.name, width=width, bits=bits)
        if not found:
            ctx.note(site.name, f"too few rows ({rows} of {columns}) for codebooks of vectors to pay")

    def estimate(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:
        """Exact bytes; noise is that of rows and columns that the codebooks were not fitted to."""
        weight = ctx.weight(model, site.name)
        width, bits = _params(action, weight)
        kind: Kind = "lookup" if _place.looked_up(weight) else "product"
        groups = weight.shape[1] // width
        coded = encode.sizes(weight.shape, kind, bits, groups=groups, half_scale=True, inner="product")
        facts = profile(weight, ctx)
        if facts.signal <= 0:
            return Estimate(coded, 0.0)
        table, use = weight.array(), _use(weight, ctx)
        importance = np.asarray(facts.importance[0], np.float64)
        step = max(1, weight.shape[1] // SAMPLED_COLUMNS // width) * width
        picked = np.concatenate([np.arange(a, a + width) for a in range(0, weight.shape[1], step)])
        fit, judged = _halves(len(table), ctx.seed)
        books = _vectors.fit_product(
            np.ascontiguousarray(table[np.ix_(fit, picked)]), use[fit], width=width, bits=bits, seed=ctx.seed,
            iterations=ITERATIONS,
        )  # fmt: skip
        test = np.ascontiguousarray(table[np.ix_(judged, picked)])
        left = np.square(test - _vectors.decode_product(_vectors.encode_product(test, books), books), dtype=np.float64)
        share = float(use.sum() / use[judged].sum()) * weight.shape[1] / len(picked)
        return Estimate(coded, float(use[judged] @ left @ importance[picked]) * share / facts.signal)

    def apply(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:
        """Write codes and codebooks."""
        weight = _place.find(model, site.name)
        reason = refusal(weight, ctx)
        if reason or not is_table(weight):
            raise TechniqueError(f"embedding_pq cannot code {site.name!r}: {reason or 'it is no table of rows'}")
        width, bits = _params(action, weight)
        key = (self.name, ctx.stats.key if ctx.stats else "", weight.name, width, bits)
        if key not in ctx.cache:
            ctx.cache[key] = coded_table(weight.array(), _use(weight, ctx), width=width, bits=bits, seed=ctx.seed)
        codes, books = ctx.cache[key]
        stored, size = _place.attach(model, weight, encode.product(codes, books, bits))
        return (Site(site.name, "weight", (stored.name or "",), site.nodes, size),)

    def finish(self, model: ir.Model, ctx: Context) -> None:
        """Nothing is left to do."""


def is_table(weight: Weight) -> bool:
    """True for a stored (rows, columns) read row by row, whose rows are also those of any product with it."""
    gathers = [u for u in weight.uses if u.role == "gather"]
    plain = all(not u.layout and _place.gather_axis(u.node) == 0 for u in gathers)
    rows = weight.shape[0] if len(weight.shape) == 2 else 0
    return bool(gathers) and plain and rows >= MIN_ROWS and weight.matrix_shape == (1, *weight.shape)


def coded_table(
    table: F32, use: F64, *, width: int, bits: int, seed: int = 0
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
    """Codes (rows, groups) and codebooks (groups, levels, width) float16; zero rows take vectors of zeros."""
    zero = ~table.any(axis=1)
    rows = np.flatnonzero(~zero)
    if len(rows) > ALL_ROWS:
        often = np.argsort(-use[rows], kind="stable")[: ALL_ROWS // 2]
        rest = np.setdiff1d(np.arange(len(rows)), often)
        rows = np.sort(rows[np.concatenate([often, rest[:: max(1, len(rest) // (ALL_ROWS // 2))]])])
    sample = np.ascontiguousarray(table[rows])
    books = _vectors.fit_product(sample, use[rows], width=width, bits=bits, seed=seed)
    if zero.any():
        # One vector of each codebook becomes zero: the one nearest to it, which loses least.
        nearest = np.square(books.astype(np.float32)).sum(axis=2).argmin(axis=1)
        books[np.arange(len(books)), nearest] = 0
    return _vectors.encode_product(table, books), books


def _use(weight: Weight, ctx: Context) -> F64:
    """How much each row counts (rows,)."""
    counts = _absorb.row_weights(weight, ctx)
    return np.ones(weight.shape[0]) if counts is None else counts


def _halves(rows: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows to fit to and rows to judge on; the same ones where there are few."""
    if rows < 4 * MIN_ROWS:
        return np.arange(rows), np.arange(rows)
    order = np.random.default_rng(seed).permutation(rows)
    n = min(FIT_ROWS, rows * 2 // 3)
    return np.sort(order[:n]), np.sort(order[n : n + JUDGED_ROWS])


def _params(action: Action, weight: Weight) -> tuple[int, int]:
    """(width, bits) of an action, checked. Raises TechniqueError."""
    width, bits = int(action.get("width", 4)), int(action.get("bits", 8))
    if not 1 <= bits <= 8 or width < 1 or weight.shape[-1] % width:
        raise TechniqueError(
            f"width must divide the {weight.shape[-1]} columns of {weight.name!r} and bits be 1..8, "
            f"but got {width=}, {bits=}"
        )
    return width, bits


TECHNIQUE: Technique = EmbeddingPq()
