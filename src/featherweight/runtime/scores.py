"""The arithmetic of metrics: per-sample scores of one batch, and their aggregates over (resampled) data.

Every score takes a `Judged` batch, its outputs already reduced to what the metric reads, and gives (n, ...) float64.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.errors import DataError
from featherweight.runtime.outputs import Array, Outputs, as_rows, binary_threshold, class_ids

Float = npt.NDArray[np.float64]
Labels = Array | None


@dataclass(frozen=True, slots=True)
class Judged:
    """One batch to score: `n` samples, each of `rows` rows of `outputs`; `reference` holds the original's outputs."""

    outputs: Outputs
    reference: Outputs
    labels: Labels
    rows: int
    n: int

    @property
    def only(self) -> tuple[str, Array]:
        """Name and value of the one output."""
        ((name, value),) = self.outputs.items()
        return name, value


def imported(name: str) -> Callable[..., Any]:
    """The function behind `module:function`. Raises DataError if there is none."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as e:
        raise DataError(
            f"the metric '{name}' must be an importable module:function, but: {e}; is its folder on PYTHONPATH?"
        ) from e
    if not callable(found):
        raise DataError(f"the metric '{name}' must be a function, but is a {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


def class_labels(labels: Array) -> bool:
    """True for whole numbers and for one-hot rows."""
    if labels.dtype.kind in "biu":
        return True
    if labels.dtype.kind != "f":
        return False
    return labels.ndim == 2 and labels.shape[1] >= 2 and bool(np.all(np.sort(labels, axis=1)[:, :-1] == 0))


def _ids_of_labels(labels: Array, value: Array, n: int) -> Array:
    """Class numbers (n, ...): one-hot rows become numbers, (n, 1) becomes (n,)."""
    if labels.ndim == 2 and labels.shape == value.shape and labels.shape[1] >= 2 and class_labels(labels):
        return np.asarray(labels.argmax(axis=1))
    if labels.dtype.kind not in "biu":
        raise DataError(f"class labels must be whole numbers, but got {labels.dtype}; use spearman for gold scores")
    return labels.reshape(n) if labels.size == n else labels


def top_k(k: int, batch: Judged) -> Float:
    """1.0 where the label is among the k highest scores (mean over positions); NaN scores count as wrong."""
    (name, value), labels, n = batch.only, batch.labels, batch.n
    assert labels is not None
    ids = _ids_of_labels(labels, value, n)
    if n == 1 and (value.ndim == 0 or value.shape[0] != 1):
        value = value[None]
    if value.ndim == 2 and value.dtype.kind == "f" and value.shape[1] >= 2 and ids.shape == (n,):
        classes = value.shape[1]
        if ids.size and (ids.min() < 0 or ids.max() >= classes):
            raise DataError(
                f"labels must be in 0..{classes - 1} for the output '{name}' of {classes} classes, but got "
                f"{ids.min()}..{ids.max()}; some networks keep class 0 for background"
            )
        if k > 1 and classes <= k:
            raise DataError(f"top{k} needs more than {k} classes, but '{name}' has {classes}; use accuracy")
        mine = np.take_along_axis(value, ids[:, None].astype(np.intp), axis=1)
        order = np.arange(classes)[None]
        # Ties go to the lower class, as argmax does.
        ahead = (value > mine) | ((value == mine) & (order < ids[:, None]))
        good = (ahead.sum(axis=1) < k) & ~np.isnan(value).any(axis=1)
        return np.asarray(good, np.float64)
    if k > 1:
        raise DataError(f"top{k} needs scores (samples, classes), but '{name}' is {value.shape}")
    won = class_ids(value, ids.shape, binary_threshold(name, value))
    if won.size != ids.size:
        raise DataError(f"labels {labels.shape} must fit the output '{name}' {value.shape}; choose another output")
    return np.asarray((won.reshape(n, -1) == ids.reshape(n, -1)).mean(axis=1))


def agreement(batch: Judged) -> Float:
    """1.0 where the winning class is the original's (mean over positions)."""
    name, value = batch.only
    reference = batch.reference[name]
    threshold = binary_threshold(name, reference)
    won, theirs = (class_ids(x, None, threshold) for x in (value, reference))
    same = won == theirs if won.shape == theirs.shape else np.zeros(theirs.shape, bool)
    found = as_rows(same, batch.n)
    return np.full(batch.n, same.mean()) if found is None else np.asarray(found.mean(axis=1, dtype=np.float64))


