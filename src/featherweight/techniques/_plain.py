"""The plain int8 model: one technique at every legal site, equalised, bias-corrected, with measured fallback."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Action, Note, Site
from featherweight.errors import RunError
from featherweight.graph import io, surgery
from featherweight.stats import Statistics
from featherweight.techniques import _equalise, _fallback
from featherweight.techniques._fallback import Runner
from featherweight.techniques._protocol import Context, Technique

ROUNDS = 8
POOR_DB = 15.0  # below this at the outputs every suspect goes back to float, however little each gains
WORTH_DB = 1.0  # above it, one that gains less is not worth its time in float
FEEDS = 6  # calibration batches that are run to find fragile nodes
REST = "weight_nbit"
LARGE_BYTES = 1 << 26  # above this, nodes and names are too small a part to serialise the model for


def quantize_model(
    model: ir.Model,
    stats: Statistics,
    ctx: Context,
    *,
    technique: str = "static_int8",
    sites: Sequence[str] | None = None,
    weight_bits: int = 8,
    runner: Runner | None = None,
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]] = (),
    store_rest: bool = True,
    never_grow: bool = False,
) -> tuple[ir.Model, list[Note]]:
    """Quantize a normalised float model; returns a new model and notes on what stayed in float and why.

    Args:
        model: normalised; not changed.
        stats: collected on exactly this model.
        ctx: target, seed, nodes to keep in float. Its notes are not touched.
        technique: `static_int8` or `dynamic_int8`.
        sites: names of weights to quantize; None takes all that are legal.
        weight_bits: 8 to 2.
        runner: runs a model on feeds in real kernels. With it, nodes that lose most go back to float until the
            outputs are within `_fallback.ENOUGH_DB` or no node stands out.
        feeds: a few calibration batches for that.
        store_rest: weights without an integer kernel are stored in 8 bits and computed in float.
        never_grow: give the model back as it was if the result would take more bytes (tiny models do).
    """
    built, notes = _quantize(model, stats, ctx, _job(ctx, technique, sites, weight_bits, store_rest), runner, feeds)
    before, after = (_file_bytes(m) for m in (model, built)) if never_grow else (0, 0)
    if never_grow and after > before:
        text = f"left as it was: in int8 it would take {after} bytes instead of {before}"
        return surgery.copy_model(model), [Note("", text)]
    return built, notes


def _file_bytes(model: ir.Model) -> int:
    """Bytes as saved. Nodes and names count: in a tiny model they outweigh what the weights save."""
    tensors = io.stored_bytes(model)
    return tensors if tensors > LARGE_BYTES else len(io.to_bytes(model))


def _job(ctx: Context, technique: str, sites: Sequence[str] | None, bits: int, store_rest: bool) -> _Job:
    from featherweight.techniques import get

    return _Job(get(technique), get(REST) if store_rest else None, sites, bits, ctx.keep_float)


def _quantize(
    model: ir.Model,
    stats: Statistics,
    ctx: Context,
    job: _Job,
    runner: Runner | None,
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]],
) -> tuple[ir.Model, list[Note]]:
    ready, ready_stats = _equalise.equalise(model, stats)
    inner = dataclasses.replace(ctx, stats=ready_stats, notes=[], cache={})
    built, integer = _build(ready, inner, job)
    if runner is None or not feeds:
        return built, list(inner.notes)
    sample = [dict(f) for f in feeds[:FEEDS]]
    expected = _fallback.reference(ready, runner, sample)
    outputs = [v.name or "" for v in model.graph.outputs]
    kept: dict[str, str] = {}
    best: tuple[float, ir.Model, list[Note]] | None = None
    for _ in range(ROUNDS):
        try:
            found = _fallback.compare(built, expected, outputs, runner, sample)
        except RunError as e:
            # No kernel for a node in this form: find out by sending everything back at the end.
            inner.note("", f"the integer model does not run: {e}")
            found = _fallback.Comparison({}, -np.inf)
        gain = np.inf if best is None else found.output_db - best[0]
        if best is None or gain >= WORTH_DB or (best[0] < POOR_DB and gain > 0):
            best = (found.output_db, built, _notes(inner, kept))
        elif best[0] >= POOR_DB:
            break
        if found.output_db >= _fallback.ENOUGH_DB:
            break
        poor = found.output_db < POOR_DB
        worst = _fallback.suspects(ready, found, integer, poor=poor) if found.noise else sorted(integer)
        if not worst:
            break
        for name in worst:
            kept[name] = f"kept in float: int8 here left {found.output_db:.1f} dB at the outputs"
        inner = dataclasses.replace(inner, keep_float=ctx.keep_float | frozenset(kept), notes=[])
        built, integer = _build(ready, inner, job)
    return (best[1], best[2]) if best is not None else (built, list(inner.notes))


@dataclasses.dataclass(frozen=True)
class _Job:
    technique: Technique
    rest: Technique | None
    sites: Sequence[str] | None
    bits: int
    asked: frozenset[str]


def _build(model: ir.Model, ctx: Context, job: _Job) -> tuple[ir.Model, set[str]]:
    """A quantized copy, and the names of the nodes (of `model`) that compute in integers."""
    copy = surgery.copy_model(model)
    wanted = None if job.sites is None else set(job.sites)
    integer: set[str] = set()
    left: list[Site] = []
    for site in list(job.technique.sites(copy)):
        if wanted is not None and site.name not in wanted:
            continue
        if set(site.nodes) & ctx.keep_float or not list(job.technique.options(copy, site, ctx)):
            left.append(site)
            continue
        job.technique.apply(copy, site, Action.of(job.technique.name, weight_bits=job.bits), ctx)
        integer.update(site.nodes)
    job.technique.finish(copy, ctx)
    if job.rest is not None:
        # What measurement sent back to float compute is still stored in 8 bits; what the user named is not.
        asked = dataclasses.replace(ctx, keep_float=job.asked, notes=ctx.notes)
        _store_rest(copy, asked, job, wanted)
    return copy, integer | _glue_names(copy, model)


def _store_rest(model: ir.Model, ctx: Context, job: _Job, wanted: set[str] | None) -> None:
    """Store the weights that stay in float compute in 8 bits where that makes them smaller."""
    if job.rest is None:
        return
    for site in list(job.rest.sites(model)):
        if wanted is not None and site.name not in wanted:
            continue
        action = Action.of(job.rest.name, bits=8)
        offered = list(job.rest.options(model, site, ctx))
        plain = next((a for a in offered if a.get("bits") == 8 and not a.get("block", 0)), None)
        if plain is not None and job.rest.estimate(model, site, plain, ctx).size_bytes < site.size_bytes:
            job.rest.apply(model, site, plain, ctx)
        elif plain is None:
            ctx.note(site.name, f"stored as it is: {action} is not offered here")
    job.rest.finish(model, ctx)


def _glue_names(built: ir.Model, original: ir.Model) -> set[str]:
    """Nodes of `original` that read only dequantized values and are rounded themselves in `built`."""
    names = {n.name for n in original.graph}
    found = set()
    for node in built.graph:
        if node.name not in names or not node.outputs:
            continue
        rounded = any(u.node.op_type == "QuantizeLinear" for u in node.outputs[0].uses())
        inside = any(
            v is not None and (p := v.producer()) is not None and p.op_type == "DequantizeLinear" for v in node.inputs
        )
        if rounded and inside:
            found.add(node.name or "")
    return found


def _notes(ctx: Context, kept: Mapping[str, str]) -> list[Note]:
    return [*ctx.notes, *(Note(name, text) for name, text in kept.items())]
