"""Which nodes int8 hurts: the quantized model against the float one, value by value, in the runtime's real kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.stats.streaming import instrumented

Runner = Callable[[ir.Model, Sequence[Mapping[str, npt.NDArray[Any]]]], list[dict[str, npt.NDArray[Any]]]]
Results = Sequence[Mapping[str, npt.NDArray[Any]]]

ENOUGH_DB = 33.0  # at the outputs: nothing is sent back to float above this
LOCAL_NOISE = 10**-1.5  # a node that adds more than this share of its output's power is suspect by itself
DOMINANT = 0.25  # or one that adds this share of all added noise: in a deep model of even layers none does
BLOCKS = 8  # columns of an output are also judged in this many blocks


@dataclass(frozen=True)
class Comparison:
    """`noise`: relative noise power of each value both models have; `outputs`: worst of rows and samples, in dB."""

    noise: dict[str, float]
    output_db: float


def readable(model: ir.Model) -> set[str]:
    """Names of the float values of the main graph that can be put out."""
    names: set[str] = set()
    for node in model.graph:
        if node.op_type not in ("Constant", "QuantizeLinear"):
            names.update(v.name for v in node.outputs if v.name and (v.dtype is None or v.dtype == ir.DataType.FLOAT))
    return names


def reference(model: ir.Model, runner: Runner, feeds: Results) -> Results:
    """Every float value of the float model."""
    return runner(instrumented(model, readable(model)), feeds)


def compare(model: ir.Model, expected: Results, outputs: Sequence[str], runner: Runner, feeds: Results) -> Comparison:
    """Run the quantized `model` and compare it with `expected` of the float one."""
    shared = readable(model) & set(expected[0])
    got = runner(instrumented(model, shared), feeds)
    noise = {name: _worst([(e[name], g[name]) for e, g in zip(expected, got, strict=True)], False) for name in shared}
    at_outputs = [
        _worst([(e[name], g[name]) for e, g in zip(expected, got, strict=True)], True)
        for name in outputs
        if name in got[0] and got[0][name].dtype.kind == "f"
    ]
    worst = max(at_outputs, default=0.0)
    return Comparison(noise, -10 * np.log10(worst) if worst > 0 else np.inf)


def _worst(pairs: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]], strict: bool) -> float:
    """Greatest relative noise power over samples; `strict` also judges rows and blocks of columns alone."""
    worst = 0.0
    top = max((float(np.square(_finite(e, e)).mean()) if e.size else 0.0) for e, _ in pairs)
    for expected, got in pairs:
        if expected.shape != got.shape:
            return np.inf
        if expected.dtype.kind != "f" or not expected.size:
            continue
        a, b = _finite(expected, expected), _finite(got, expected)
        worst = max(worst, _ratio(a, b, top))
        if strict and a.ndim > 1:
            if a.shape[0] > 1:
                worst = max(worst, *(_ratio(x, y, top) for x, y in zip(a, b, strict=True)))
            if a.shape[-1] > 1 and a.ndim == 2:
                edges = np.linspace(0, a.shape[-1], min(BLOCKS, a.shape[-1]) + 1).astype(int)
                whole = float(np.square(a).mean())
                for lo, hi in itertools.pairwise(edges):
                    # A block that is small beside the others is only judged where scales were clearly mixed.
                    power = float(np.square(a[:, lo:hi]).mean())
                    if 0 < power < 1e-3 * whole:
                        worst = max(worst, _ratio(a[:, lo:hi], b[:, lo:hi], power) / 4)
    return worst


def _finite(x: npt.NDArray[Any], where: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.where(np.isfinite(where), x, 0).astype(np.float64)


def _ratio(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], top: float) -> float:
    power, error = float(np.square(a).mean()), float(np.square(a - b).mean())
    if not np.isfinite(error):
        return np.inf
    # Values that are zero but for rounding are judged on the scale of the largest sample.
    return error / max(power, 1e-7 * top, 1e-30)


def suspects(model: ir.Model, found: Comparison, integer: set[str], *, poor: bool) -> list[str]:
    """Names of integer nodes of the float `model` to send back to float, worst first; empty if none stands out.

    `integer`: nodes that compute in integers now. A node's own noise is what its output has more than its inputs;
    where a float node magnifies noise, the integer nodes that feed it are suspected. `poor`: the outputs are bad, so
    every node that is loud by itself goes at once; else only a node that dominates.
    """
    added: dict[str, float] = {}
    for node in model.graph:
        noise = max((found.noise.get(v.name or "", 0.0) for v in node.outputs), default=0.0)
        before = max((found.noise.get(v.name or "", 0.0) for v in node.inputs if v is not None), default=0.0)
        own = max(noise - before, 0.0) if np.isfinite(noise) else 1e9
        for name in _blamed(node, integer):
            added[name] = max(added.get(name, 0.0), own)
    total = sum(added.values())
    if total <= 0:
        return []
    ranked = sorted(added, key=lambda name: -added[name])
    if poor:
        loud = [name for name in ranked if added[name] > max(LOCAL_NOISE, 0.1 * added[ranked[0]])]
        if loud:
            return loud
    return ranked[:1] if added[ranked[0]] > DOMINANT * total else []


def _blamed(node: ir.Node, integer: set[str]) -> list[str]:
    """The node itself if it is integer, else the nearest integer nodes upstream."""
    if node.name in integer:
        return [node.name or ""]
    seen: set[ir.Node] = set()
    stack, found = [node], []
    while stack:
        for value in stack.pop().inputs:
            maker = value.producer() if value is not None else None
            if maker is None or maker in seen:
                continue
            seen.add(maker)
            if maker.name in integer:
                found.append(maker.name or "")
            else:
                stack.append(maker)
    return found