def cosine(batch: Judged) -> Float:
    """(n, outputs): cosine of each sample's output to the original's; 0 if not finite or only one is zero."""
    columns = []
    for name, theirs in batch.reference.items():
        a, b = _pair(batch.outputs[name], theirs, batch.n)
        with np.errstate(invalid="ignore", over="ignore"):
            norm = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
            value = np.where(norm > 0, (a * b).sum(axis=1) / np.where(norm > 0, norm, 1.0), 0.0)
        both_zero = ~a.any(axis=1) & ~b.any(axis=1)
        value = np.where(both_zero, 1.0, np.where(np.isfinite(value), value, 0.0))
        columns.append(np.broadcast_to(np.clip(value, -1.0, 1.0), (batch.n,)))
    return np.stack(columns, axis=1)


def kl(batch: Judged) -> Float:
    """KL(original || candidate) in nats; scores are softmaxed unless the original's rows are probabilities already."""
    name, value = batch.only
    theirs = batch.reference[name]
    axis = theirs.ndim - 1 if theirs.ndim in (1, 3) else 1
    if theirs.ndim == 0 or theirs.shape[axis] < 2:
        raise DataError(f"kl needs scores of at least 2 classes, but '{name}' is {theirs.shape}; use cosine or sqnr")
    p, q = (np.moveaxis(x.astype(np.float64), axis, -1) for x in (theirs, value))
    if are_probabilities(p.reshape(-1, p.shape[-1])):
        tiny = 1e-12
        log_p, log_q = (
            np.log(x / x.sum(axis=-1, keepdims=True)) for x in (np.clip(p, tiny, None), np.clip(q, tiny, None))
        )
    else:
        log_p, log_q = _log_softmax(p), _log_softmax(q)
    each = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    each = np.where(np.isnan(each), np.inf, np.maximum(each, 0.0))
    found = as_rows(each, batch.n)
    return np.full(batch.n, each.mean()) if found is None else np.asarray(found.mean(axis=1))


def sqnr(batch: Judged) -> Float:
    """(n, outputs, 2): energy of the original's output and of the difference, to which equal infinities add nothing."""
    columns = []
    for name, theirs in batch.reference.items():
        got, want = _pair(batch.outputs[name], theirs, batch.n)
        with np.errstate(invalid="ignore", over="ignore"):
            diff = np.where((got == want) | (np.isnan(got) & np.isnan(want)), 0.0, got - want)
        noise = np.where(np.isfinite(diff).all(axis=1), (diff * diff).sum(axis=1), np.inf)
        signal = (np.where(np.isfinite(want), want, 0.0) ** 2).sum(axis=1)
        # Where samples cannot be told apart, the batch's energies are shared out evenly.
        columns.append(np.broadcast_to(np.stack([signal, noise], axis=1), (batch.n, 2)) * (len(signal) / batch.n))
    return np.stack(columns, axis=1)


def similarity(batch: Judged) -> Float:
    """What is ranked: the cosine of a pair's vectors (rows 2i, 2i+1), or the one number a sample."""
    (name, value), n = batch.only, batch.n
    flat = value.reshape(value.shape[0], -1).astype(np.float64) if value.ndim else value.reshape(1, 1)
    if batch.rows == 2:
        if flat.shape[0] != 2 * n:
            raise DataError(f"{n} pairs need {2 * n} rows, but the output '{name}' has {flat.shape[0]}")
        a, b = flat[0::2], flat[1::2]
        norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        value = np.where(norm > 0, (a * b).sum(axis=1) / np.where(norm > 0, norm, 1.0), 0.0)
        return np.asarray(np.where(np.isfinite(value), value, -1.0))
    if flat.shape != (n, 1):
        raise DataError(
            f"spearman needs one number a sample or pairs of vectors, but '{name}' is {value.shape} for {n} samples"
        )
    return np.asarray(np.where(np.isfinite(flat[:, 0]), flat[:, 0], -np.inf))


