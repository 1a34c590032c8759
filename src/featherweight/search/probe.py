"""Gains: how much of the noise at one site reaches the model's outputs, by a few real runs a site.

All weights of the float model become overridable inputs of one session, so perturbing a site costs one run and
no reload. The perturbation is the site's weight rounded to a few bits, whose local noise is known in closed form;
the gain is output noise over local noise. Small noises add up about linearly (Nagel et al. 2021, section 4.3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph.weights import Weight
from featherweight.runtime.metrics import Metric

PROBE_BITS = 4
MIN_GAIN = 1e-4


def overridable(model: ir.Model, weights: Iterable[Weight]) -> tuple[ir.Model, list[Weight]]:
    """A copy whose main-graph weights are inputs with defaults; returns it with the weights that could be opened."""
    copy = surgery.copy_model(model)
    opened = []
    for w in weights:
        value = copy.graph.initializers.get(w.name)
        if value is not None and w.graph is model.graph and w.value.dtype == ir.DataType.FLOAT:
            copy.graph.inputs.append(value)
            opened.append(w)
    return copy, opened


def perturbed(matrix: np.ndarray, mean: np.ndarray | None = None, *, bits: int = PROBE_BITS) -> np.ndarray:
    """Round (groups, out, k) float32 to a symmetric `bits` grid per output channel; all-zero channels stay.

    With the input mean (groups, k) the change is made to leave the mean output alone, as biases absorb that part.
    """
    top = 2 ** (bits - 1) - 1
    scale = np.abs(matrix).max(axis=-1, keepdims=True) / top
    scale[scale == 0] = 1
    delta = np.round(matrix / scale) * scale - matrix
    if mean is not None:
        length = np.maximum((mean**2).sum(axis=-1), 1e-30)
        delta = delta - np.einsum("gok,gk,gl->gol", delta, mean, mean / length[:, None], optimize=True)
    moved: np.ndarray = (matrix + delta).astype(np.float32)
    return moved


def relative_noise(
    matrix: np.ndarray, changed: np.ndarray, second_moment: np.ndarray | None, mean: np.ndarray | None
) -> float:
    """E||dW x||^2 / E||W (x - mean)||^2 from (groups, out, k) weights, (groups, k, k) moments, (groups, k) means.

    Without moments the inputs count as white with unit variance.
    """
    delta = (changed - matrix).astype(np.float64)
    wide = matrix.astype(np.float64)
    if second_moment is None:
        return float((delta**2).sum() / max((wide**2).sum(), 1e-30))
    centred = second_moment if mean is None else second_moment - mean[:, :, None] * mean[:, None, :]
    noise = float(np.einsum("gok,gkl,gol->", delta, second_moment, delta, optimize=True))
    signal = float(np.einsum("gok,gkl,gol->", wide, centred, wide, optimize=True))
    return max(noise, 0.0) / max(signal, 1e-30)


def output_noise(reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Mean over the float outputs of sum (y - y0)^2 / sum (y0 - mean y0)^2; infinite if a value is not finite."""
    ratios = []
    for name, y0 in reference.items():
        if not np.issubdtype(y0.dtype, np.floating):
            continue
        if other[name].shape != y0.shape:
            return float("inf")
        wide = y0.astype(np.float64)
        keep = np.isfinite(wide)
        if not keep.any():
            continue
        wide = wide[keep]
        diff = other[name].astype(np.float64)[keep] - wide
        if not np.isfinite(diff).all():
            return float("inf")
        ratios.append(float((diff**2).sum() / max(((wide - wide.mean()) ** 2).sum(), 1e-30)))
    return float(np.mean(ratios)) if ratios else 0.0


