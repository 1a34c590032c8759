"""Bring any model into the one form everything else is written for, and prove that its outputs did not move.

After it: unique names, opset >= 21, no functions, no Constant nodes, weights where they are used, BatchNormalization
folded where provable, nothing dead, sorted. Every step is checked by running the model and undone if it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.errors import ModelError, RunError
from featherweight.graph import batchnorm, expressions, fold, lift, repair, surgery

Outputs = list[dict[str, npt.NDArray[np.generic]]]
Runner = Callable[[ir.Model, Sequence[Mapping[str, npt.NDArray[np.generic]]]], Outputs]
"""Runs a model on each feed and gives its outputs by name; raises RunError if the runtime refuses it."""

TOLERANCE = 1e-4
"""Largest change of an output, relative to its largest magnitude, that counts as rounding (float32)."""
HALF_TOLERANCE = 1e-2
"""The same where a model computes in half precision."""
INTEGER_TOLERANCE = 1e-3
"""Fraction of integer outputs (say a class map) that may flip through rounding."""


@dataclass(frozen=True)
class Step:
    """One step: what it did (`detail`), and how far the outputs moved from the original's (None: not checked)."""

    name: str
    changed: bool
    max_abs_diff: float | None = None
    rolled_back: bool = False
    detail: str = ""


@dataclass(frozen=True)
class Normalised:
    """The normalised copy and what was done to it."""

    model: ir.Model
    steps: tuple[Step, ...] = ()

    @property
    def changed(self) -> bool:
        """True if any step did something that stayed."""
        return any(s.changed and not s.rolled_back for s in self.steps)


_Edit = Callable[[ir.Model], str]

_REPAIRS: tuple[tuple[str, _Edit], ...] = (
    ("names made unique", repair.fix_names),
    ("default domain", repair.merge_opsets),
    ("order of nodes", repair.sort_nodes),
    ("weights listed as inputs", repair.demote_inputs),
)
_BEFORE: tuple[tuple[str, _Edit], ...] = (
    ("functions", repair.inline_functions),
    ("names made unique", repair.fix_names),
    ("constants", fold.lift_constants),
    ("opset", lift.lift_opset),
    ("names made unique", repair.fix_names),
    ("recorded shapes", repair.renew_shapes),
    ("constants", fold.lift_constants),
    ("unused parts", repair.drop_unused),
    ("no-ops", repair.drop_no_ops),
    ("casts and layout of weights", fold.fold_into_weights),
    ("constant expressions", expressions.fold_expressions),
    ("casts and layout of weights", fold.fold_into_weights),
    ("denormal weights", fold.flush_denormals),
)
_AFTER: tuple[tuple[str, _Edit], ...] = (
    ("unused parts", repair.drop_unused),
    ("order of nodes", repair.sort_nodes),
    ("names made unique", repair.fix_names),
    ("recorded shapes", repair.renew_shapes),
)


def normalise(
    model: ir.Model, *, run: Runner | None, feeds: Sequence[Mapping[str, npt.NDArray[np.generic]]] = ()
) -> Normalised:
    """A normalised copy of `model`; the model given is not changed.

    With `run` every step that changed something is run on `feeds` and compared with the original's outputs; a step
    that moves them by more than rounding, or makes the runtime refuse the model, is undone and reported. Raises
    RunError if the runtime refuses the original even after repairs, ModelError for a cycle or contradictory opsets.
    """
    copy = surgery.copy_model(model)
    surgery.read_small(copy)
    work = _Work(copy, run, [dict(f) for f in feeds])
    refused = work.measure_reference()
    for name, edit in _REPAIRS:
        detail = edit(work.model)
        if detail:
            work.steps.append(Step(name, True, detail=detail))
    if refused is not None and (refused := work.measure_reference()) is not None:
        raise refused
    if work.steps:
        _check_repairs(work)
    for name, edit in _BEFORE:
        work.try_step(name, edit)
    _fold_batchnorms(work)
    for name, edit in _AFTER:
        work.try_step(name, edit)
    return Normalised(work.model, tuple(work.steps))


@dataclass
class _Work:
    """The model being normalised, its reference outputs, and the steps so far."""

    model: ir.Model
    run: Runner | None
    feeds: list[dict[str, npt.NDArray[np.generic]]]
    reference: Outputs = field(default_factory=list)
    noise: float = 0.0
    steps: list[Step] = field(default_factory=list)

    def measure_reference(self) -> RunError | None:
        """Run the model as it is and keep its outputs; returns the error if the runtime refuses it."""
        if self.run is None:
            return None
        try:
            self.reference = self.run(self.model, self.feeds)
            if _is_random(self.model):
                # A random operator moves the outputs by itself; that much says nothing about a step.
                again = self.run(self.model, self.feeds)
                self.noise = 4 * max(_difference(self.reference, again)[0], 1e-6)
        except RunError as e:
            return e
        return None

    def check(self, candidate: ir.Model) -> tuple[float | None, str]:
        """(largest difference to the reference, why it is too large or '')."""
        if self.run is None:
            return None, ""
        try:
            outputs = self.run(candidate, self.feeds)
        except RunError as e:
            return None, f"the runtime refused the result: {str(e).strip().splitlines()[0][:200]}"
        worst, why = _difference(self.reference, outputs, _tolerance(candidate), self.noise)
        return worst, why

    def try_step(self, name: str, edit: _Edit) -> None:
        """Apply `edit` to a copy; keep it if the outputs stay."""
        candidate = surgery.copy_model(self.model)
        try:
            detail = edit(candidate)
        except ModelError as e:
            self.steps.append(Step(name, True, None, True, str(e)))
            return
        if not detail:
            # Even then some marks may have been set (types, IR version), which are harmless and wanted.
            self.model = candidate
            return
        worst, why = self.check(candidate)
        self.steps.append(Step(name, True, worst, bool(why), f"{detail}; undone: {why}" if why else detail))
        if not why:
            self.model = candidate


