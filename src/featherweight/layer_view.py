"""Layer by layer, what structure could save: the rank that keeps the energy, and what removing input channels costs."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featherweight.core import Note
from featherweight.errors import DataError

if TYPE_CHECKING:
    from featherweight.graph.cost import NodeCost
    from featherweight.graph.weights import Weight
    from featherweight.stats import Statistics

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
ENERGIES = (0.9, 0.99, 0.999)
SHARES = (0.1, 0.3, 0.5)
WORTH = 0.95  # two factors that save less are not worth a second layer
SAMPLES = 64  # read of the data for the second moments


@dataclass(frozen=True, slots=True)
class RankAt:
    """The least rank that keeps `energy` of the output, and what two factors of that rank take."""

    energy: float
    rank: int
    size_bytes: int
    macs: int | None


@dataclass(frozen=True, slots=True)
class RankLine:
    """One weight as `groups` matrices (out, columns).

    Up to rank `break_even` (below out * columns / (out + columns)) two factors take fewer bytes and operations.
    `pays_at`: the most energy of those asked that a rank keeps with at most WORTH of the bytes; 0 if none.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    groups: int
    out: int
    columns: int
    size_bytes: int
    macs: int | None
    break_even: int
    pays_at: float
    at: tuple[RankAt, ...]


@dataclass(frozen=True, slots=True)
class RankView:
    """All weights, largest first. `samples`: of the data whose second moments weigh the energy; 0: weights alone."""

    model: str
    samples: int
    lines: tuple[RankLine, ...]
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True)
class RemovalAt:
    """`channels` input channels removed, the others re-solved: E||dy||^2 / E||y - mean y||^2 of the layer's output."""

    share: float
    channels: int
    error: float


@dataclass(frozen=True, slots=True)
class PruneLine:
    """One weight and its `channels` input channels of `width` columns each (kernel positions)."""

    name: str
    role: str
    shape: tuple[int, ...]
    channels: int
    width: int
    size_bytes: int
    macs: int | None
    at: tuple[RemovalAt, ...]


@dataclass(frozen=True, slots=True)
class PruneView:
    """All weights whose inputs were read, largest first."""

    model: str
    samples: int
    lines: tuple[PruneLine, ...]
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class _Read:
    """A model file and what was read of it."""

    name: str
    weights: list[Weight]
    macs: Mapping[str, int | None]
    stats: Statistics | None
    notes: tuple[Note, ...]


def rank_view(model: str | Path, *, data: Any = None, **reading: Any) -> RankView:
    """Ranks that keep 90, 99 and 99.9 % of the energy of each weight.

    The energy of W is ||W||^2, or with `data` that of its output about the mean, tr(W Cov W^T), as a factorisation
    whitened by the inputs keeps it. `reading` is as for `prune_view`.

    Raises ModelError for an unusable file, DataError where the data does not fit it, RunError if it does not run.
    """
    read = _read(Path(model), data, **reading)
    wide = [w for w in read.weights if min(w.matrix_shape[1:]) > 1]
    lines = [_rank_line(w, read.macs.get(w.name), _covariance(w, read.stats)) for w in wide]
    text = "one row or column a group (a depthwise kernel, a vector): no rank to lower"
    notes = (*read.notes, *(Note(w.name, text) for w in read.weights if w not in wide))
    return RankView(read.name, read.stats.n_samples if read.stats else 0, tuple(lines), notes)


