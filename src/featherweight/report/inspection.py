"""An Inspection in the terminal: the model at a glance, then where its bytes, operations and time are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from featherweight.core import Profile
from featherweight.quantities import format_bytes, format_count, format_ms, format_percent
from featherweight.report.terminal import Column, Grid, heading, indented, lines
from featherweight.report.text import note_parts, pairs

if TYPE_CHECKING:
    from featherweight.inspection import Inspection, Port

TOP = 12
BAR = 20


def inspection_parts(found: Inspection, *, everything: bool = False) -> list[RenderableType]:
    """The sections, in reading order; `everything` shows all tensors and nodes."""
    return [
        Text.assemble((found.model, "bold"), f"  {format_bytes(found.file_bytes)}"),
        pairs(overview(found)),
        *device_parts(found),
        *bit_parts(found),
        *memory_parts(found),
        *tensor_parts(found, everything=everything),
        *node_parts(found, everything=everything),
        *note_parts(found.notes, everything=everything),
    ]


def overview(found: Inspection) -> Mapping[str, str]:
    """Names and values of the head."""
    ops = ", ".join(f"{n} {op}" for op, n in list(found.ops.items())[:6])
    more = len(found.ops) - 6
    rows = {
        "inputs": ", ".join(port_words(p) for p in found.inputs),
        "outputs": ", ".join(port_words(p) for p in found.outputs),
        "format": f"IR {found.ir_version}, " + ", ".join(f"{d} {v}" for d, v in found.opsets.items()),
        "made by": found.producer,
        "nodes": f"{sum(found.ops.values())}: {ops}" + (f" and {more} more kinds" if more > 0 else ""),
        "parameters": f"{format_count(found.parameters)}, {format_bytes(found.weight_bytes)} stored",
        "MACs a call": f"{format_count(found.macs)} at batch {found.batch}" if found.macs else "",
        "stored compactly": ", ".join(f"{n} as {kind}" for kind, n in found.encodings.items()),
        "target": "" if found.target is None else target_words(found.target),
    }
    return {key: value for key, value in rows.items() if value}


def port_words(port: Port) -> str:
    """'input float32 [batch, 3, 224, 224]'."""
    shape = "any shape" if port.shape is None else f"[{', '.join('?' if d is None else str(d) for d in port.shape)}]"
    return f"{port.name} {port.dtype} {shape}"


def target_words(target: Profile) -> str:
    """What matters of the target for integer types."""
    dot = "int8 dot products" if target.int8_dot else "no int8 dot products: weights are kept pair-safe"
    return f"{target.name}, {target.arch}, {dot}"


def device_parts(found: Inspection) -> list[RenderableType]:
    """Whether it fits the target, and how fast it is predicted to be there."""
    if found.fit is None or found.target is None:
        return []
    fit = found.fit
    rows = {"fits": "yes" if fit.ok else "no: " + "; ".join(fit.reasons)}
    if found.predicted_ms is not None:
        rows["latency"] = f"{format_ms(found.predicted_ms)} a call, predicted from the profile"
    have = format_bytes(found.target.memory_bytes)
    rows["memory"] = f"{format_bytes(fit.memory_bytes)} of {have}, planned, the runtime included"
    if found.target.storage_bytes is not None:
        rows["storage"] = f"{format_bytes(fit.storage_bytes)} of {format_bytes(found.target.storage_bytes)}"
    return [heading(f"On {found.target.name}", found.target.description), pairs(rows)]


def bit_parts(found: Inspection) -> list[RenderableType]:
    """The file at each bit width, with a bar."""
    if not found.bit_floors or not found.compressible_bytes:
        return []
    share = format_percent(found.compressible_bytes / found.file_bytes, 0)
    made = Grid([Column("bits", "right"), Column("file", "right"), Column("of now", "right"), Column("")])
    for floor in found.bit_floors:
        ratio = floor.total_bytes / found.file_bytes
        made.add(str(floor.bits), format_bytes(floor.total_bytes), format_percent(ratio, 0), bar(ratio))
    detail = f"{share} of it can be narrowed; scales not counted"
    return [heading("The file at each bit width", detail), indented(made)]


def memory_parts(found: Inspection) -> list[RenderableType]:
    """Inference against training, planned from the graph."""
    made = Grid(
        [Column(""), *(Column(n, "right") for n in ("total", "weights", "gradients", "optimiser", "activations"))]
    )
    weights = found.inference_bytes - found.peak_activation_bytes
    row = (found.inference_bytes, weights, None, None, found.peak_activation_bytes)
    made.add("inference", *("-" if v is None else format_bytes(v) for v in row), style="bold")
    for name, t in found.training.items():
        values = (t.total, t.weights, t.gradients, t.optimizer, t.activations)
        made.add(f"training, {name}", *(format_bytes(v) for v in values))
    peak = [f"activations peak at {found.peak_node}"] if found.peak_node else []
    return [heading("Memory", f"planned from the graph, batch {found.batch}"), indented(made), *lines(peak, "dim")]


def tensor_parts(found: Inspection, *, everything: bool) -> list[RenderableType]:
    """The largest stored tensors."""
    if not found.tensors:
        return []
    shown = found.tensors if everything else found.tensors[:TOP]
    columns = [Column("tensor", cut="middle", least=26), Column("shape", optional=2), Column("type", optional=3)]
    columns += [Column("used as"), Column("bytes", "right"), Column("share", "right"), Column("", optional=1)]
    made = Grid(columns)
    for t in shown:
        share = t.size_bytes / found.file_bytes
        shape = "x".join(str(d) for d in t.shape) or "scalar"
        used = t.encoding or t.role or "constant"
        made.add(t.name, shape, t.dtype, used, format_bytes(t.size_bytes), format_percent(share), bar(share))
    rest = found.tensors[len(shown) :]
    if rest:
        size = sum(t.size_bytes for t in rest)
        cells = ("", "", "", format_bytes(size), format_percent(size / found.file_bytes), "")
        made.add(f"{len(rest)} smaller tensors", *cells, style="dim")
    return [heading("Bytes", f"{len(found.tensors)} stored tensors"), indented(made)]


def node_parts(found: Inspection, *, everything: bool) -> list[RenderableType]:
    """The most expensive nodes: by measured time if there is any, else by MACs."""
    predicted = found.predicted_ms is not None
    times = {n.name: n.predicted_ms if predicted else n.latency_ms for n in found.nodes}
    timed = any(t is not None for t in times.values())
    ranked = sorted(found.nodes, key=lambda n: (-(times[n.name] or 0.0), -(n.macs or 0), -(n.output_bytes or 0)))
    costly = [n for n in ranked if everything or n.macs or times[n.name]]
    if not costly:
        return []
    shown = costly if everything else costly[:TOP]
    total = sum(t or 0.0 for t in times.values()) if timed else float(found.macs)
    columns = [Column("node", cut="middle", least=26), Column("op", optional=1), Column("MACs", "right")]
    columns += [Column("output", "right", optional=2)] + ([Column("time", "right")] if timed else [])
    made = Grid([*columns, Column("share", "right"), Column("", optional=3)])
    for n in shown:
        share = ((times[n.name] or 0.0) if timed else (n.macs or 0)) / (total or 1.0)
        output = "-" if n.output_bytes is None else format_bytes(n.output_bytes)
        cells = [n.name, n.op_type, format_count(n.macs) if n.macs else "-", output]
        cells += [format_ms(times[n.name])] if timed else []
        made.add(*cells, format_percent(share), bar(share))
    title = "Time" if timed else "Operations"
    how = "predicted" if predicted else "measured"
    detail = f"{format_ms(total)} in all nodes, {how}" if timed else f"{format_count(found.macs)} MACs a call"
    return [heading(title, f"{detail}; the top {len(shown)} of {len(found.nodes)} nodes"), indented(made)]


def bar(share: float) -> Text:
    """A share of 1 as a bar of BAR characters."""
    filled = min(max(round(share * BAR), 0), BAR)
    return Text("#" * filled, style="cyan")