def child_probe(
    model_path: str,
    weights_path: str,
    names: Sequence[str],
    feeds: Sequence[Mapping[str, np.ndarray]],
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """In the child: output noise of each site's perturbation, averaged over `feeds`. `weights_path` is an npz."""
    from featherweight.runtime import ort

    session = ort.session(Path(model_path), threads=threads)
    reference = [session.run(f) for f in feeds]
    noises: dict[str, float] = {}
    with np.load(weights_path, allow_pickle=False) as arrays:
        for i, name in enumerate(names):
            override = {name: arrays[str(i)]}
            each = [output_noise(r, session.run({**f, **override})) for f, r in zip(feeds, reference, strict=True)]
            noises[name] = float(np.mean(each))
            if progress is not None:
                progress(i + 1, len(names))
    return noises


def divergence(reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float | None:
    """Mean KL divergence over rows of the float outputs' last axis, in nats; None if no output has classes.

    Rows that are no probabilities count as logits.
    """
    found = []
    for name, y0 in reference.items():
        if not np.issubdtype(y0.dtype, np.floating) or y0.ndim < 2 or y0.shape[-1] < 2:
            continue
        p, q = (log_probabilities(a[name].astype(np.float64)) for a in (reference, other))
        found.append(float(np.mean((np.exp(p) * (p - q)).sum(axis=-1))))
    return float(np.mean(found)) if found else None


def log_probabilities(rows: np.ndarray) -> np.ndarray:
    """Log of the softmax along the last axis, or of the rows themselves where they are probabilities."""
    sums = rows.sum(axis=-1)
    if (rows >= 0).all() and np.allclose(sums, 1, atol=1e-3):
        return np.asarray(np.log(np.maximum(rows, 1e-30)))
    shifted = rows - rows.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


#: What the last reference answered, in the child, by (file, when it was written, metric, digest of the feeds).
_ANSWERED: dict[tuple[object, ...], list[dict[str, np.ndarray]]] = {}
MOST_KEPT = 64 << 20


def child_divergence(
    reference_path: str, other_path: str, feeds: Sequence[Mapping[str, np.ndarray]], threads: int, metric: Metric
) -> tuple[float, float | None]:
    """In the child: noise and KL divergence of one model against another in what `metric` reads, over `feeds`.

    What the reference answers is kept for the next call with the same file and feeds.
    """
    from featherweight.runtime import ort

    answered = _answers(reference_path, feeds, threads, metric)
    other = ort.session(Path(other_path), threads=threads)
    noises, apart = [], []
    for feed, mine in zip(feeds, answered, strict=True):
        theirs = metric.select(other.run(feed), feed)
        noises.append(output_noise(mine, theirs))
        apart.append(divergence(mine, theirs))
    known = [d for d in apart if d is not None]
    return float(np.mean(noises)), float(np.mean(known)) if known else None


def _answers(
    path: str, feeds: Sequence[Mapping[str, np.ndarray]], threads: int, metric: Metric
) -> list[dict[str, np.ndarray]]:
    from featherweight.runtime import ort

    key = (path, Path(path).stat().st_mtime_ns, metric.name, metric.output, _digest(feeds))
    if key in _ANSWERED:
        return _ANSWERED[key]
    session = ort.session(Path(path), threads=threads)
    found = [metric.select(session.run(f), f) for f in feeds]
    _ANSWERED.clear()
    if sum(x.nbytes for a in found for x in a.values()) <= MOST_KEPT:
        _ANSWERED[key] = found
    return found


def _digest(feeds: Sequence[Mapping[str, np.ndarray]]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for feed in feeds:
        for name, x in feed.items():
            found.update(f"{name} {x.dtype} {x.shape}".encode())
            found.update(np.ascontiguousarray(x).data if x.dtype.kind != "O" else repr(x.tolist()).encode())
    return found.digest()


def gains(output: Mapping[str, float], local: Mapping[str, float]) -> dict[str, float]:
    """Gain by site; a site that could not be probed, or was not moved by the probe, gets the median gain."""
    known = {s: output[s] / n for s, n in local.items() if s in output and n > 1e-12 and np.isfinite(output[s])}
    median = float(np.median(list(known.values()))) if known else 1.0
    return {s: max(known.get(s, median), MIN_GAIN) for s in local}
