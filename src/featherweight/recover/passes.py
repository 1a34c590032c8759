"""The sequential pass, in the child process: both models side by side, cut in segments, layer after layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from featherweight.core import Note
from featherweight.graph import io
from featherweight.graph.weights import Weight, weights
from featherweight.recover import rows
from featherweight.recover.cuts import batches_of, plan_cuts, sizes_of
from featherweight.recover.layers import Layer
from featherweight.recover.segments import Parts
from featherweight.recover.solve import RIDGES, Solution, Sums, solve
from featherweight.stats import padding

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
Values = dict[str, Array]

HELD_OUT = 4  # one of so many samples (or rows) chooses the ridge
ROWS_PER_INPUT = 24  # rows wanted a column: more than enough for the solution, few enough to be quick
LEAST_ROWS = 4096
MOST_WORK = 3e11  # products a layer: wide layers get fewer rows


@dataclass(frozen=True)
class Solved:
    """New content of one initializer (stored layout) after the pass, and how the layer's error fell."""

    weight: str
    target: str
    before: float
    after: float
    signal: float
    ridge: float | None
    rows: int


@dataclass
class _Batch:
    """What is known of one batch at the present cut, in both models, and outputs that wait for their layer."""

    n: int
    theirs: Values
    ours: Values
    mask: npt.NDArray[np.bool_] | None = None
    targets: dict[int, F32] = field(default_factory=dict)
    at: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)
    shape: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How to solve; see `recovered`."""

    threads: int
    seed: int
    max_bytes: int
    biases_only: bool
    spread: bool
    epochs: int


def run_pass(
    original_path: str,
    reduced_path: str,
    dataset: Any,
    layers: Sequence[Layer],
    settings: Settings,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Array], list[Solved], list[Note]]:
    """Solve all layers in order. Returns new arrays by initializer name, what was done, and notes.

    Raises DataError if there is no data, RunError if a model fails on it.
    """
    theirs, ours = Parts(onnx.load(original_path)), Parts(onnx.load(reduced_path))
    known = {w.name: w for w in weights(io.load(reduced_path))}
    size = sizes_of(original_path, reduced_path, dataset)
    changed: dict[str, Array] = {}
    done: list[Solved] = []
    notes: list[Note] = []
    for epoch in range(settings.epochs):
        rng = np.random.default_rng(settings.seed + epoch)
        state = _Pass(theirs, ours, layers, known, changed, settings, rng)
        held = [size.of(*state.live(cut)) for cut in range(len(layers))]
        cuts, most, note = plan_cuts(held, size.n, size.samples, settings.max_bytes)
        if note and not epoch:
            notes.append(Note("", note))
        done += state.run(_first(dataset, most), cuts, progress)
    return changed, done, notes


def _first(dataset: Any, most: int) -> list[_Batch]:
    """Batches until `most` samples are there."""
    found: list[_Batch] = []
    taken = 0
    for feeds, n in batches_of(dataset):
        if taken >= most:
            break
        held = {name: np.asarray(x) for name, x in feeds.items()}
        found.append(_Batch(n, dict(held), dict(held), padding.shown(held)))
        taken += n
    return found


@dataclass
class _Pass:
    """Both models and the state of one pass."""

    theirs: Parts
    ours: Parts
    layers: Sequence[Layer]
    known: Mapping[str, Weight]
    changed: dict[str, Array]
    settings: Settings
    rng: np.random.Generator

    def reach(self, cut: int) -> int:
        """Node of the original up to which it has run once layers before `cut` are solved."""
        return max((self.theirs.at[layer.target] + 1 for layer in self.layers[:cut]), default=0)

    def start_of(self, cut: int) -> int:
        """Node of the reduced model at which the cut before layer `cut` lies."""
        return self.ours.at[self.layers[cut].made] if cut < len(self.layers) else len(self.ours.nodes)

    def wanted(self, first: int) -> list[str]:
        """Values of the reduced model that layers from `first` on look at."""
        found = [v for layer in self.layers[first:] for v in (layer.source, layer.other) if v]
        return list(dict.fromkeys(found))

    def live(self, cut: int) -> tuple[list[str], list[str]]:
        """Values of the original and of the reduced model to keep before layer `cut`."""
        if cut >= len(self.layers):
            return [], []
        later = [layer.target for layer in self.layers if self.theirs.at[layer.target] >= self.reach(cut)]
        return self.theirs.live(self.reach(cut), later), self.ours.live(self.start_of(cut), self.wanted(cut))

    def run(
        self, batches: list[_Batch], cuts: Sequence[int], progress: Callable[[int, int], None] | None
    ) -> list[Solved]:
        """All segments between `cuts` (layer indices, the first 0, the last the number of layers)."""
        done = []
        total = sum(b.n for b in batches)
        for a, b in itertools.pairwise(cuts):
            self._original(batches, a, b, total)
            for i in range(a, b):
                done.append(self._solve(batches, i))
                if progress is not None:
                    progress(i + 1, len(self.layers))
            self._reduced(batches, b)
        return done

    def _original(self, batches: list[_Batch], a: int, b: int, total: int) -> None:
        """Run the original through the segment: outputs for the layers, and what is kept at its end."""
        low, high = self.reach(a), self.reach(b)
        due = [i for i, layer in enumerate(self.layers) if low <= self.theirs.at[layer.target] < high]
        keep, _ = self.live(b)
        names = [self.layers[i].target for i in due]
        part = self.theirs.part([*names, *keep], batches[0].theirs)
        for batch in batches:
            got = part.run(batch.theirs, threads=self.settings.threads)
            for i in due:
                layer = self.layers[i]
                y = _kept(got[layer.target], layer)
                at = rows.places(layer.geometry, y.shape, wanted_rows(layer, total), self.rng, batch.mask)
                batch.at[i], batch.shape[i] = at, y.shape
                batch.targets[i] = rows.output_rows(layer.geometry, y, at)
            batch.theirs = {n: got[n] for n in keep}

    def _reduced(self, batches: list[_Batch], cut: int) -> None:
        """Run the reduced model, with its new weights, to the next cut."""
        _, keep = self.live(cut)
        part = self.ours.part(keep, batches[0].ours)
        for batch in batches:
            batch.ours = part.run(batch.ours, threads=self.settings.threads) if keep else {}

    def _solve(self, batches: list[_Batch], index: int) -> Solved:
        layer = self.layers[index]
        weight = self.known[layer.weight]
        stored = self.changed.get(layer.weight)
        matrix = weight.to_matrix(weight.array() if stored is None else stored).astype(np.float64) * layer.scale
        bias = self._bias(layer)
        fit, held = self._sums(batches, index)
        if fit is None or held is None:
            return Solved(layer.weight, layer.target, 0.0, 0.0, 0.0, None, 0)
        free = not self.settings.biases_only
        found = solve(
            fit, held, matrix, bias,
            has_bias=layer.bias is not None,
            # A residual branch also answers for errors of the sum: its own spread says nothing about the signal's.
            spread=self.settings.spread and free and layer.other is None,
            ridges=RIDGES if free else (),
        )  # fmt: skip
        self._store(layer, weight, found)
        every = fit.plus(held)
        _, _, spread = every.about(every.x / max(every.rows, 1), every.y / max(every.rows, 1))
        signal = float(spread.sum())
        return Solved(layer.weight, layer.target, found.before, found.after, signal, found.ridge, every.rows)

    def _bias(self, layer: Layer) -> npt.NDArray[np.float64]:
        if layer.bias is None:
            return np.zeros((layer.groups, layer.out))
        stored = onnx.numpy_helper.to_array(self.ours.stored[layer.bias])
        return np.asarray(stored.astype(np.float64) * layer.factor).reshape(layer.groups, layer.out)

    def _store(self, layer: Layer, weight: Weight, found: Solution) -> None:
        array = weight.from_matrix(found.matrix / layer.scale).astype(weight.dtype)
        named = {layer.weight: array}
        if layer.bias is not None:
            old = onnx.numpy_helper.to_array(self.ours.stored[layer.bias])
            named[layer.bias] = (found.bias / layer.factor).reshape(old.shape).astype(old.dtype)
        if not all(np.isfinite(a).all() for a in named.values()):
            return
        for name, new in named.items():
            self.changed[name] = new
            self.ours.store(name, new)

    def _sums(self, batches: list[_Batch], index: int) -> tuple[Sums | None, Sums | None]:
        """Sums over the rows that fit and over those held out."""
        layer = self.layers[index]
        part = self.ours.part([v for v in (layer.source, layer.other) if v], batches[0].ours)
        fit: Sums | None = None
        held: Sums | None = None
        seen = 0
        single = all(b.shape[index][0] == 1 for b in batches) and len(batches) < HELD_OUT
        for batch in batches:
            got = part.run(batch.ours, threads=self.settings.threads)
            at, shape = batch.at.pop(index), batch.shape.pop(index)
            x = rows.input_rows(layer.geometry, got[layer.source], at)
            y = batch.targets.pop(index)
            if layer.other:
                y = y - rows.output_rows(layer.geometry, np.broadcast_to(got[layer.other], shape), at)
            who = np.arange(x.shape[1]) if single else seen + rows.samples(layer.geometry, shape, at)
            seen += shape[0]
            out = who % HELD_OUT == HELD_OUT - 1
            if fit is None:
                fit = Sums.start(x, y, centred=layer.bias is not None)
                held = fit.empty()
            fit.add(x[:, ~out], y[:, ~out])
            if held is not None and out.any():
                held.add(x[:, out], y[:, out])
        return fit, held


def wanted_rows(layer: Layer, total: int) -> int:
    """Places to look at in each sample."""
    most = MOST_WORK / (2.0 * layer.k * layer.k * layer.groups)
    wanted = max(LEAST_ROWS, min(ROWS_PER_INPUT * layer.k, most), 4 * layer.k)
    return max(1, -(-int(wanted) // max(total, 1)))


def _kept(y: Array, layer: Layer) -> Array:
    return y if layer.kept is None else np.take(y, layer.kept[1], axis=layer.kept[0])
