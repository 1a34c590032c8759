"""What can be done to each run of columns, at how many bytes and at what error: the table that the solver takes.

Errors are measured: codebooks are fitted to one part of the sample and judged on the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherweight.core import Action, Decision, Effect, Progress, Silent
from featherweight.embeddings.survey import Survey
from featherweight.embeddings.table import F32
from featherweight.graph import encode
from featherweight.search.solve import Choice
from featherweight.techniques import _codebook, _vectors

F64 = npt.NDArray[np.float64]
BLOCK = 16  # columns that are decided about together
FIT_ROWS, TEST_ROWS, FIT_ITERATIONS = 6144, 3072, 5
#: (width, bits, stages): from 5 bits a column down to a quarter.
PRODUCTS = (
    (1, 5, 1), (1, 4, 1), (1, 3, 1), (1, 2, 1), (2, 8, 1), (2, 7, 1), (2, 6, 1), (2, 5, 1), (4, 8, 1), (4, 7, 1),
    (4, 6, 1), (4, 5, 1), (8, 8, 2), (8, 8, 1), (8, 7, 1), (8, 6, 1), (8, 5, 1), (16, 8, 2), (16, 8, 1), (16, 6, 1),
)  # fmt: skip
LINEAR_BITS = (8, 6)
GAIN_BITS = 8
GAIN = "lengths"
DROP = Action.of("drop")


@dataclass(frozen=True, eq=False)
class Space:
    """Directions as columns: (unit row - mean) @ basis.T. Without a basis they are the unit rows themselves.

    `basis` (k, dim) has orthonormal rows, most variance first; `mean` (dim,).
    """

    name: str
    dim: int
    basis: F32 | None = None
    mean: F32 | None = None

    def columns(self, unit: F32) -> F32:
        """Columns (n, k) float32 of unit rows (n, dim)."""
        if self.basis is None or self.mean is None:
            return unit
        return np.asarray((unit - self.mean) @ self.basis.T, np.float32)

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.dim if self.basis is None else len(self.basis)

    def bytes_of(self, columns: int) -> int:
        """Bytes that so many columns cost beside their codes: their rows of the basis, in 8 bits."""
        return 0 if self.basis is None else columns * (self.dim + 2)


def spaces(found: Survey) -> tuple[Space, ...]:
    """The columns as they are, and the principal axes around the weighted mean (Pearson 1901)."""
    plain = Space("as they are", found.dim)
    values, vectors = np.linalg.eigh(found.covariance)
    order = np.argsort(-values, kind="stable")
    real = order[values[order] > max(float(values.max()), 0.0) * 1e-10]
    if not len(real):
        return (plain,)
    axes = np.ascontiguousarray(vectors[:, real].T, np.float32)
    return plain, Space("principal axes", found.dim, axes, found.mean)


def runs(width: int) -> list[tuple[int, int]]:
    """Blocks of BLOCK columns as (start, stop); the last may be short."""
    return [(a, min(a + BLOCK, width)) for a in range(0, width, BLOCK)]


def site(run: tuple[int, int]) -> str:
    """Name of a run of columns."""
    return f"columns {run[0]} to {run[1] - 1}"


@dataclass(frozen=True, eq=False)
class Errors:
    """What each action leaves of each run of columns, whatever the number of rows; `lengths`: of the gains."""

    space: Space
    runs: tuple[tuple[tuple[int, int], tuple[tuple[Action, float], ...]], ...]
    lengths: tuple[tuple[Action, float], ...]

    def table(self, kept: int, *, flatten: float = 0.0) -> dict[str, list[Choice]]:
        """All choices of each run and of the lengths, with the bytes they take of a table that keeps `kept` rows.

        `flatten`: divide errors by that power of the run's variance a column, so that columns of little variance count
        more. Classifiers read them too, and in means of words of one topic they stand out from the rounding.
        """
        made: dict[str, list[Choice]] = {}
        for run, found in self.runs:
            columns = run[1] - run[0]
            variance = max(dict(found)[DROP] / columns, 1e-12)
            factor = variance**-flatten
            made[site(run)] = [
                _choice(site(run), action, action_bytes(action, kept, columns, self.space), error * factor)
                for action, error in found
            ]
        if self.lengths:
            made[GAIN] = [_choice(GAIN, a, kept + (4 << GAIN_BITS), error) for a, error in self.lengths]
        return made


def _choice(name: str, action: Action, size: int, error: float) -> Choice:
    return Choice(Decision(name, (action,)), Effect(size_bytes=size, loss=error))


def action_bytes(action: Action, kept: int, columns: int, space: Space) -> int:
    """Bytes of a run of columns."""
    if action == DROP:
        return 0
    bits = int(action.get("bits"))
    if action.technique == "linear":
        return linear_bytes(kept, columns, bits) + space.bytes_of(columns)
    width, stages = int(action.get("width")), int(action.get("stages"))
    return product_bytes(kept, columns, width, bits, stages, 1 << bits) + space.bytes_of(columns)


def measured(found: Survey, space: Space, progress: Progress | None = None) -> Errors:
    """Try every action on every run of columns of the sample."""
    sample, weights = space.columns(found.sample), found.sample_weights
    fit, test = _halves(len(sample))
    shown, every = progress or Silent(), runs(space.width)
    shown.start(f"trying codes on the columns {space.name}", len(every))
    made = []
    for run in every:
        columns = np.ascontiguousarray(sample[:, run[0] : run[1]])
        tried = tuple(_run_errors(columns[fit], weights[fit], columns[test], weights[test]))
        made.append((run, tried))
        shown.advance()
    return Errors(space, tuple(made), tuple(_gain_errors(found)))


def _halves(rows: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows to fit to and rows to judge on; the same ones where there are few."""
    if rows < 4 * BLOCK:
        return np.arange(rows), np.arange(rows)
    order = np.random.default_rng(0).permutation(rows)
    n = min(FIT_ROWS, rows * 2 // 3)
    return np.sort(order[:n]), np.sort(order[n : n + TEST_ROWS])


def _run_errors(fit: F32, fit_weights: F64, test: F32, test_weights: F64) -> Iterator[tuple[Action, float]]:
    width = fit.shape[1]
    share = max(float(test_weights.sum()), 1e-30)

    def error(left: F32) -> float:
        return float(test_weights @ np.einsum("nd,nd->n", left, left, dtype=np.float64)) / share

    yield DROP, error(test)
    for bits in LINEAR_BITS:
        codes, scale = linear_codes(test, linear_scale(fit, bits), bits)
        yield Action.of("linear", bits=bits), error(test - codes * scale)
    for action in products(width):
        w, bits, stages = (int(action.get(k)) for k in ("width", "bits", "stages"))
        book = _vectors.fit_product(fit, fit_weights, width=w, bits=bits, stages=stages, iterations=FIT_ITERATIONS)
        near = _vectors.decode_product(_vectors.encode_product(test, book, stages=stages), book, stages=stages)
        yield action, error(test - near)


def products(columns: int) -> Iterator[Action]:
    """Products that fit so many columns."""
    for width, bits, stages in PRODUCTS:
        if columns % width == 0:
            yield Action.of("product", width=width, bits=bits, stages=stages)


def product_bytes(rows: int, columns: int, width: int, bits: int, stages: int, levels: int) -> int:
    """Bytes of codes and codebooks."""
    groups = stages * columns // width
    return rows * row_bytes(groups, bits) + groups * levels * width * 2


def row_bytes(codes: int, bits: int) -> int:
    """Bytes of a row of so many codes: whole bytes for each of the fields of 4, 2 and 1 bits."""
    step = 1 if bits == 8 else 8 if bits % 2 else 4 if bits & 2 else 2
    return -(-codes // step) * step * bits // 8


def linear_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of codes and one half-precision scale a column."""
    return rows * row_bytes(columns, bits) + 2 * columns


def linear_scale(columns: F32, bits: int) -> npt.NDArray[np.float16]:
    """Step of each column (k,): its largest value becomes the largest code."""
    top = np.abs(columns).max(axis=0) if len(columns) else np.zeros(columns.shape[1])
    return np.asarray(np.maximum(top / (2 ** (bits - 1) - 1), 2.0**-14), np.float16)


def linear_codes(
    columns: F32, scale: npt.NDArray[np.float16], bits: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Codes (n, k), rounded to nearest and clipped, and the scale widened."""
    wide = scale.astype(np.float32)
    high = 2 ** (bits - 1) - 1
    return np.clip(np.rint(columns / wide), -high, high).astype(np.int8), wide


def _gain_errors(found: Survey) -> Iterator[tuple[Action, float]]:
    """Lengths in 8 bits (a row of one code takes a whole byte anyway); none where all are equal and none is 0."""
    used = found.norms > 0
    norms, weights = found.norms[used], found.weights[used]
    if len(norms) and not found.n_zero and float(norms.max() - norms.min()) < 1e-4 * float(norms.mean()):
        return
    book = gain_book(found, GAIN_BITS)
    left = norms / np.maximum(book[nearest_level(norms, book)], 1e-30) - 1
    yield Action.of("palette", bits=GAIN_BITS), float(weights @ np.square(left, dtype=np.float64))


def gain_book(found: Survey, bits: int) -> F32:
    """Sorted levels (<= 2**bits,) of the lengths, with 0 first where there are zero rows."""
    used = found.norms > 0
    norms, zero = found.norms[used], int(found.n_zero > 0)
    if not len(norms):
        return np.zeros(1, np.float32)
    relative = (found.weights[used] / np.square(norms, dtype=np.float64)).astype(np.float64)
    book = _codebook.kmeans(norms, (relative / relative.max()).astype(np.float32), (1 << bits) - zero)
    return np.concatenate([np.zeros(zero, np.float32), book])


def nearest_level(values: F32, book: F32) -> npt.NDArray[np.intp]:
    """Index of the nearest of sorted levels; a value of 0 takes a level of 0 alone, others never do."""
    if book[0] == 0 and len(book) > 1:
        inner = np.searchsorted((book[2:] + book[1:-1]) / 2, values) + 1
        return np.where(values == 0, 0, inner)
    return np.searchsorted((book[1:] + book[:-1]) / 2, values)


def basis_encoded(basis: F32) -> encode.Encoded:
    """The basis in 8 bits, one half-precision scale a row."""
    scale = np.maximum(np.abs(basis).max(axis=1) / 127, 2.0**-14).astype(np.float16)
    codes = np.clip(np.rint(basis / scale.astype(np.float32)[:, None]), -127, 127).astype(np.int8)
    return encode.linear(codes, scale, 8, axis=0)
