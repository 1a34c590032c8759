"""The cuts of a model as a list to choose from, and the proof that two halves equal the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from featherweight.edge import cuts, mincut
from featherweight.edge.split import Split
from featherweight.errors import DataError, ModelError
from featherweight.graph import io
from featherweight.runtime.sandbox import Worker

ALLOWED, ALLOWED_HALF = 1e-3, 2e-2
"""Differences over the largest output that count as rounding, in float32 and float16."""
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class CutLine:
    """One cut of the stored order. Bytes of one call; `raw` names the tensors that show an input at a glance."""

    number: int
    after: str
    wire: tuple[str, ...]
    wire_bytes: int
    int8_bytes: int
    head_macs: int
    tail_macs: int
    head_weight_bytes: int
    tail_weight_bytes: int
    raw: tuple[str, ...]


@dataclass(frozen=True)
class CutList:
    """The cuts after each block in stored order; `input_bytes` is what sending the inputs would take."""

    model: str
    input_bytes: int
    macs: int
    weight_bytes: int
    cuts: tuple[CutLine, ...]
    unknown: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Check:
    """Head then tail against the whole, on random inputs: the largest difference over the largest output.

    `as_written` is the same with the runtime's fusions off, run only where they round differently by more than
    `ALLOWED`: in a model that quantizes at run time a last bit may move an 8-bit code.
    """

    outputs: int
    largest_difference: float
    relative: float
    equal: bool
    as_written: float | None = None


def list_cuts(model: str | Path, *, input_shapes: Mapping[str, tuple[int, ...]] | None = None) -> CutList:
    """All cuts of the stored order of a model file. Raises ModelError for an unusable file."""
    path = Path(model)
    prepared = cuts.prepare(io.load(path))
    graph = cuts.cut_graph(prepared, input_shapes=input_shapes)
    lines = []
    macs = sum(b.macs for b in graph.blocks)
    weights = sum(b.weight_bytes for b in graph.blocks)
    for number, head in enumerate(graph.linear(), start=1):
        cut = mincut.wire_of(graph, head)
        here = cut.here
        sent = [graph.tensors[t] for t in cut.wire]
        head_macs = sum(graph.blocks[i].macs for i in here)
        stored = sum(graph.blocks[i].weight_bytes for i in here)
        lines.append(
            CutLine(
                number=number,
                after=graph.blocks[graph.proper[number - 1]].name,
                wire=tuple(t.name for t in sent),
                wire_bytes=sum(t.nbytes for t in sent),
                int8_bytes=sum(t.wire_bytes for t in sent),
                head_macs=head_macs,
                tail_macs=macs - head_macs,
                head_weight_bytes=stored,
                tail_weight_bytes=weights - stored,
                raw=tuple(t.name for t in sent if t.raw),
            )
        )
    return CutList(
        model=path.name,
        input_bytes=sum(t.nbytes for t in graph.tensors if t.is_input),
        macs=macs,
        weight_bytes=weights,
        cuts=tuple(lines),
        unknown=graph.unknown,
        shapes=cuts.concrete_inputs(prepared, input_shapes or {}),
    )


def compare_halves(
    model: str | Path, made: Split, *, input_shapes: Mapping[str, tuple[int, ...]] | None = None, seed: int = 0
) -> Check:
    """Run the whole and both halves in a child process on random inputs.

    Raises ModelError where they differ by more than rounding, RunError where the runtime refuses a file.
    """
    loaded = io.load(Path(model))
    feeds = random_feeds(loaded, input_shapes or {}, seed)
    sent = [(t.name, t.source == "head") for t in made.wire]
    with Worker() as worker:
        check = worker.call(
            _compared, str(model), str(made.head), str(made.tail), sent, dict(made.outputs), feeds,
            timeout_s=_TIMEOUT_S, doing="comparing the halves with the whole",
        )  # fmt: skip
    result = Check(*check)
    if not result.equal:
        raise ModelError(
            f"head and tail must equal the whole, but differ by {result.largest_difference:.3g} "
            f"({result.relative:.1e} of the largest value) on random inputs; a model with random operators cannot be "
            "checked: use --no-check"
        )
    return result


def random_feeds(model: ir.Model, given: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Any]:
    """Inputs as the model declares them: normal floats, integers 0 and 1 (safe as ids, masks and types)."""
    rng = np.random.default_rng(seed)
    shapes = cuts.concrete_inputs(model, given)
    feeds: dict[str, Any] = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        name = value.name or ""
        if value.dtype is None or name not in shapes:
            raise DataError(f"input {name!r} declares no type or shape, so no random input can be made; use --no-check")
        kind = value.dtype.numpy()
        if np.dtype(kind).kind == "f" or value.dtype == ir.DataType.BFLOAT16:
            feeds[name] = rng.normal(size=shapes[name]).astype(kind)
        elif np.dtype(kind).kind in "iub":
            feeds[name] = rng.integers(0, 2, size=shapes[name]).astype(kind)
        else:
            raise DataError(f"input {name!r} of type {value.dtype.name} cannot be made up; use --no-check")
    return feeds


def _compared(
    whole: str, head: str, tail: str, sent: list[tuple[str, bool]], outputs: dict[str, str], feeds: dict[str, Any]
) -> tuple[int, float, float, bool, float | None]:
    """In the child: the fields of a Check."""
    count, worst, relative, equal = _difference(whole, head, tail, sent, outputs, feeds, optimize=True)
    if equal:
        return count, worst, relative, True, None
    *_, as_written, equal = _difference(whole, head, tail, sent, outputs, feeds, optimize=False)
    return count, worst, relative, equal, as_written


def _difference(
    whole: str, head: str, tail: str, sent: list[tuple[str, bool]], outputs: dict[str, str], feeds: dict[str, Any],
    *, optimize: bool,
) -> tuple[int, float, float, bool]:  # fmt: skip
    """(outputs, largest difference, over the largest value, equal but for rounding)."""
    from featherweight.runtime import ort

    expected = ort.session(whole, optimize=optimize).run(feeds)
    front = ort.session(head, optimize=optimize)
    first = front.run({i.name: feeds[i.name] for i in front.inputs})
    second = ort.session(tail, optimize=optimize).run({n: first[n] if made else feeds[n] for n, made in sent})
    got = {n: first[n] if side == "head" else second[n] for n, side in outputs.items()}
    worst, relative, equal = 0.0, 0.0, set(got) == set(expected)
    for name, want in expected.items():
        if name not in got or got[name].shape != want.shape or got[name].dtype != want.dtype:
            equal = False
        elif want.dtype.kind in "fc" and want.size:
            scale = max(float(np.nanmax(np.abs(want))), 1e-30)
            apart = float(np.nanmax(np.abs(got[name].astype(np.float64) - want)))
            worst, relative = max(worst, apart), max(relative, apart / scale)
        elif want.size and not np.array_equal(got[name], want):
            share = float(np.mean(got[name] != want))
            worst, relative = max(worst, 1.0), max(relative, share if share < ALLOWED else 1.0)
    half = any(o.dtype == np.float16 for o in expected.values())
    return len(expected), worst, relative, equal and relative <= (ALLOWED_HALF if half else ALLOWED)