def custom(name: str, batch: Judged) -> Float:
    """Whatever the user's function(outputs, labels) gives: one value a sample, or one number."""
    try:
        value = np.asarray(imported(name)(dict(batch.outputs), batch.labels), dtype=np.float64)
    except DataError:
        raise
    except Exception as e:  # the user's code may raise anything; the cause stays attached
        raise DataError(f"the metric {name} must return numbers, but raised {type(e).__name__}: {e}") from e
    if value.ndim > 1 or (value.ndim == 1 and len(value) != batch.n):
        raise DataError(f"the metric {name} must return one number or {batch.n} of them, but got shape {value.shape}")
    return np.asarray(value)


def mean_worst(values: Float, _labels: Labels) -> Float:
    """(b, n) -> mean; (b, n, outputs) -> the smallest of the outputs' means."""
    means = values.mean(axis=1)
    return means if means.ndim == 1 else np.asarray(means.reshape(len(means), -1).min(axis=1))


def sqnr_db(values: Float, _labels: Labels) -> Float:
    """(b, n, outputs, 2) -> dB of the worst output; infinite without noise."""
    signal, noise = np.moveaxis(values.sum(axis=1), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        db = 10 * np.log10(signal / noise)
    db = np.where(noise == 0, np.inf, np.where(np.isnan(db), -np.inf, db))
    return np.asarray(db.min(axis=1))


def spearman(values: Float, labels: Labels) -> Float:
    """Rank correlation (b,) of `values` (b, n) with `labels` (b, n); ties share ranks; 0 if one side is constant."""
    if labels is None:
        raise DataError("spearman needs gold scores, but the data has none")
    if values.shape[1] < 2:
        raise DataError(f"spearman needs at least 2 samples, but got {values.shape[1]}")
    x, y = ranks(values), ranks(labels.reshape(values.shape))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    norm = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return np.asarray(np.where(norm > 0, (x * y).sum(axis=1) / np.where(norm > 0, norm, 1.0), 0.0))


def ranks(values: npt.NDArray[Any]) -> Float:
    """Rank 1..n of each entry within its row (b, n); ties share the mean of their ranks."""
    out = np.empty(values.shape, np.float64)
    for row, found in zip(values, out, strict=True):
        ordered = np.sort(row)
        found[:] = (np.searchsorted(ordered, row, "left") + np.searchsorted(ordered, row, "right") + 1) / 2
    return out


def spearman_resampled(values: Float, labels: Labels, rows: npt.NDArray[np.intp]) -> Float:
    """`spearman` of each draw in `rows` (b, n) without sorting each: how often a value was drawn gives its ranks."""
    if labels is None or len(values) < 2:
        return spearman(values[rows], None if labels is None else labels[rows])
    b, n = rows.shape
    drawn = np.bincount((rows + np.arange(b)[:, None] * n).ravel(), minlength=b * n).reshape(b, n).astype(np.float64)
    x, y = (_ranks_when_drawn(v.reshape(n), drawn) for v in (values, labels))
    middle = (n + 1) / 2
    x, y = x - middle, y - middle
    norm = np.sqrt((drawn * x * x).sum(axis=1) * (drawn * y * y).sum(axis=1))
    return np.asarray(np.where(norm > 0, (drawn * x * y).sum(axis=1) / np.where(norm > 0, norm, 1.0), 0.0))


def _ranks_when_drawn(values: Array, drawn: Float) -> Float:
    """Mean rank (b, n) of each value among a draw that holds it `drawn` (b, n) times; ties share theirs."""
    _, first, group = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(first)))
    size = np.add.reduceat(drawn[:, order], starts, axis=1)
    rank = np.cumsum(size, axis=1) - size + (size + 1) / 2
    return np.asarray(rank[:, group])


def _pair(value: Array, reference: Array, n: int) -> tuple[Float, Float]:
    """Both as (n, everything) float64; (1, everything) if samples cannot be told apart."""
    if value.shape != reference.shape:
        raise DataError(
            f"the candidate's output must have the original's shape {reference.shape}, but got {value.shape}"
        )
    a, b = (as_rows(x, n) for x in (value, reference))
    if a is None or b is None:
        a, b = value.reshape(1, -1), reference.reshape(1, -1)
    return a.astype(np.float64), b.astype(np.float64)


def are_probabilities(value: Array) -> bool:
    """True if every row is non-negative and sums to one."""
    return bool(value.size and value.min() >= 0 and np.allclose(value.sum(axis=-1), 1.0, atol=1e-3))


def _log_softmax(x: Float) -> Float:
    shifted = x - x.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
