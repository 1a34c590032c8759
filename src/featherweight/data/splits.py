"""Calibration, validation and holdout: ranges come from the first, the search looks at the second, the third
is reported once.

The rule. With a `split` column its words decide: calibration or train rows are shared by calibration and
validation (if there
are no validation rows), evaluation or test rows are the holdout. Otherwise atoms (samples, or batches where
the user fixed them)
are drawn by fractions, evenly over classes or scores when labelled. Each part gets at least one atom; two atoms make
calibration = validation and a holdout, one atom is all three: then a Note says that nothing is proved on unseen data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherweight.core import Note
from featherweight.data.dataset import Array, Dataset
from featherweight.errors import DataError

Unit = tuple[int, ...]
CALIBRATION, VALIDATION, HOLDOUT = "calibration", "validation", "holdout"
#: Shares of all data that guard training and that it is reported on.
GUARD, UNSEEN = 0.12, 0.18
_WORDS = {
    CALIBRATION: ("calibration", "calib", "train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev"),
    HOLDOUT: ("holdout", "evaluation", "eval", "test", "testing"),
}


@dataclass(frozen=True)
class Splits:
    """The three parts; disjoint unless a note says otherwise."""

    calibration: Dataset
    validation: Dataset
    holdout: Dataset
    notes: tuple[Note, ...] = ()


def tag_of(word: str) -> str | None:
    """The part a word of a split column stands for, '' for an empty one, None if it stands for none."""
    plain = word.strip().lower()
    if not plain:
        return ""
    return next((part for part, words in _WORDS.items() if plain in words), None)


def split_words() -> str:
    """The accepted words, for a message."""
    return ", ".join(w for words in _WORDS.values() for w in words)


def split(
    dataset: Dataset,
    *,
    calibration: float = 0.3,
    validation: float = 0.3,
    seed: int = 0,
    max_calibration: int | None = None,
    evaluation: Dataset | None = None,
) -> Splits:
    """Divide a dataset; the rest after both fractions is the holdout. The same seed gives the same parts.

    With `evaluation` all of `dataset` is calibration, and `evaluation` is divided in validation and holdout.
    `max_calibration` (atoms) bounds calibration; what is over goes to the holdout, or, where a split column or
    `evaluation`
    settles the holdout, to validation or nowhere.
    Raises DataError on fractions out of range or an empty dataset.
    """
    if not (calibration > 0 and validation > 0 and calibration + validation < 1):
        raise DataError(
            f"calibration and validation must be > 0 and sum to less than 1, but got {calibration} and {validation}"
        )
    if max_calibration is not None and max_calibration < 1:
        raise DataError(f"max_calibration must be >= 1, but got {max_calibration}")
    for part in (dataset, evaluation):
        if part is not None and not part.groups:
            raise DataError(
                f"{'calibration' if part is dataset else 'evaluation'} data is empty: {part.source} "
                "holds no batch; give at least one"
            )
    rng = np.random.default_rng(seed)
    if evaluation is not None:
        return _two_sources(dataset, evaluation, validation / (1 - calibration), max_calibration, rng)
    tags = _tags(dataset)
    if tags and CALIBRATION in tags and HOLDOUT in tags:
        return _by_tags(dataset, tags, calibration / (calibration + validation), max_calibration, rng)
    notes = []
    if tags and set(tags) - {""}:
        only = ", ".join(sorted(set(tags) - {""}))
        notes.append(
            Note(
                dataset.source,
                f"its split column has only {only}: divided by fractions instead (needs calibration "
                "or train, and evaluation or test)",
            )
        )
    return _by_fractions(dataset, calibration, validation, max_calibration, rng, notes)


def split_to_teach(dataset: Dataset, *, seed: int = 0, evaluation: Dataset | None = None) -> Splits:
    """Divide a dataset for training a student: most of it, as calibration, teaches; validation guards.

    A student that `compress` made was fitted to its calibration data; photos it was fitted to say that it is better
    than it is, and no training would ever seem to help. So the division begins as `split`'s with the same seed, and
    validation is taken from what was not fitted to: `GUARD` of all, and `UNSEEN` stays the holdout where nobody said
    which that is. Raises DataError on an empty dataset.
    """
    first = split(dataset, seed=seed, evaluation=evaluation)
    tags = _tags(dataset) or []
    own, val, hold = (part.units() for part in (first.calibration, first.validation, first.holdout))
    if evaluation is not None or VALIDATION in tags or own == val or val == hold:
        return first
    rng = np.random.default_rng([seed, 1])
    if CALIBRATION in tags and HOLDOUT in tags:
        n_val = min(max(1, round((len(own) + len(val)) * GUARD / (1 - UNSEEN))), len(val))
        val, more = _deal(dataset, val, [n_val, len(val) - n_val], rng)
    elif len(hold) > 1:
        n = len(own) + len(val) + len(hold)
        n_hold = min(max(1, round(n * UNSEEN)), len(hold) - 1)
        n_val = min(max(1, round(n * GUARD)), len(hold) - n_hold)
        more = val
        hold, val, rest = _deal(dataset, hold, [n_hold, n_val, len(hold) - n_hold - n_val], rng)
        more = [*more, *rest]
    else:
        return first
    teach, guard, unseen = (dataset.of_units(sorted(p)) for p in ([*own, *more], val, hold))
    return Splits(teach, guard, unseen, first.notes)


def _tags(dataset: Dataset) -> list[str] | None:
    tags = dataset.origin.tags
    return None if tags is None else [tags[unit[0]] for unit in dataset.units()]


def _by_fractions(
    dataset: Dataset,
    calibration: float,
    validation: float,
    limit: int | None,
    rng: np.random.Generator,
    notes: list[Note],
) -> Splits:
    units = dataset.units()
    n = len(units)
    if n < 3:
        return _tiny(dataset, units, notes)
    n_cal = min(max(1, round(n * calibration)), limit or n, n - 2)
    n_val = min(max(1, round(n * validation)), n - n_cal - 1)
    parts = _deal(dataset, units, [n_cal, n_val, n - n_cal - n_val], rng)
    own, val, hold = (dataset.of_units(p) for p in parts)
    return Splits(own, val, hold, tuple(notes))


def _tiny(dataset: Dataset, units: list[Unit], notes: list[Note]) -> Splits:
    first, last = dataset.of_units(units[:1]), dataset.of_units(units[-1:])
    if len(units) == 1:
        text = "only one batch: all three parts are the same data and nothing is proved on unseen data; give at least 3"
    else:
        text = "only two batches: calibration and validation are the same one; give at least 3"
    return Splits(first, first, last, (*notes, Note(dataset.source, text)))


def _by_tags(
    dataset: Dataset, tags: Sequence[str], share: float, limit: int | None, rng: np.random.Generator
) -> Splits:
    units = dataset.units()
    of = {
        part: [u for u, t in zip(units, tags, strict=True) if t == part] for part in (CALIBRATION, VALIDATION, HOLDOUT)
    }
    notes = []
    unused = sum(t == "" for t in tags)
    if unused:
        notes.append(Note(dataset.source, f"{unused} rows have an empty split and are not used"))
    own, val = of[CALIBRATION], of[VALIDATION]
    if not val and len(own) == 1:
        val = own
        notes.append(Note(dataset.source, "only one calibration row: validation uses it too"))
    elif not val:
        n_cal = min(max(1, round(len(own) * share)), limit or len(own), len(own) - 1)
        own, val = _deal(dataset, own, [n_cal, len(own) - n_cal], rng)
    elif limit is not None and len(own) > limit:
        own = _deal(dataset, own, [limit, len(own) - limit], rng)[0]
    return Splits(dataset.of_units(own), dataset.of_units(val), dataset.of_units(of[HOLDOUT]), tuple(notes))


def _two_sources(
    dataset: Dataset, evaluation: Dataset, share: float, limit: int | None, rng: np.random.Generator
) -> Splits:
    own, units = dataset.units(), evaluation.units()
    if limit is not None and len(own) > limit:
        own = _deal(dataset, own, [limit, len(own) - limit], rng)[0]
    notes = []
    tags = _tags(evaluation) or []
    if VALIDATION in tags and HOLDOUT in tags:
        val, hold = ([u for u, t in zip(units, tags, strict=True) if t == part] for part in (VALIDATION, HOLDOUT))
    elif len(units) == 1:
        val = hold = units
        notes.append(
            Note(
                evaluation.source,
                "only one evaluation batch: the search sees the data the result is reported on; give at least 2",
            )
        )
    else:
        n_val = min(max(1, round(len(units) * share)), len(units) - 1)
        val, hold = _deal(evaluation, units, [n_val, len(units) - n_val], rng)
    return Splits(dataset.of_units(own), evaluation.of_units(val), evaluation.of_units(hold), tuple(notes))


def _deal(dataset: Dataset, units: Sequence[Unit], counts: Sequence[int], rng: np.random.Generator) -> list[list[Unit]]:
    """Deal atoms into parts of exactly these sizes, evenly along their labels; each part ascends.

    Walks the atoms ordered by label and gives each to the part that is furthest behind its share, so that
    every run of
    like labels is divided in proportion.
    """
    order = _order(_keys(dataset, units), len(units), rng)
    n, left = len(units), list(counts)
    parts: list[list[Unit]] = [[] for _ in counts]
    for step, i in enumerate(order, start=1):
        behind = [c * step / n - len(p) if room else -np.inf for c, p, room in zip(counts, parts, left, strict=True)]
        to = int(np.argmax(behind))
        parts[to].append(units[i])
        left[to] -= 1
    return [sorted(p) for p in parts]


def _order(keys: npt.NDArray[np.generic] | None, n: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Positions in random order, like labels together: classes in random order, scores in ascending order."""
    shuffled = rng.permutation(n)
    if keys is None:
        return shuffled
    _, ranks = np.unique(keys, return_inverse=True)
    if keys.dtype.kind in "iub":
        ranks = rng.permutation(int(ranks.max()) + 1)[ranks]
    return shuffled[np.argsort(ranks[shuffled], kind="stable")]


def _keys(dataset: Dataset, units: Sequence[Unit]) -> Array | None:
    """One label a unit, or None where there are none or units hold several samples."""
    atoms = [a for unit in units for a in unit]
    if not dataset.has_labels or len(atoms) > len(units) or bool(np.any(dataset.origin.sizes()[atoms] != 1)):
        return None
    labels = dataset.origin.labels(atoms)
    return labels if labels is not None and labels.ndim == 1 else None