def prune_view(
    model: str | Path, *, data: Any, preprocess: Any = None, tokenizer: Path | None = None, batch: int = 1,
    threads: int = 1, seed: int = 0,
) -> PruneView:  # fmt: skip
    """What removing 10, 30 and 50 % of each weight's input channels costs, in closed form, with compensation.

    Which channels: greedily those that cost least (`techniques._obs`); a bias is assumed to take the mean error.
    The numbers are of one layer alone on the unchanged model: errors of several layers add up.

    Raises ModelError for an unusable file, DataError without data or where it does not fit, RunError if the model
    does not run.
    """
    if data is None:
        raise DataError("the sensitivity to pruning needs inputs of the layers; give --data with some samples")
    read = _read(Path(model), data, preprocess=preprocess, tokenizer=tokenizer, batch=batch, threads=threads, seed=seed)
    lines, notes = [], list(read.notes)
    for w in read.weights:
        covariance = _covariance(w, read.stats)
        if covariance is not None and _width(w) < w.matrix_shape[2] * w.groups:
            lines.append(_prune_line(w, read.macs.get(w.name), covariance))
        elif w.main_use.role == "gather":
            notes.append(Note(w.name, "a table that is only looked up has no input channels"))
        else:
            notes.append(Note(w.name, "no second moments of its inputs, or a single input channel"))
    return PruneView(read.name, read.stats.n_samples if read.stats else 0, tuple(lines), tuple(notes))


def spectrum(W: F32, C: F64 | None) -> F64:
    """Energies (groups, min(out, k)), falling, of the singular directions of W (g, out, k) times the root of C.

    `C` is (g, k, k), its diagonal (g, k), or None (identity). They sum to tr(W C W^T) of each group.
    """
    wide = W.astype(np.float64)
    if C is not None and C.ndim == 2:
        wide, C = wide * np.sqrt(np.maximum(C, 0.0))[:, None, :], None
    if W.shape[1] <= W.shape[2]:
        gram = wide @ wide.transpose(0, 2, 1) if C is None else wide @ C @ wide.transpose(0, 2, 1)
    else:
        gram = wide.transpose(0, 2, 1) @ wide
        if C is not None:
            values, vectors = np.linalg.eigh(C)
            root = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
            gram = root.transpose(0, 2, 1) @ gram @ root
    return np.asarray(np.maximum(np.linalg.eigvalsh(gram)[:, ::-1], 0.0))


def rank_keeping(energies: F64, share: float) -> int:
    """Least rank, the same in each group, whose energies (groups, ranks) sum to `share` of all; 0 of no energy."""
    kept = np.cumsum(energies.sum(axis=0))
    return 0 if kept[-1] <= 0 else int(np.searchsorted(kept, share * kept[-1] * (1 - 1e-12))) + 1


def channel_errors(W: F32, C: F64, width: int) -> F64:
    """Output error after each removal of an input channel, (groups * k / width,), the last is the whole signal.

    W (g, out, k) and C (g, k, k) or its diagonal (g, k); a channel is `width` neighbouring columns of one group.
    Greedy over all groups, remaining columns of the same group re-solved.
    """
    from featherweight.techniques import _obs

    g, _, k = W.shape
    units = k // width
    if C.ndim == 2 or units == 1:
        if C.ndim == 2:
            costs = np.einsum("gok,gk->gk", np.square(W, dtype=np.float64), C).reshape(g * units, width).sum(axis=1)
        else:
            costs = np.einsum("gok,gkl,gol->g", W, C, W, dtype=np.float64, optimize=True)
        return np.asarray(np.cumsum(np.sort(np.maximum(costs, 0.0))))
    blocks = [np.arange(u * width, (u + 1) * width) for u in range(units)]
    steps = []
    for matrix, second in zip(W, C, strict=True):
        _, errors = _obs.removal_order([matrix], [second], [blocks], [1.0])
        steps.append(np.diff(errors[:, 0], prepend=0.0))
    return np.asarray(np.cumsum(list(_cheapest_first(steps))))


def _cheapest_first(steps: list[F64]) -> Iterator[float]:
    """Merge the groups' costs: always the cheapest next removal of any group."""
    heap = [(float(s[0]), i, 0) for i, s in enumerate(steps)]
    heapq.heapify(heap)
    while heap:
        cost, i, n = heapq.heappop(heap)
        yield cost
        if n + 1 < len(steps[i]):
            heapq.heappush(heap, (float(steps[i][n + 1]), i, n + 1))