def _check_repairs(work: _Work) -> None:
    """Repairs change no number; if the outputs still move, the model cannot be trusted."""
    worst, why = work.check(work.model)
    if why:
        raise ModelError(f"the model's outputs moved when only names and order were repaired: {why}; export it again")
    work.steps[-1] = Step(work.steps[-1].name, True, worst, False, work.steps[-1].detail)


def _fold_batchnorms(work: _Work) -> None:
    """Fold in rounds, because folding one may bring the next behind a layer."""
    undone: set[str] = set()
    while names := [n for n in batchnorm.candidates(work.model) if n not in undone]:
        undone |= _fold_round(work, names)


def _fold_round(work: _Work, names: list[str]) -> set[str]:
    """All at once if the outputs stay, else halves, so that one bad layer does not keep the others. Returns the bad."""
    bad: set[str] = set()
    todo = [names]
    while todo:
        part = todo.pop(0)
        candidate = surgery.copy_model(work.model)
        folded = batchnorm.fold_batchnorms(candidate, set(part))
        worst, why = work.check(candidate)
        if not why:
            work.model = candidate
            work.steps.append(Step("batch normalisation", True, worst, False, f"{folded} folded"))
        elif len(part) == 1:
            bad.add(part[0])
            work.steps.append(Step("batch normalisation", True, worst, True, f"{part[0]} undone: {why}"))
        else:
            middle = len(part) // 2
            todo[:0] = [part[:middle], part[middle:]]
    return bad


def _is_random(model: ir.Model) -> bool:
    return any(n.op_type in surgery.RANDOM_OPS for g in model.graphs() for n in g) or any(
        n.op_type in surgery.RANDOM_OPS for f in model.functions.values() for n in f
    )


def _tolerance(model: ir.Model) -> float:
    half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    computes = any(o.dtype in half for g in model.graphs() for n in g if n.op_type != "Cast" for o in n.outputs)
    return HALF_TOLERANCE if computes else TOLERANCE


def _difference(reference: Outputs, outputs: Outputs, tolerance: float = 0.0, noise: float = 0.0) -> tuple[float, str]:
    """(largest absolute difference, why it is more than rounding or '')."""
    worst, why = 0.0, ""
    if len(reference) != len(outputs):
        return float("inf"), f"{len(outputs)} results for {len(reference)} inputs"
    for before, after in zip(reference, outputs, strict=True):
        if list(before) != list(after):
            return float("inf"), f"outputs are {list(after)} instead of {list(before)}"
        for name, x in before.items():
            y = after[name]
            if x.shape != y.shape or x.dtype != y.dtype:
                return float("inf"), f"{name!r} is {y.dtype}{list(y.shape)} instead of {x.dtype}{list(x.shape)}"
            distance, problem = _array_difference(x, y, tolerance, noise)
            worst = max(worst, distance)
            why = why or (f"{name!r} {problem}" if problem else "")
    return worst, why


def _array_difference(
    x: npt.NDArray[np.generic], y: npt.NDArray[np.generic], tolerance: float, noise: float
) -> tuple[float, str]:
    if x.size == 0:
        return 0.0, ""
    if x.dtype.kind not in "fiub" and x.dtype.name != "bfloat16":
        return (0.0, "") if np.array_equal(x, y) else (float("inf"), "differs")
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    finite = np.isfinite(a)
    same = np.array_equal(finite, np.isfinite(b)) and np.array_equal(a[~finite], b[~finite], equal_nan=True)
    if not same:
        return float("inf"), "has NaN or infinite values in other places"
    distance = np.abs(a[finite] - b[finite])
    worst = float(distance.max(initial=0.0))
    if x.dtype.kind in "iub":
        flipped = float((distance > 0).mean()) if distance.size else 0.0
        return worst, f"has {flipped:.2%} of its integers changed" if flipped > INTEGER_TOLERANCE else ""
    allowed = tolerance * float(np.abs(a[finite]).max(initial=0.0)) + 1e-6 + noise
    return worst, f"moved by {worst:.3g} (allowed {allowed:.3g})" if worst > allowed else ""
