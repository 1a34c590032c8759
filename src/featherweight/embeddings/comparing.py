"""Two tables judged by the same code on the same words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featherweight.embeddings import quality
from featherweight.embeddings.store import Words, load
from featherweight.embeddings.tasks import Task
from featherweight.errors import DataError

ROWS = 4096


@dataclass(frozen=True)
class Compared:
    """One score of both tables; `other` is None where there is only one. `n` items were judged, `left_out` not."""

    name: str
    value: float
    other: float | None
    n: int
    left_out: int


def compare(
    vectors: Path,
    other: Path | None = None,
    *,
    similarity: Sequence[Path] = (),
    analogies: Sequence[Path] = (),
    make_task: Callable[[list[str]], Task] | None = None,
    vocabulary: Path | None = None,
    tensor: str | None = None,
    skip_bad: bool = False,
    seed: int = 0,
) -> list[Compared]:
    """Scores of `vectors`, and of `other` beside them.

    Cosine and kept neighbours are over words drawn at random that both have. Raises DataError, e.g. where the two
    share no word.
    """
    one = load(vectors, vocabulary=vocabulary, tensor=tensor, skip_bad=skip_bad)
    two = None if other is None else load(other, vocabulary=vocabulary, skip_bad=skip_bad)
    made: list[Compared] = []
    if two is not None:
        made += _kept(one, two, seed)
    for path in similarity:
        made.append(_beside(quality.similarity(one, path), None if two is None else quality.similarity(two, path)))
    for path in analogies:
        made.append(_beside(quality.analogies(one, path), None if two is None else quality.analogies(two, path)))
    if make_task is not None:
        made.append(_beside(*(None if w is None else make_task(list(w)).score(w.rows) for w in (one, two))))
    if not made:
        raise DataError("there is nothing to judge by: give a second table, --similarity, --analogies or --task")
    return made


def _beside(score: quality.Score | None, other: quality.Score | None) -> Compared:
    assert score is not None, "the first table is always judged"
    return Compared(score.name, score.value, None if other is None else other.value, score.n, score.left_out)


def _kept(one: Words, two: Words, seed: int) -> list[Compared]:
    """How much of `one` is left in `two`: the first column is what a table keeps of itself."""
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(len(one))[: max(ROWS, quality.CANDIDATES)]
    pairs = [(int(r), two.row(w)) for r in drawn if (w := one.word(int(r))) in two]
    if not pairs:
        raise DataError(f"{one.where} and {two.where} share no word, so there is nothing to compare")
    mine, theirs = (np.array(rows) for rows in zip(*pairs, strict=True))
    made = []
    if one.dim == two.dim:
        few = np.arange(min(ROWS, len(pairs)))
        score = quality.mean_cosine(lambda i: one.rows(mine[i]), lambda i: two.rows(theirs[i]), few)
        made.append(Compared(score.name, 1.0, score.value, score.n, len(drawn) - len(pairs)))
    score = quality.overlap(lambda i: one.rows(mine[i]), lambda i: two.rows(theirs[i]), len(pairs), seed=seed)
    return [*made, Compared(score.name, 1.0, score.value, score.n, 0)]
