"""What a table is used for: texts become the mean of their words' vectors, and are compared or classified.

A table of text with a score a pair is judged by Spearman's correlation of cosines; one with labels by the accuracy of
a linear classifier (ridge regression to one-hot targets, in closed form) on texts it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.data import tables
from featherweight.data.text import LABEL_COLUMNS, PAIR_COLUMNS, SCORE_COLUMNS, TEXT_COLUMNS
from featherweight.embeddings.quality import Score, cosines, unit
from featherweight.embeddings.store import Words
from featherweight.embeddings.table import F32
from featherweight.errors import DataError, MissingExtraError
from featherweight.runtime import scores

Ids = list[list[int]]
IdsOf = Callable[[Sequence[str]], Ids]
TEST_SHARE = 4  # without a file to train on, every 4th text is held out
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, eq=False)
class Task:
    """Texts as row numbers. With `gold`: pairs (texts 2i, 2i + 1) and their scores; else classes of train and test."""

    name: str
    metric: str
    texts: Ids
    gold: npt.NDArray[np.float64] | None = None
    labels: npt.NDArray[np.int64] | None = None
    train: npt.NDArray[np.bool_] | None = None

    def score(self, rows: Callable[[npt.NDArray[np.int64]], F32]) -> Score:
        """Judge a table by its rows."""
        vectors = means(self.texts, rows)
        if self.gold is not None:
            near = cosines(vectors[0::2], vectors[1::2])
            return Score(self.name, float(scores.spearman(near[None], self.gold[None])[0]), len(self.gold))
        assert self.labels is not None, "a task has scores or labels"
        assert self.train is not None, "a task with labels has texts to train on"
        right = predicted(unit(vectors), self.labels, self.train) == self.labels[~self.train]
        return Score(self.name, float(right.mean()), len(right))


def means(texts: Ids, rows: Callable[[npt.NDArray[np.int64]], F32]) -> F32:
    """Mean vector (n, dim) of each text; zeros for a text without a known word."""
    used = np.unique(np.concatenate([np.array(t, np.int64) for t in texts]))
    table = rows(used)
    at = [np.searchsorted(used, t) for t in texts]
    return np.stack([table[i].mean(axis=0) if len(i) else np.zeros(table.shape[1], np.float32) for i in at])


def predicted(vectors: F32, labels: npt.NDArray[np.int64], train: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Classes of the texts not in `train`; the ridge is the best of RIDGES by leave-one-out error on `train`."""
    x = np.concatenate([vectors, np.ones((len(vectors), 1), np.float32)], axis=1).astype(np.float64)
    a, target = x[train], np.eye(int(labels.max()) + 1)[labels[train]]
    values, axes = np.linalg.eigh(a.T @ a)
    turned, moment = a @ axes, axes.T @ (a.T @ target)
    best: tuple[float, npt.NDArray[np.float64]] | None = None
    for ridge in RIDGES:
        inverse = 1 / (np.maximum(values, 0) + ridge * len(a) / 100)
        weights = inverse[:, None] * moment
        leverage = np.einsum("nd,d,nd->n", turned, inverse, turned)
        left = (target - turned @ weights) / np.maximum(1 - leverage, 1e-6)[:, None]
        error = float(np.square(left).sum())
        if best is None or error < best[0]:
            best = (error, axes @ weights)
    assert best is not None, "there are ridges to try"
    return np.asarray((x[~train] @ best[1]).argmax(axis=1))


def load_task(path: Path, ids_of: IdsOf, *, train: Path | None = None) -> Task:
    """The task of a .tsv or .csv: sentence1, sentence2, score; or text, label, with `train` a file to learn from.

    Without `train` every 4th text is held out. Raises DataError for other columns or scores that are no numbers.
    """
    names = tables.header(path)
    pair = next((p for p in PAIR_COLUMNS if set(p) <= set(names)), None)
    score = next((c for c in SCORE_COLUMNS if c in names), None)
    if pair is not None and score is not None:
        return _pairs(path, pair, score, ids_of)
    text = tables.column(names, TEXT_COLUMNS, path)
    label = tables.column(names, LABEL_COLUMNS, path)
    test = [(row[text], row[label]) for _, row in tables.rows(path)]
    if train is not None:
        learnt = [(row[text], row[label]) for _, row in tables.rows(train)]
        flags = np.array([True] * len(learnt) + [False] * len(test))
    else:
        learnt, flags = [], np.arange(len(test)) % TEST_SHARE != TEST_SHARE - 1
    everything = learnt + test
    if len(everything) < 2 or flags.all() or not flags.any():
        raise DataError(f"{path} must hold texts to learn from and to judge on, but it has {len(test)}")
    classes = {name: i for i, name in enumerate(sorted({label for _, label in everything}))}
    labels = np.array([classes[label] for _, label in everything])
    return Task(path.stem, "accuracy", ids_of([t for t, _ in everything]), labels=labels, train=flags)


def _pairs(path: Path, pair: tuple[str, str], score: str, ids_of: IdsOf) -> Task:
    texts: list[str] = []
    gold: list[float] = []
    for line, row in tables.rows(path):
        try:
            gold.append(float(row[score]))
        except ValueError as e:
            raise DataError(f"{path} line {line}: the score must be a number, but got {row[score]!r}") from e
        texts += [row[pair[0]], row[pair[1]]]
    if len(gold) < 2:
        raise DataError(f"{path} must hold at least 2 pairs, but holds {len(gold)}")
    return Task(path.stem, "spearman", ids_of(texts), gold=np.array(gold))


def ids_by_tokenizer(path: Path, rows: int) -> IdsOf:
    """Token ids by a tokenizer.json, without special tokens. Raises MissingExtraError, DataError."""
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        raise MissingExtraError("a tokenizer.json needs the package 'tokenizers'; install featherweight[text]") from e
    try:
        tool: Any = Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises plain Exception for whatever its file holds
        raise DataError(f"{path} is not a tokenizer.json ({e})") from e
    tool.no_padding()
    tool.no_truncation()

    def ids_of(texts: Sequence[str]) -> Ids:
        encoded = tool.encode_batch(list(texts), add_special_tokens=False)
        return [[i for i in e.ids if i < rows] for e in encoded]

    return ids_of


def ids_by_word(words: Words) -> IdsOf:
    """Row numbers of the words between white space, in lower case where the word itself is not there."""

    def of(text: str) -> list[int]:
        each = (w if w in words else w.strip(".,;:!?\"'()").lower() for w in text.split())
        return [words.row(w) for w in each if w in words]

    return lambda texts: [of(t) for t in texts]
