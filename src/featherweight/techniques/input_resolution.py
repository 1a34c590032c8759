"""A convolutional network made to look at its input in fewer pixels: work falls with their number, weights stay.

The first thing such a network is given is resampled to a smaller grid (bilinear, as the training of most networks
does), behind whatever prepares the input. Every convolution and pooling then runs at fewer places, and what follows a
global pooling notices nothing. It costs accuracy because things appear smaller than in training (Touvron 2019,
arXiv:1906.06423); which side of a network is best cut is a question of its own (Tan 2019, arXiv:1905.11946, section 3).
Callers feed the same input as before.

A site is a value of four axes in NCHW; an option says how many rows and columns are left: whole steps of the network's
total stride less, since windows of other sizes fall between the pixels they were trained for. Where outputs change
their shape with the input's (a segmentation, a text line), where a layer counts on a fixed number of places, or where
places are what is answered, nothing is offered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from featherweight.core import Action, Site, Stage
from featherweight.errors import TechniqueError
from featherweight.graph import cost, repair, shapes, surgery
from featherweight.techniques._protocol import Context, Estimate, Technique

#: Options of a site at most, and the least share of the rows that is left.
MOST_OPTIONS = 6
LEAST_SHARE = 0.4
#: Bytes of the node, its two sizes and its names.
NODE_BYTES = 200
#: Operators that give the same pixels back: what an input passes before a network begins.
_PREPARES = frozenset({"Identity", "Cast", "Transpose", "Add", "Sub", "Mul", "Div", "BatchNormalization", "Clip"})
_WINDOWS = frozenset({"Conv", "MaxPool", "AveragePool", "LpPool", "ConvInteger", "QLinearConv"})
#: What leaves no places; a Reshape may be a shuffle of channels in the middle of a network.
_POOLS = frozenset({"GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "Flatten", "ReduceMean", "ReduceMax"})
#: What may answer in pixels, or a number of things that depends on them.
_PLACED = frozenset({"TopK", "NonMaxSuppression", "NonZero", "RoiAlign", "MaxRoiPool", "GridSample", "Range"})
_PRODUCTS = frozenset({"Gemm", "MatMul"})
NOT_KNOWN = "shapes behind it are not known"
Sizes = Mapping[str, shapes.Known]


@dataclass(frozen=True)
class _Grid:
    """Rows and columns at a site, and the strides between its places and the smallest map behind it."""

    rows: int
    columns: int
    down: int
    across: int

    def options(self) -> list[tuple[int, int]]:
        """(rows, columns) from large to small, at most MOST_OPTIONS, evenly spread."""
        found = []
        for rows in range(self.rows - self.down, 0, -self.down):
            columns = max(round(self.columns * rows / self.rows / self.across), 1) * self.across
            if rows >= LEAST_SHARE * self.rows and columns < self.columns:
                found.append((rows, columns))
        if len(found) <= MOST_OPTIONS:
            return found
        return [found[i] for i in np.linspace(0, len(found) - 1, MOST_OPTIONS).round().astype(int)]


class InputResolution:
    """See the module's text. Sites are the values at which images enter the network."""

    name: ClassVar[str] = "input_resolution"
    stage: ClassVar[Stage] = "structure"
    integer: ClassVar[bool] = False

    def sites(self, model: ir.Model) -> Iterable[Site]:
        """One for each input that is an image and is read by a window operator."""
        found, paths = [], surgery.paths(model)
        for value in model.graph.inputs:
            entry = _entry(value)
            if entry is not None and entry.name:
                nodes = tuple(paths[n] for n in _windowed(entry))
                found.append(Site(f"resolution of {entry.name}", "model", (), nodes, 0))
        return found

    def options(self, model: ir.Model, site: Site, ctx: Context) -> Iterable[Action]:
        """Smaller grids at which the outputs keep their shapes."""
        known = _known(model, ctx)
        grid = _grid(_value(model, site), known)
        if grid is None:
            ctx.note(site.name, "the resolution stays: rows and columns of the input are not known")
            return []
        placed = sorted({n.op_type for n in _windowed(_value(model, site), _POOLS - {"Flatten"})} & _PLACED)
        if placed:
            ctx.note(site.name, f"the resolution stays: {placed[0]} behind it speaks of places")
            return []
        found = []
        for rows, columns in grid.options():
            why = _refused(model, site, (rows, columns), known, ctx)
            if why:
                ctx.note(site.name, f"the resolution stays: {why}")
                return []
            found.append(Action.of(self.name, rows=rows, columns=columns))
        if not found:
            ctx.note(site.name, f"no gain: of {grid.rows} x {grid.columns} places none can go in steps of {grid.down}")
        return found

    def estimate(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:
        """Exact operations of what runs at fewer places. The noise is only ranked here (it is measured, see `curves`):
        the share of places that are gone.
        """
        small = surgery.copy_model(model)
        _insert(small, _value(small, site), _asked(action), _known(small, ctx))
        before, after = ctx.costs(model), cost.costs(small, input_shapes=ctx.input_shapes)
        inside = set(site.nodes)
        work = [sum(n.macs or 0 for n in c.nodes if n.name in inside) for c in (before, after)]
        share = work[1] / work[0] if work[0] else 1.0
        saved = after.peak_activation_bytes - before.peak_activation_bytes
        return Estimate(NODE_BYTES, 1.0 - share, share, activation_bytes=saved)

    def apply(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:
        """Resample the value for all its readers; shapes stored behind it are forgotten."""
        known = _known(model, ctx)
        rows, columns = _asked(action)
        grid = _grid(_value(model, site), known)
        if grid is not None and not (0 < rows <= grid.rows and 0 < columns <= grid.columns):
            raise TechniqueError(
                f"{site.name} must become 1..{grid.rows} rows of 1..{grid.columns}, but got {rows} x {columns}"
            )
        _insert(model, _value(model, site), (rows, columns), known)
        return (site,)

    def finish(self, model: ir.Model, ctx: Context) -> None:
        """Nothing is left to do."""


def _entry(value: ir.Value) -> ir.Value | None:
    """Where the pixels of an input first meet a window, behind what prepares them; None where they do not."""
    rank = len(value.shape) if value.shape is not None else None
    if rank != 4:
        return None
    while True:
        readers = [node for node, _ in value.uses()]
        if any(n.op_type in _WINDOWS and n.inputs[0] is value for n in readers):
            return None if value.is_graph_output() else value
        if len(readers) != 1 or readers[0].op_type not in _PREPARES or value.is_graph_output():
            return None
        node = readers[0]
        if any(v is not value and not surgery.is_constant(v) for v in node.inputs if v is not None):
            return None
        value = node.outputs[0]


def _windowed(entry: ir.Value, ends: frozenset[str] = _POOLS) -> list[ir.Node]:
    """Nodes of the main graph behind a value, in stored order, as far as maps of places reach."""
    reached: set[ir.Value] = {entry}
    found = []
    for node in surgery.graph_of(entry):
        if not any(v in reached for v in node.inputs if v is not None):
            continue
        found.append(node)
        if node.op_type not in ends:
            reached.update(node.outputs)
    return found


def _value(model: ir.Model, site: Site) -> ir.Value:
    """The value of a site. Raises TechniqueError."""
    for value in model.graph.inputs:
        entry = _entry(value)
        if entry is not None and f"resolution of {entry.name}" == site.name:
            return entry
    raise TechniqueError(f"a site must be an image at the entry of the model, but there is no {site.name!r}")


def _known(model: ir.Model, ctx: Context) -> Sizes:
    """Shapes at those of the data, or of the inputs as declared; what is declared of the outputs is not believed."""
    bare = surgery.copy_model(model)
    for output in bare.graph.outputs:
        output.shape = None
    return shapes.infer(bare, ctx.input_shapes or None)


def _grid(value: ir.Value, known: Sizes) -> _Grid | None:
    """Rows, columns and total strides; None where they are not known."""
    at = _places(value, known)
    if at is None:
        return None
    strides: dict[ir.Value, tuple[int, int]] = {value: (1, 1)}
    total = (1, 1)
    for node in _windowed(value):
        before = [strides[v] for v in node.inputs if v is not None and v in strides]
        own = _strides(node)
        now = (max(b[0] for b in before) * own[0], max(b[1] for b in before) * own[1])
        strides.update(dict.fromkeys(node.outputs, now))
        places = _places(node.outputs[0], known) if node.op_type in _WINDOWS else None
        if places is not None and min(places) > 1:  # gates look at a map of one place
            total = (max(total[0], now[0]), max(total[1], now[1]))
    return _Grid(*at, *total)


def _strides(node: ir.Node) -> tuple[int, int]:
    """Rows and columns that a window moves by."""
    found = node.attributes.get("strides") if node.op_type in _WINDOWS else None
    steps = found.as_ints() if found is not None else ()
    return (int(steps[0]), int(steps[1])) if len(steps) == 2 else (1, 1)


def _places(value: ir.Value, known: Sizes) -> tuple[int, int] | None:
    found = known.get(value.name or "")
    shape = value.shape if found is None or found.shape is None else found.shape
    if shape is None or len(shape) != 4 or not all(isinstance(d, int) for d in (shape[2], shape[3])):
        return None
    return int(shape[2]), int(shape[3])  # type: ignore[arg-type]


def _refused(model: ir.Model, site: Site, to: tuple[int, int], known: Sizes, ctx: Context) -> str:
    """Why the model cannot look at so few pixels, or nothing."""
    small = surgery.copy_model(model)
    _insert(small, _value(small, site), to, known)
    after = _known(small, ctx)
    for node in small.graph:
        if node.op_type not in _PRODUCTS:
            continue
        for value in (v for v in node.inputs[:2] if v is not None):
            summed = {_summed(node, value, k) for k in (known, after)}
            if None not in summed and len(summed) > 1:
                return f"{surgery.paths(small)[node]} counts on a fixed number of places"
    for output in small.graph.outputs:
        before, now = (_dims(k.get(output.name or "")) for k in (known, after))
        if now is None or before != now:
            return f"the output {output.name!r} changes its shape with it" if now else NOT_KNOWN
    costs = (ctx.costs(model), cost.costs(small, input_shapes=ctx.input_shapes))
    counted, still = ({n.name for n in c.nodes if n.macs is not None} for c in costs)
    return NOT_KNOWN if counted - still else ""


def _dims(found: shapes.Known | None) -> tuple[int | None, ...] | None:
    """Sizes; None for those that are open, whose names inference makes up."""
    if found is None or found.shape is None:
        return None
    return tuple(d if isinstance(d, int) else None for d in found.shape)


def _summed(node: ir.Node, value: ir.Value, known: Sizes) -> int | None:
    """Length of the axis of `value` over which a product sums."""
    dims = _dims(known.get(value.name or ""))
    if not dims:
        return None
    first = value is node.inputs[0]
    flips = node.attributes.get("transA" if first else "transB") if node.op_type == "Gemm" else None
    last = first != bool(flips is not None and flips.as_int())
    return dims[-1] if last or len(dims) == 1 else dims[-2]


def _asked(action: Action) -> tuple[int, int]:
    return int(action.get("rows", 0)), int(action.get("columns", 0))


def _insert(model: ir.Model, value: ir.Value, to: tuple[int, int], known: Sizes) -> None:
    """Put a Resize behind `value`. Where the graph leaves its rows or columns open it gets their ratio, else sizes."""
    named = surgery.Namer(model)
    declared = value.shape is not None and all(isinstance(d, int) for d in (value.shape[2], value.shape[3]))
    at = None if declared else _places(value, known)
    readers = list(value.uses())
    inputs: list[ir.Value | None] = [value, None, None]
    if at is None:
        inputs.append(surgery.add_initializer(model.graph, named(f"{value.name}.places"), np.array(to, np.int64)))
    else:
        ratio = np.array([_ratio(n, d) for n, d in zip(to, at, strict=True)], np.float32)
        inputs[2] = surgery.add_initializer(model.graph, named(f"{value.name}.ratio"), ratio)
    node = surgery.make_node(
        named, "Resize", inputs, f"{value.name}.smaller", attributes={"mode": "linear", "axes": [2, 3]}
    )
    surgery.insert_after(value, [node])
    small = node.outputs[0]
    small.type = value.type
    for reader, index in readers:
        surgery.replace_input(reader, index, small)
    repair.renew_shapes(model)  # a stored shape that is stale would win over the right one


def _ratio(to: int, of: int) -> np.float32:
    """The ratio in float32, or a little more: the runtime rounds its product down, which must not end a pixel short."""
    ratio = np.float32(to / of)
    while min(float(np.float32(of) * ratio), of * float(ratio)) < to:  # some multiply in float32, others in float64
        ratio = np.nextafter(ratio, np.float32(2))
    return ratio


TECHNIQUE: Technique = InputResolution()