def _rank_line(w: Weight, macs: int | None, covariance: F64 | None) -> RankLine:
    g, out, k = w.matrix_shape
    energies = spectrum(w.to_matrix(w.array()), covariance)
    break_even = (out * k - 1) // (out + k)
    at = []
    for energy in ENERGIES:
        rank = rank_keeping(energies, energy)
        ratio = rank * (out + k) / (out * k)
        at.append(RankAt(energy, rank, round(w.size_bytes * ratio), None if macs is None else round(macs * ratio)))
    pays = max((a.energy for a in at if a.rank * (out + k) <= WORTH * out * k), default=0.0)
    role = w.main_use.role
    return RankLine(w.name, role, w.shape, g, out, k, w.size_bytes, macs, break_even, pays, tuple(at))


def _prune_line(w: Weight, macs: int | None, covariance: F64) -> PruneLine:
    width = _width(w)
    errors = channel_errors(w.to_matrix(w.array()), covariance, width)
    signal = float(errors[-1])
    at = []
    for share in SHARES:
        n = max(1, round(share * len(errors)))
        at.append(RemovalAt(share, n, float(errors[n - 1]) / signal if signal > 0 else 0.0))
    return PruneLine(w.name, w.main_use.role, w.shape, len(errors), width, w.size_bytes, macs, tuple(at))


def _width(w: Weight) -> int:
    """Columns of one input channel: the kernel positions of a convolution."""
    use = w.main_use
    return math.prod(w.shape[2:]) if use.role in ("conv", "conv_transpose") and not use.layout else 1


def _covariance(w: Weight, stats: Statistics | None) -> F64 | None:
    """Second moments about the mean, (g, k, k) or their diagonal (g, k); None if the inputs were not read."""
    second = None if stats is None or w.main_use.role == "gather" else stats.second_moment(w.name)
    mean = None if stats is None else stats.mean(w.name)
    if second is None or mean is None or not np.isfinite(second).all():
        return None
    if second.ndim == 2:
        return np.maximum(second - mean**2, 0.0)
    return second - mean[:, :, None] * mean[:, None, :]


def _read(
    path: Path, data: Any, *, preprocess: Any = None, tokenizer: Path | None = None, batch: int = 1, threads: int = 1,
    seed: int = 0,
) -> _Read:  # fmt: skip
    """Weights of the normalised model, largest first, their MACs, and with data their input statistics."""
    from featherweight.data.opening import open_data
    from featherweight.graph import cost, io
    from featherweight.graph.normalise import normalise
    from featherweight.graph.weights import skipped, weights
    from featherweight.search.problem import first_feeds, input_specs
    from featherweight.stats import collect
    from featherweight.stats.shrinkage import shrunk

    original = io.load(path)
    graph = normalise(original, run=None).model
    stats, shapes = None, None
    if data is not None:
        opened = open_data(data, input_specs(original), preprocess=preprocess, tokenizer=tokenizer, batch_size=batch)
        feeds = first_feeds(opened, -(-SAMPLES // batch))
        if not feeds:
            raise DataError(f"the data {data!r} has no sample to read")
        shapes = {name: tuple(array.shape) for name, array in feeds[0].items()}
        stats = shrunk(collect(graph, feeds, values=False, threads=threads, seed=seed))
    counted = cost.costs(graph, input_shapes=shapes)
    found = sorted((w for w in weights(graph) if min(w.matrix_shape[1:]) > 0), key=lambda w: -w.size_bytes)
    return _Read(path.name, found, _macs(found, counted.nodes), stats, tuple(skipped(graph)))


def _macs(found: list[Weight], nodes: Iterable[NodeCost]) -> dict[str, int | None]:
    """MACs a call of each weight; those of a node with several weights go by their elements."""
    by_node = {n.name: n.macs for n in nodes}
    elements: dict[str, int] = {}
    for w in found:
        for use in w.uses:
            elements[use.path] = elements.get(use.path, 0) + math.prod(w.shape)
    result: dict[str, int | None] = {}
    for w in found:
        parts = [by_node.get(use.path) for use in w.uses]
        shares = [math.prod(w.shape) / elements[use.path] for use in w.uses]
        known = [round(m * s) for m, s in zip(parts, shares, strict=True) if m is not None]
        result[w.name] = sum(known) if len(known) == len(parts) else None
    return result
