"""Latency of a model on a device that is not here, predicted from the device's profile; and whether it fits there.

A call takes `call_us`, and each operator `node_us` and the time of its kernels: what was measured for such kernels on
the device, else the roofline max(macs / rate, bytes / bandwidth). Everything here is predicted, and labelled so.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from featherweight.core import Note, Profile
from featherweight.edge import observe
from featherweight.edge.estimate import Estimator
from featherweight.edge.fitting import Fit, fits
from featherweight.edge.planned import planned
from featherweight.edge.work import Executed, works
from featherweight.errors import BudgetError
from featherweight.graph import surgery
from featherweight.runtime.outputs import Array
from featherweight.runtime.sandbox import Worker

__all__ = ["PREDICTED", "Fit", "Prediction", "fits", "latency", "latency_of_file", "predict_operators"]

PREDICTED = "predicted"
_TINY = float(np.finfo(np.float32).tiny)
# More denormal weights than this are told: arithmetic with them is far slower on many processors.
_DENORMAL_SHARE = 0.001


@dataclass(frozen=True)
class Prediction:
    """Predicted milliseconds of one call. Never a measurement.

    `per_node`: milliseconds by the file's node name (without `call_ms`), what is fused counted at the node it is fused
    into; `by_kind`: by kind of kernel; `from_measured`: share of the time that rests on kernels measured on the device.
    `unknown`: nodes whose shapes are not known, counted as none.
    """

    ms: float
    per_node: Mapping[str, float]
    target: str
    label: str = PREDICTED
    call_ms: float = 0.0
    by_kind: Mapping[str, float] = field(default_factory=dict)
    from_measured: float = 0.0
    unknown: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()


def latency(model: ir.Model, profile: Profile, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Prediction:
    """Predict from the graph alone: nothing is run, fusions are those the runtime makes in essence.

    `shapes`: of the inputs; open axes of those not named count as 1.

    Raises:
        BudgetError: the profile has neither rates nor measured kernels.
    """
    ops, unknown, fused = planned(model, shapes or {})
    found = predict_operators(ops, profile)
    return dataclasses.replace(
        found,
        per_node={**found.per_node, **dict.fromkeys(fused, 0.0)},
        unknown=unknown,
        notes=denormal_notes(model),
    )


def latency_of_file(
    path: str | Path,
    profile: Profile,
    feeds: Mapping[str, Array] | None = None,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    worker: Worker | None = None,
) -> Prediction:
    """Predict from the operators the runtime really executes, seen in one run here (its time does not matter).

    The closest there is: fusions, layouts, folding and branches are as they are. `feeds`: a real input; without one,
    random values of `shapes` (open axes 1).

    Raises:
        BudgetError: the profile has neither rates nor measured kernels.
        RunError, ChildCrashed: the model does not run here.
    """
    given = observe.random_feeds(path, shapes or {}) if feeds is None else feeds
    _check(profile)
    return predict_operators(observe.executed(path, given, worker=worker), profile)


def predict_operators(ops: Iterable[Executed], profile: Profile) -> Prediction:
    """Sum up the operators of one call. Raises BudgetError for a profile that has nothing to predict from."""
    _check(profile)
    estimator = Estimator(profile)
    node_us = profile.node_us or 0.0
    per_node: dict[str, float] = defaultdict(float)
    by_kind: dict[str, float] = defaultdict(float)
    total = measured = 0.0
    for op in ops:
        us = node_us
        by_kind["overhead"] += node_us / 1e3
        for work in works(op):
            took, how = estimator.us(work)
            us += took
            by_kind[f"{work.kind} {work.precision}"] += took / 1e3
            measured += took if how == "measured" else 0.0
        per_node[op.name] += us / 1e3
        total += us
    call = profile.call_us or 0.0
    return Prediction(
        ms=(total + call) / 1e3,
        per_node=dict(per_node),
        target=profile.name,
        call_ms=call / 1e3,
        by_kind=dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        from_measured=measured / total if total else 0.0,
    )


def _check(profile: Profile) -> None:
    if not profile.predicts:
        raise BudgetError(
            f"to predict a latency the profile must have rates or measured kernels, but '{profile.name}' has neither; "
            "measure them on the device with `featherweight profile -o FILE`"
        )


def denormal_notes(model: ir.Model) -> tuple[Note, ...]:
    """Weights below the smallest normal float32, which slow many processors down; the prediction takes them as zero."""
    notes = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = surgery.constant_tensor(value)
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < 2:
                continue
            share = _denormal_share(tensor.numpy())
            if share > _DENORMAL_SHARE:
                text = (
                    f"{share:.0%} of its values are denormal: many processors are far slower with those than predicted"
                )
                notes.append(Note(value.name or "", text))
    return tuple(notes)


def _denormal_share(array: Any) -> float:
    size = np.abs(array.reshape(-1))
    return float(((size > 0) & (size < _TINY)).mean())
