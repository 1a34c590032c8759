"""Write an encoding into a model in place of an initializer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from featherweight.errors import ModelError, TechniqueError
from featherweight.graph import surgery
from featherweight.graph.encode import make, recipes, rows
from featherweight.graph.encode.codes import pack_bytes
from featherweight.graph.encode.layout import Encoded
from featherweight.graph.encode.match import match
from featherweight.graph.encode.sink import FLOAT, INT4, INT8, NARROW_FLOATS, UINT4, Sink, Tree, cast

MIN_OPSET = 21
_MIN_IR_VERSION = 10
_SHARED = "fw."
Array = np.ndarray[Any, Any]


class Namer:
    """Short free names: `e1`, `e2`...; the file holds each of them three times. Names of shared nodes have a prefix.

    One Namer names everything of one edit, since what it made is not in the model until the end of it.
    """

    def __init__(self, model: ir.Model) -> None:
        self._used = surgery.names(model)
        self._last = 0
        self.prefix = ""

    def __call__(self) -> str:
        """The next name nobody has."""
        while (name := f"{self.prefix}e{self._last}") in self._used:
            self._last += 1
        self._used.add(name)
        return name


class Writer:
    """A Sink that makes nodes for one graph of a model; `attach` puts them in place."""

    def __init__(
        self, model: ir.Model, graph: ir.Graph, arrays: Mapping[str, Array], namer: Namer | None = None,
        stored: dict[str, ir.Value] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.graph, self.arrays = model, graph, arrays
        self.namer: Namer = namer or Namer(model)
        self.nodes: list[ir.Node] = []
        self.stored = {} if stored is None else stored

    def data(self, key: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        if key in self.stored:
            return self.stored[key]
        array = self.arrays[key]
        tensor: ir.TensorProtocol
        if dtype in (INT4, UINT4):
            nibbles = array.reshape(-1).astype(np.uint8) & np.uint8(15)
            packed = pack_bytes(np.pad(nibbles, (0, nibbles.size % 2)), 4)
            tensor = ir.PackedTensor(packed, dtype, shape=ir.Shape(shape))
        else:
            tensor = ir.Tensor(np.array(array.reshape(shape), dtype.numpy(), order="C"))
        self.stored[key] = surgery.add_initializer(self.graph, self.namer(), tensor)
        return self.stored[key]

    def fixed(self, array: Array) -> ir.Value:
        return surgery.add_initializer(self.graph, self.namer(), array)

    def op(self, op_type: str, *inputs: ir.Value, **attrs: int | str) -> ir.Value:
        output = ir.Value(name=self.namer())
        self.nodes.append(ir.node(op_type, inputs, attributes=attrs, outputs=[output], name=output.name))
        return output

    def shared(self, name: str, build: Callable[[Sink[ir.Value]], ir.Value]) -> ir.Value:
        main = self.model.graph
        taken = [n.outputs[0] for n in main if n.outputs and n.outputs[0].name == name]
        if taken and match(build(Tree()), taken[0], {}, exact=True):
            return taken[0]
        root = Writer(self.model, main, {}, self.namer)
        outer, self.namer.prefix = self.namer.prefix, _SHARED
        value = build(root)
        self.namer.prefix = outer
        if not taken:
            value.name = name
        _shared_first(main)
        _insert_first(main, root.nodes)
        return value


def attach(model: ir.Model, value: ir.Value, encoded: Encoded) -> ir.Value:
    """Replace the initializer `value` by nodes that decode `encoded`, in its own graph, under its own name.

    Every reader (in sub-graphs too) reads the decoded value, which is returned; `value` is gone afterwards. Where
    `value` was float16 or bfloat16, the decoded float32 is rounded to that type, so that readers get what they had.
    Raises ModelError if `value` is no initializer, may be overridden by the caller, has another shape, or the
    opset is below 21.
    """
    if encoded.kind == "lookup":
        return _attach_lookup(model, value, encoded)
    name, graph = _check_replaceable(model, value, encoded)
    writer = Writer(model, graph, make.arrays_of(encoded))
    new = _narrowed(writer, recipes.emit(writer, encoded.layout), value, encoded)
    _shared_first(model.graph)
    _insert_first(graph, writer.nodes)
    surgery.replace_uses(value, new)
    surgery.remove_initializer(value)
    new.name = name
    if new.const_value is not None:
        new.const_value.name = name
    new.type = ir.TensorType(_type_after(value, encoded))
    new.shape = ir.Shape(encoded.shape)
    return new


def attach_lookup(model: ir.Model, value: ir.Value, encoded: Encoded) -> ir.Value:
    """`attach` of `lookup(encoded)`: rows are taken coded and decoded after. Returns the last decoded output."""
    return attach(model, value, rows.lookup(encoded))


def _attach_lookup(model: ir.Model, value: ir.Value, encoded: Encoded) -> ir.Value:
    name, graph = _check_replaceable(model, value, encoded)
    uses = list(value.uses())
    for node, index in uses:
        axis = node.attributes.get("axis")
        if node.op_type != "Gather" or index != 0 or (axis is not None and axis.value != 0):
            raise TechniqueError(
                f"every reader of a looked-up table must be a Gather on axis 0, but {name!r} is input {index} of "
                f"{node.op_type} {node.name!r}; attach it folded instead"
            )
    if not uses or value.is_graph_output():
        raise TechniqueError(
            f"a looked-up table must be read by Gather nodes only, but {name!r} is not; keep it folded"
        )
    stored: dict[str, ir.Value] = {}
    namer, arrays = Namer(model), make.arrays_of(encoded)
    for node, _ in uses:
        indices = node.inputs[1]
        assert indices is not None, "a Gather has indices"
        rank = rows.UNKNOWN_RANK if indices.shape is None else len(indices.shape)
        writer = Writer(model, graph, arrays, namer, stored)
        looked_up = rows.emit(writer, dataclasses.replace(encoded.layout, rank=rank), indices)
        new = _narrowed(writer, looked_up, value, encoded)
        surgery.insert_before(node, writer.nodes)
        _take_over(node, new)
    _shared_first(model.graph)
    surgery.remove_initializer(value)
    next(v for k, v in stored.items() if k not in ("codebook", "scale")).name = name
    return new


def _take_over(node: ir.Node, new: ir.Value) -> None:
    """Put `new` in the place of the output of `node`, which goes."""
    old = node.outputs[0]
    name = old.name
    surgery.replace_uses(old, new)
    new.type, new.shape = old.type or ir.TensorType(FLOAT), old.shape
    surgery.remove_node(node)
    new.name = name


def _type_after(value: ir.Value, encoded: Encoded) -> ir.DataType:
    """Type that readers of `value` get once it is decoded."""
    if encoded.kind == "int_tensor" or (encoded.kind == "palette" and encoded.layout.integer):
        return INT8
    return value.dtype if value.dtype in NARROW_FLOATS else FLOAT


def _narrowed(writer: Writer, decoded: ir.Value, value: ir.Value, encoded: Encoded) -> ir.Value:
    """Round a decoded float32 to the narrower float type `value` had."""
    wanted = _type_after(value, encoded)
    return cast(writer, decoded, wanted) if wanted in NARROW_FLOATS else decoded


def _check_replaceable(model: ir.Model, value: ir.Value, encoded: Encoded) -> tuple[str, ir.Graph]:
    """Name and graph of an initializer that `encoded` may replace; raises ModelError otherwise."""
    if not value.is_initializer() or value.name is None:
        raise ModelError(f"only a stored tensor can be encoded, but {value.name!r} is computed or already encoded")
    if value.is_graph_input():
        raise ModelError(
            f"the stored tensor {value.name!r} is also an input that callers may set; normalise the model first"
        )
    if value.shape is not None and value.shape.numpy() != encoded.shape:
        raise ModelError(
            f"an encoding must have the shape of the tensor it replaces, but {value.name!r} is "
            f"{value.shape.numpy()} and the encoding {encoded.shape}; encode the stored layout"
        )
    opset = model.graph.opset_imports.get("", 0)
    if opset < MIN_OPSET:
        raise ModelError(f"encodings need opset {MIN_OPSET} or newer, but the model has {opset}; normalise it first")
    model.ir_version = max(model.ir_version, _MIN_IR_VERSION)
    return value.name, surgery.graph_of(value)


def _shared_first(graph: ir.Graph) -> None:
    """Let the shared tables (which depend on nothing) lead the main graph, whatever sorted it since."""
    tables = _shared_nodes(graph)
    leading = [node for node, _ in zip(graph, tables, strict=False)]
    if leading != tables:
        graph.remove(tables)
        graph.insert_before(graph[0], tables)


def _insert_first(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Put decode nodes at the start of a graph, after the shared tables that lead the main graph."""
    if not nodes:
        return
    tables = set(_shared_nodes(graph))
    follower = next((node for node in graph if node not in tables), None)
    if follower is None:
        graph.extend(nodes)
    else:
        graph.insert_before(follower, nodes)


def _shared_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Nodes of shared tables in order: named as such, and computed from stored constants and each other alone."""
    found: dict[ir.Node, None] = {}
    for node in graph:
        if all((o.name or "").startswith(_SHARED) for o in node.outputs) and all(
            v is not None and (v.producer() in found or (v.is_initializer() and not v.is_graph_input()))
            for v in node.inputs
        ):
            found[node] = None
    return list(found)
