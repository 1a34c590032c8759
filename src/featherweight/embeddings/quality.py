"""How good a table is, and how much of it another keeps: cosines, neighbours, similarity lists, analogies, tasks.

All numbers are of one table, so that the original and a compressed one are judged by the same code on the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featherweight.embeddings.store import Words
from featherweight.embeddings.table import F32
from featherweight.errors import DataError
from featherweight.runtime import scores

Rows = Callable[[npt.NDArray[np.int64]], F32]
QUERIES, CANDIDATES, NEIGHBOURS = 256, 50_000, 10
ANALOGY_WORDS = 30_000  # as gensim and word2vec: only the most frequent words may be answers


@dataclass(frozen=True)
class Score:
    """One number: `value` of `n` items; `left_out` items had words that the table lacks."""

    name: str
    value: float
    n: int
    left_out: int = 0


def unit(vectors: F32) -> F32:
    """Rows of length 1; zero rows stay zero."""
    sizes = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    return np.asarray(vectors / np.where(sizes > 0, sizes, 1)[:, None], np.float32)


def cosines(one: F32, other: F32) -> npt.NDArray[np.float64]:
    """Cosine of each pair of rows (n,); 1 where both are zero, 0 where one is."""
    made = np.einsum("nd,nd->n", unit(one), unit(other), dtype=np.float64)
    both = ~one.any(axis=1) & ~other.any(axis=1)
    return np.asarray(np.where(both, 1.0, made))


def mean_cosine(one: Rows, other: Rows, rows: npt.NDArray[np.int64]) -> Score:
    """Mean cosine of a vector with its counterpart, over some rows."""
    return Score("cosine", float(cosines(one(rows), other(rows)).mean()), len(rows))


def overlap(one: Rows, other: Rows, n_rows: int, *, k: int = NEIGHBOURS, seed: int = 0) -> Score:
    """Share of a word's k nearest words that stay among its k nearest, mean over QUERIES words drawn at random.

    Of a table with more than CANDIDATES rows that many are drawn, and neighbours are looked for among them.
    """
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(n_rows, min(n_rows, CANDIDATES), replace=False))
    asked = np.sort(rng.choice(len(rows), min(len(rows), QUERIES), replace=False))
    k = min(k, len(rows) - 1)
    if k < 1:
        return Score(f"neighbours@{NEIGHBOURS}", 1.0, 0)
    near = [nearest(unit(of(rows)), asked, k) for of in (one, other)]
    return Score(f"neighbours@{k}", shared(*near), len(asked))


def shared(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> float:
    """Mean share of each row of `one` (n, k) that is in the same row of `other`; 1 for k = 0."""
    pairs = zip(one.tolist(), other.tolist(), strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in pairs])) if one.size else 1.0


def nearest(vectors: F32, asked: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.int64]:
    """Rows (len(asked), k) of the k nearest by cosine to rows `asked` of unit vectors, themselves left out."""
    if k < 1:
        return np.zeros((len(asked), 0), np.int64)
    near = vectors[asked] @ vectors.T
    near[np.arange(len(asked)), asked] = -np.inf
    return np.asarray(np.argpartition(-near, k - 1, axis=1)[:, :k])


def pairs_of(path: Path) -> list[tuple[str, str, float]]:
    """Word pairs with a human score: two words and a number a line, tabs between; # begins a comment.

    Raises DataError naming the line that is otherwise.
    """
    found = []
    for number, line in _lines(path):
        parts = line.split("\t")
        try:
            if len(parts) < 3:
                raise ValueError(f"{len(parts)} fields")
            found.append((parts[0].strip(), parts[1].strip(), float(parts[2])))
        except ValueError as e:
            raise DataError(
                f"{path} line {number} must be two words and a score between tabs ({e}): {line[:60]!r}"
            ) from e
    if len(found) < 2:
        raise DataError(f"the similarity list {path} must hold at least 2 pairs, but holds {len(found)}")
    return found


def similarity(words: Words, path: Path, *, fold_case: bool = True) -> Score:
    """Spearman correlation of cosines with human scores, over the pairs whose words are both known.

    `fold_case`: a word that is not there is looked for in lower case.
    """
    pairs = pairs_of(path)
    known = [(_row(words, a, fold_case), _row(words, b, fold_case), s) for a, b, s in pairs]
    kept = [(a, b, s) for a, b, s in known if a is not None and b is not None]
    if len(kept) < 2:
        return Score(path.stem, float("nan"), 0, len(pairs))
    one, other = words.rows([a for a, _, _ in kept]), words.rows([b for _, b, _ in kept])
    gold = np.array([s for _, _, s in kept])
    return Score(
        path.stem, float(scores.spearman(cosines(one, other)[None], gold[None])[0]), len(kept), len(pairs) - len(kept)
    )


def _row(words: Words, word: str, fold_case: bool) -> int | None:
    for each in (word, word.lower()) if fold_case else (word,):
        if each in words:
            return words.row(each)
    return None


def analogies(words: Words, path: Path, *, fold_case: bool = True) -> Score:
    """Share of "a is to b as c is to d" where d is nearest to b - a + c among the first 30,000 words (3CosAdd).

    Mikolov 2013, arXiv:1301.3781; a, b and c are no answers. The file is word2vec's questions-words.txt.
    """
    asked: list[list[int]] = []
    left_out = 0
    limit = min(len(words), ANALOGY_WORDS)
    for number, line in _lines(path):
        if line.startswith(":"):
            continue
        parts = line.split()
        if len(parts) != 4:
            raise DataError(f"{path} line {number} must be four words, but got {line[:60]!r}")
        rows = (_row(words, w, fold_case) for w in parts)
        known = [r for r in rows if r is not None and r < limit]
        if len(known) < 4:
            left_out += 1
        else:
            asked.append(known)
    if not asked:
        return Score("analogies", float("nan"), 0, left_out)
    table = unit(words.rows(np.arange(limit)))
    right = 0
    for start in range(0, len(asked), 256):
        a, b, c, d = np.array(asked[start : start + 256]).T
        near = unit(table[b] - table[a] + table[c]) @ table.T
        for given in (a, b, c):
            near[np.arange(len(a)), given] = -np.inf
        right += int((near.argmax(axis=1) == d).sum())
    return Score("analogies", right / len(asked), len(asked), left_out)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and not line.startswith("#"):
                    yield number, line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path} cannot be read: {e}") from e


def spread(n_rows: int, weights: Sequence[float] | npt.NDArray[np.float64], n: int, seed: int) -> npt.NDArray[np.int64]:
    """Up to n different rows, drawn by weight; rows of weight 0 never."""
    shares = np.asarray(weights, np.float64)
    usable = int(np.count_nonzero(shares))
    if usable <= n:
        return np.flatnonzero(shares) if usable else np.arange(min(n, n_rows))
    return np.sort(np.random.default_rng(seed).choice(n_rows, n, replace=False, p=shares / shares.sum()))
