"""From decisions to a compressed table: fit on the sample, then code every row in one pass over the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherweight.core import Action, Decision, Progress, Silent
from featherweight.embeddings import choices
from featherweight.embeddings.choices import DROP, GAIN, Space
from featherweight.embeddings.compressed import Compressed, Part, joined
from featherweight.embeddings.survey import MIN_NORM, Survey
from featherweight.embeddings.table import F32, Table
from featherweight.errors import PlanError
from featherweight.graph import encode
from featherweight.techniques import _vectors

PACKED_ROWS = 1 << 16


@dataclass(frozen=True, eq=False)
class Coder:
    """How one run of columns is coded: a product's codebooks, or the scales of a linear grid."""

    columns: npt.NDArray[np.int64]
    action: Action
    book: npt.NDArray[np.float16]

    def codes(self, rows: F32) -> npt.NDArray[np.uint8] | npt.NDArray[np.int8]:
        """Codes of rows (n, all columns)."""
        mine = np.ascontiguousarray(rows[:, self.columns])
        if self.action.technique == "linear":
            return choices.linear_codes(mine, self.book, int(self.action.get("bits")))[0]
        return _vectors.encode_product(mine, self.book, stages=int(self.action.get("stages")))

    @property
    def n_codes(self) -> int:
        """Codes of a row."""
        return len(self.columns) if self.action.technique == "linear" else len(self.book)

    def part(self, codes: npt.NDArray[np.integer]) -> Part:
        """The coded table of all rows, packed some rows at a time, as packing takes several times their bytes."""
        bits, pieces = int(self.action.get("bits")), np.array_split(codes, max(1, -(-len(codes) // PACKED_ROWS)))
        if self.action.technique == "linear":
            return joined([Part.of(encode.linear(c, self.book, bits, axis=1)) for c in pieces])
        stages = int(self.action.get("stages"))
        return joined([Part.of(encode.product(c, self.book, bits, stages=stages)) for c in pieces])


def coders(found: Survey, space: Space, decisions: Mapping[str, Decision]) -> list[Coder]:
    """Fitted coders of the runs that are kept, runs of equal action as one. Raises PlanError."""
    sample = space.columns(found.sample)
    made = []
    for columns, action in _merged(space, decisions):
        mine = np.ascontiguousarray(sample[:, columns])
        if action.technique == "linear":
            made.append(Coder(columns, action, choices.linear_scale(mine, int(action.get("bits")))))
        else:
            book = _vectors.fit_product(
                mine, found.sample_weights, width=int(action.get("width")), bits=int(action.get("bits")),
                stages=int(action.get("stages")),
            )  # fmt: skip
            made.append(Coder(columns, action, book))
    return made


def _merged(space: Space, decisions: Mapping[str, Decision]) -> Iterator[tuple[npt.NDArray[np.int64], Action]]:
    by_action: dict[Action, list[int]] = {}
    for run in choices.runs(space.width):
        decision = decisions.get(choices.site(run))
        if decision is None or len(decision.actions) != 1:
            raise PlanError(
                f"a plan for this table must decide about {choices.site(run)!r} with one action, but has none"
            )
        if decision.actions[0] != DROP:
            by_action.setdefault(decision.actions[0], []).extend(range(*run))
    for action, columns in by_action.items():
        yield np.array(columns), action


def build(
    table: Table,
    found: Survey,
    space: Space,
    decisions: Sequence[Decision],
    *,
    row_of: npt.NDArray[np.unsignedinteger] | None = None,
    kept_rows: npt.NDArray[np.int64] | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Code every row of `table` as decided. `kept_rows` are the rows to store and `row_of` where each row is found,
    if words were cut; columns keep the order of their actions.
    """
    shown = progress or Silent()
    chosen = {d.site: d for d in decisions}
    shown.start("fitting codebooks")
    fitted = coders(found, space, chosen)
    n = found.rows if kept_rows is None else len(kept_rows)
    stored = [np.empty((n, c.n_codes), np.int8 if c.action.technique == "linear" else np.uint8) for c in fitted]
    shown.start("coding rows", found.rows)
    at = start = 0
    for block in table.blocks():
        vectors = block.vectors
        shown.advance(len(vectors))
        if kept_rows is not None:
            low, high = np.searchsorted(kept_rows, [start, start + len(vectors)])
            start += len(vectors)
            vectors = vectors[kept_rows[low:high] - (start - len(block.vectors))]
        if not len(vectors):
            continue
        norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
        columns = space.columns((vectors / np.maximum(norms, MIN_NORM)[:, None]).astype(np.float32))
        for coder, codes in zip(fitted, stored, strict=True):
            codes[at : at + len(vectors)] = coder.codes(columns)
        at += len(vectors)
    stored.reverse()
    parts = [coder.part(stored.pop()) for coder in fitted]  # each array of codes goes as soon as it is packed
    return Compressed(
        columns=tuple(parts),
        gain=_gain(found, chosen, kept_rows, needed=not fitted),
        basis=_basis(space, fitted),
        mean=_mean(found, space, fitted),
        place=_place(space, fitted),
        row_of=row_of,
        dim=found.dim,
    )


def _basis(space: Space, fitted: Sequence[Coder]) -> Part | None:
    """The axes of the columns that are left, in their order."""
    if space.basis is None or not fitted:
        return None
    return Part.of(choices.basis_encoded(space.basis[np.concatenate([c.columns for c in fitted])]))


def _place(space: Space, fitted: Sequence[Coder]) -> npt.NDArray[np.uint16] | None:
    """Where each column of a table without a basis went; those that were dropped are where the zeros are."""
    columns = np.concatenate([c.columns for c in fitted]) if fitted else np.zeros(0, np.int64)
    if space.basis is not None or np.array_equal(columns, np.arange(space.dim)):
        return None
    place = np.full(space.dim, len(columns), np.uint16)
    place[columns] = np.arange(len(columns))
    return place


def _mean(found: Survey, space: Space, fitted: Sequence[Coder]) -> F32 | None:
    return space.mean if fitted else found.mean


def _gain(
    found: Survey, chosen: Mapping[str, Decision], kept_rows: npt.NDArray[np.int64] | None, *, needed: bool
) -> Part | None:
    """Lengths of the stored rows; where all are equal and not 1 (or nothing else is stored), that one length."""
    norms = found.norms if kept_rows is None else found.norms[kept_rows]
    decision = chosen.get(GAIN)
    if decision is None:
        book, bits = np.array([float(found.norms.mean())], np.float32), 1
        if abs(book[0] - 1) < 1e-4 and not needed:
            return None
    else:
        bits = int(decision.actions[0].get("bits"))
        book = choices.gain_book(found, bits)
    codes = choices.nearest_level(norms, book).astype(np.uint8)
    return Part.of(encode.palette(codes[:, None], book, bits))
