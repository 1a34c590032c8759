"""Which layers of a reduced model can be solved anew, and what each should answer."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Note
from featherweight.graph import channels, surgery
from featherweight.graph.weights import Weight, WeightUse, weights
from featherweight.recover.rows import Geometry
from featherweight.stats.reads import window_of

F32 = npt.NDArray[np.float32]
#: Above this many inputs a row, second moments and their solution would take minutes and more than 200 MB a layer.
LARGEST_K = 5120


@dataclass(frozen=True)
class Layer:
    """One weight of the reduced model and the value it should bring near the original's.

    `source`: its input; `made`: output of its node; `target`: the value compared (behind the bias, or behind the
    residual sum); `other`: the second operand of that sum, taken off the target. `kept`: (axis, channels of the
    original's target) or None. `bias`: name of the initializer that holds it, None if there can be none; the layer
    adds `factor` times it. `groups`, `out`, `k`: of the weight's matrix.
    """

    weight: str
    source: str
    made: str
    target: str
    other: str | None
    kept: tuple[int, tuple[int, ...]] | None
    bias: str | None
    factor: float
    scale: float
    geometry: Geometry
    groups: int
    out: int
    k: int


@dataclass(frozen=True)
class _Place:
    """Where the bias is: input `index` of `node`; `value` is what a reader of the layer sees."""

    node: ir.Node
    index: int
    value: ir.Value
    factor: float


def prepare(original: ir.Model, reduced: ir.Model) -> tuple[list[Layer], list[Note]]:
    """Layers of `reduced` worth solving, in topological order, each with a bias of its own; edits only biases.

    A layer is left out where nothing about it or its input changed, where its output has no counterpart of the same
    meaning in `original`, and (with a note) where its weight has several uses or is too large.
    """
    theirs = {v.name for node in original.graph for v in node.outputs if v.name}
    changed = changed_values(original, reduced)
    order = {node: i for i, node in enumerate(reduced.graph)}
    known = {w.name: w for w in weights(original)}
    found, notes = [], []
    listed = [w for w in weights(reduced) if w.main_use.node in order]
    for weight in sorted(listed, key=lambda w: order[w.main_use.node]):
        layer, place = _layer(weight, theirs)
        if layer is None or place is None:
            continue
        behind = _sum_behind(place.value)
        beside = behind is not None and behind[0].name in changed
        if not beside and _same(layer, weight, known.get(weight.name), changed):
            continue
        if len(weight.uses) > 1 or layer.k > LARGEST_K:
            why = "it is used in several places" if len(weight.uses) > 1 else f"its {layer.k} inputs are too many"
            notes.append(Note(weight.name, f"not solved anew after the structure changed: {why}"))
            continue
        found.append(replace(layer, bias=_own_bias(reduced, place, layer, weight.name)))
    last = {layer.made: i for i, layer in enumerate(found)}
    return [_with_residual(reduced, layer, i, last, theirs) for i, layer in enumerate(found)], notes


def changed_values(original: ir.Model, reduced: ir.Model) -> set[str]:
    """Names of values of `reduced` that do not hold what the original's value of that name holds."""
    stored = dict(original.graph.initializers)
    nodes = {v.name: node for node in original.graph for v in node.outputs}
    same: dict[str, bool] = {}
    changed: set[str] = set()

    def altered(value: ir.Value | None) -> bool:
        if value is None:
            return False
        name = value.name or ""
        if not value.is_initializer():
            return name in changed
        if name not in same:
            a, b = value.const_value, stored[name].const_value if name in stored else None
            same[name] = a is b or (
                a is not None
                and b is not None
                and a.shape == b.shape
                and a.dtype == b.dtype
                and a.tobytes() == b.tobytes()
            )
        return not same[name]

    for node in reduced.graph:
        twin = nodes.get(node.outputs[0].name) if node.outputs else None
        inside = {v for g in surgery.bodies(node) for n in surgery.walk(g) for v in n.inputs}
        if (
            twin is None
            or twin.op_type != node.op_type
            or any(altered(v) for v in node.inputs)
            or any(altered(v) for v in inside if v is not None and (v.is_initializer() or v.name in changed))
            or any(v.name not in nodes for v in node.outputs)
        ):
            changed.update(v.name for v in node.outputs if v.name)
    return changed


def _layer(weight: Weight, theirs: Set[str]) -> tuple[Layer | None, _Place | None]:
    use = weight.main_use
    geometry = _geometry(weight, use)
    source, made = use.input_value, use.node.outputs[0]
    if geometry is None or source is None or not source.name or not made.name or source.const_value is not None:
        return None, None
    place = _place(weight, use)
    shown = made if place is None else place.value
    if shown.name not in theirs and made.name in theirs:
        place, shown = None, made
    if shown.name not in theirs:
        return None, None
    groups, out, k = weight.matrix_shape
    scale = _float(use.node, "alpha", 1.0) if use.role == "gemm" else 1.0
    factor = place.factor if place is not None else 1.0
    place = place or _Place(use.node, -1, made, 1.0)
    layer = Layer(
        weight.name, source.name, made.name, shown.name or "", None, _kept(shown), None, factor, scale, geometry,
        groups, out, k,
    )  # fmt: skip
    return layer, place


def _kept(value: ir.Value) -> tuple[int, tuple[int, ...]] | None:
    found = channels.kept(value)
    return None if found is None else (found[0], tuple(int(i) for i in found[1]))


def _geometry(weight: Weight, use: WeightUse) -> Geometry | None:
    if use.role in ("conv", "conv_transpose"):
        window = window_of(use.node, weight.shape[2:], use.role == "conv_transpose")
        return Geometry(use.role, weight.matrix_shape[0], window) if not use.layout else None
    if use.role == "gemm":
        flip = use.node.attributes.get("transA")
        return Geometry("gemm", 1, flip=flip is not None and flip.as_int() == 1)
    if use.role in ("matmul", "matmul_left") and len(weight.shape) == 2:
        rank = use.input_value.shape if use.input_value is not None else None
        return Geometry(use.role, 1) if rank is None or len(rank) > 1 else None
    return None


def _place(weight: Weight, use: WeightUse) -> _Place | None:
    node, made = use.node, use.node.outputs[0]
    if use.role in ("conv", "conv_transpose"):
        return _Place(node, 2, made, 1.0)
    if use.role == "gemm":
        beta = _float(node, "beta", 1.0)
        current = node.inputs[2] if len(node.inputs) > 2 else None
        fits = current is None or (surgery.constant(current) is not None and _is_row(current, weight.matrix_shape[1]))
        return _Place(node, 2, made, beta) if beta and fits else None
    if use.role != "matmul":
        return None
    adder = _only_reader(made, "Add")
    if adder is None:
        return None
    reader, index = adder
    value = reader.inputs[1 - index]
    if value is None or surgery.constant(value) is None or not _is_row(value, weight.matrix_shape[1]):
        return None
    return _Place(reader, 1 - index, reader.outputs[0], 1.0)


def _is_row(value: ir.Value, width: int) -> bool:
    array = surgery.constant(value)
    return array is not None and array.size == width and array.shape[-1:] == (width,) and array.dtype.kind == "f"


def _only_reader(value: ir.Value, op_type: str) -> tuple[ir.Node, int] | None:
    """The single node that reads `value` and the input at which, if it is an `op_type` of the same graph."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node, index, maker = uses[0].node, uses[0].idx, value.producer()
    return (node, index) if node.op_type == op_type and maker is not None and node.graph is maker.graph else None


def _same(layer: Layer, weight: Weight, twin: Weight | None, changed: set[str]) -> bool:
    """True where the input is the original's and the weight is its rows that are left: nothing to do."""
    if layer.made not in changed and layer.source not in changed:
        return True
    if layer.source in changed or twin is None or twin.matrix_shape[2] != layer.k or layer.groups != 1:
        return False
    rows = twin.to_matrix(twin.array())[0]
    if layer.kept is not None:
        rows = rows[list(layer.kept[1])]
    return np.array_equal(rows, weight.to_matrix(weight.array())[0])


def _own_bias(model: ir.Model, place: _Place, layer: Layer, hint: str) -> str | None:
    """Give the layer a bias that nothing else reads; its name. None where it can have none."""
    if place.index < 0:
        return None
    node = place.node
    value = node.inputs[place.index] if place.index < len(node.inputs) else None
    width = layer.groups * layer.out
    array = surgery.constant(value)
    if value is not None and (array is None or array.size != width):
        return None
    if value is not None and len(list(value.uses())) == 1 and not value.is_graph_output():
        return value.name
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        return None
    kind = node.inputs[layer_weight_index(node)]
    dtype = kind.dtype.numpy() if kind is not None and kind.dtype is not None else np.dtype(np.float32)
    fresh = np.zeros(width, dtype) if array is None else array
    made = surgery.add_initializer(graph, surgery.fresh_name(model, f"{hint}_bias"), fresh)
    surgery.replace_input(node, place.index, made)
    return made.name


def layer_weight_index(node: ir.Node) -> int:
    """The input whose type a bias must have."""
    return 1 if len(node.inputs) > 1 and node.op_type != "Add" else 0


def _with_residual(model: ir.Model, layer: Layer, index: int, made_by: Mapping[str, int], theirs: Set[str]) -> Layer:
    """The layer aiming at the sum that follows it, where that can be known when the layer is solved."""
    values = {v.name: v for node in model.graph for v in node.outputs}
    behind = _sum_behind(values[layer.target])
    if behind is None or behind[1].name not in theirs:
        return layer
    other, total = behind
    # A later layer above the other operand would change it again.
    if any(made_by.get(name, -1) >= index for name in _above(other)):
        return layer
    return replace(layer, target=total.name or "", other=other.name or None, kept=_kept(total))


def _sum_behind(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """(Other operand, sum) where `value` goes nowhere but into a residual Add."""
    adder = _only_reader(value, "Add")
    if adder is None:
        return None
    node, at = adder
    other = node.inputs[1 - at]
    if other is None or not other.name or other.const_value is not None or not node.outputs[0].name:
        return None
    return other, node.outputs[0]


def _above(value: ir.Value) -> set[str]:
    """Names of all values of the graph from which `value` is made, itself among them."""
    todo, found = [value], set()
    while todo:
        v = todo.pop()
        if v.name and v.name not in found:
            found.add(v.name)
            node = v.producer()
            if node is not None:
                todo += [i for i in node.inputs if i is not None]
                todo += [i for g in surgery.bodies(node) for n in surgery.walk(g) for i in n.inputs if i is not None]
    return found


def _float(node: ir.Node, name: str, default: float) -> float:
    found = node.attributes.get(name)
    return default if found is None else float(found.as_float())
