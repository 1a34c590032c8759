"""Which output of a model a metric looks at, and how its rows become one value a sample.

Rules, in order (an explicit `output=` name overrides all):
- class scores: the only output; one named like logits, scores, probabilities or labels; the first float output
  (rows, classes >= 2, ...); the first output.
- vectors of text: one named like a sentence embedding; the first (rows, tokens, features) output, averaged over the
  tokens that the attention mask in the feeds keeps; the first (rows, features) output; the first. A `pooler_output`
  comes last, as it was trained for something else.
- everything: all float outputs; what lies at padded tokens is set to zero, or averaged away where whole vectors are
  compared.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from featherweight.errors import DataError

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]
Kind = Literal["class", "vector", "vectors", "all", "raw"]

CLASS_WORDS = ("logit", "prob", "score", "softmax", "class", "label", "pred")
VECTOR_WORDS = ("embed", "vector", "feature", "hidden", "pooler", "latent", "encod")


def select(
    outputs: Outputs, kind: Kind, *, output: str | None = None, feeds: Outputs | None = None
) -> dict[str, Array]:
    """The outputs a metric of this kind reads, masked or averaged over tokens; applying it twice changes nothing."""
    feeds = feeds or {}
    if output is not None:
        if output not in outputs:
            near = difflib.get_close_matches(output, list(outputs), n=3)
            raise DataError(
                f"the metric's output must be one of {list(outputs)}, but got '{output}'"
                + (f"; did you mean {near}?" if near else "")
            )
        outputs = {output: outputs[output]}
    if kind == "raw":
        return dict(outputs)
    outputs = {k: v for k, v in outputs.items() if v.dtype.kind in "biuf"}
    if not outputs:
        raise DataError("a metric needs at least one output of numbers, but the model has none; give module:function")
    if kind in ("all", "vectors"):
        floats = {k: v for k, v in outputs.items() if _is_float(v)} or outputs
        if kind == "all":
            return {k: masked(v, feeds) for k, v in floats.items()}
        return {k: v if mask_of(v, feeds) is None else pooled(v, feeds) for k, v in floats.items()}
    name = _class_output(outputs) if kind == "class" else _vector_output(outputs, feeds)
    value = outputs[name]
    return {name: pooled(value, feeds) if kind == "vector" and value.ndim == 3 else value}


def pooled(value: Array, feeds: Outputs) -> Array:
    """Mean over tokens (rows, tokens, d) -> (rows, d) float32, of those the attention mask keeps (all without one)."""
    mask = mask_of(value, feeds)
    wide = value.astype(np.float32)
    if mask is None:
        return np.asarray(wide.mean(axis=1))
    weight = mask.astype(np.float32)[:, :, None]
    # Where and not times: a padded place may hold NaN.
    kept = np.where(weight > 0, wide, np.float32(0)) * weight
    return np.asarray(kept.sum(axis=1) / np.maximum(weight.sum(axis=1), 1e-9))


def masked(value: Array, feeds: Outputs) -> Array:
    """Values at padded tokens set to zero: nobody reads them, so they must not count."""
    mask = mask_of(value, feeds)
    if mask is None:
        return value
    return np.where(mask.astype(bool)[:, :, None], value, np.zeros((), value.dtype))


def mask_of(value: Array, feeds: Outputs) -> Array | None:
    """The attention mask (rows, tokens) among the feeds that fits `value` (rows, tokens, d), if any."""
    for name, feed in feeds.items() if value.ndim == 3 else ():
        if "mask" in name.lower() and feed.ndim == 2 and feed.shape == value.shape[:2] and feed.dtype.kind in "biuf":
            return feed
    return None


def as_rows(value: Array, n: int) -> Array | None:
    """(n, everything else); None if the n samples cannot be told apart (no axis of that length in front)."""
    if value.ndim and value.shape[0] == n:
        return value.reshape(n, -1)
    if n == 1:
        return value.reshape(1, -1)
    if value.ndim >= 2 and value.shape[1] == n:  # recurrent layout (time, batch, ...)
        return np.moveaxis(value, 1, 0).reshape(n, -1)
    return None


def class_ids(value: Array, labels_shape: tuple[int, ...] | None = None, threshold: float = 0.0) -> Array:
    """Winning class per position, int64; -1 where a score is not a number.

    The class axis is the one whose removal leaves `labels_shape`; without labels axis 1 of (n, c) and (n, c, h, w),
    the last of (n, t, c). A lone value per sample or label is a binary score: class 1 over `threshold`.
    """
    if value.dtype.kind in "biu":
        return np.asarray(value.astype(np.int64))
    if value.shape == labels_shape or value.ndim <= 1 or (value.ndim == 2 and value.shape[1] == 1):
        value = value if value.shape == labels_shape else value.reshape(-1)
        return np.asarray(np.where(np.isnan(value), -1, value > threshold).astype(np.int64))
    axis = _class_axis(value.shape, labels_shape)
    bad = np.isnan(value).any(axis=axis)
    return np.asarray(np.where(bad, -1, value.argmax(axis=axis)).astype(np.int64))


def binary_threshold(name: str, value: Array) -> float:
    """Where class 1 begins for a lone score: 0 for one named logit, 0.5 for a probability by name or by its values."""
    low = name.lower()
    if "logit" in low:
        return 0.0
    finite = value[np.isfinite(value)] if value.dtype.kind == "f" else value
    within = bool(finite.size) and float(finite.min()) >= 0 and float(finite.max()) <= 1
    return 0.5 if "prob" in low or "sigmoid" in low or within else 0.0


def _class_axis(shape: tuple[int, ...], labels_shape: tuple[int, ...] | None) -> int:
    if labels_shape is None:
        return len(shape) - 1 if len(shape) == 3 else 1
    fits = [a for a in range(1, len(shape)) if shape[:a] + shape[a + 1 :] == labels_shape]
    if not fits:
        raise DataError(
            f"labels must have the shape of the output without its class axis, but the output is {shape} and "
            f"the labels are {labels_shape}; choose another output or metric"
        )
    return fits[-1] if len(shape) == 3 else fits[0]


def _class_output(outputs: Outputs) -> str:
    if len(outputs) == 1:
        return next(iter(outputs))
    for word in CLASS_WORDS:
        for name, value in outputs.items():
            if word in name.lower() and (_is_float(value) or word == "label"):
                return name
    for name, value in outputs.items():
        if _is_float(value) and value.ndim >= 2 and value.shape[1] >= 2:
            return name
    return next(iter(outputs))


def _vector_output(outputs: Outputs, feeds: Outputs) -> str:
    floats = {k: v for k, v in outputs.items() if _is_float(v)} or dict(outputs)
    for name, value in floats.items():
        if "sentence" in name.lower() and value.ndim == 2:
            return name
    tokens = [k for k, v in floats.items() if v.ndim == 3]
    fitting = [k for k in tokens if mask_of(floats[k], feeds) is not None]
    flat = [k for k, v in floats.items() if v.ndim <= 2 and "pooler" not in k.lower()]
    return next(iter(fitting or flat or tokens or floats))


def _is_float(value: Array) -> bool:
    return value.dtype.kind == "f"
