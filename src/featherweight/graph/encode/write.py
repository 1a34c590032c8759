"""Write an encoding into a model in place of an initializer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from featherweight.errors import ModelError
from featherweight.graph import surgery
from featherweight.graph.encode import make, recipes
from featherweight.graph.encode.codes import pack_bytes
from featherweight.graph.encode.layout import Encoded
from featherweight.graph.encode.match import match
from featherweight.graph.encode.sink import FLOAT, INT4, INT8, UINT4, Sink, Tree

MIN_OPSET = 21
_MIN_IR_VERSION = 10
_SHARED = "fw."
Array = np.ndarray[Any, Any]


class Namer:
    """Short free names: `e1`, `e2`...; the file holds each of them three times."""

    def __init__(self, model: ir.Model) -> None:
        self._used = surgery.names(model)
        self._last = 0

    def __call__(self) -> str:
        """The next name nobody has."""
        while (name := f"e{self._last}") in self._used:
            self._last += 1
        self._used.add(name)
        return name


class Writer:
    """A Sink that makes nodes for one graph of a model; they are inserted by `place`."""

    def __init__(
        self, model: ir.Model, graph: ir.Graph, arrays: Mapping[str, Array], namer: Callable[[], str] | None = None
    ) -> None:
        self.model, self.graph, self.arrays = model, graph, arrays
        self.namer = namer or Namer(model)
        self.nodes: list[ir.Node] = []

    def data(self, key: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        array = self.arrays[key]
        tensor: ir.TensorProtocol
        if dtype in (INT4, UINT4):
            nibbles = array.reshape(-1).astype(np.uint8) & np.uint8(15)
            packed = pack_bytes(np.pad(nibbles, (0, nibbles.size % 2)), 4)
            tensor = ir.PackedTensor(packed, dtype, shape=ir.Shape(shape))
        else:
            tensor = ir.Tensor(np.array(array.reshape(shape), dtype.numpy(), order="C"))
        return surgery.add_initializer(self.graph, self.namer(), tensor)

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
        root = Writer(self.model, main, {}, lambda: f"{_SHARED}{self.namer()}")
        value = build(root)
        if not taken:
            value.name = name
        _shared_first(main)
        _insert_first(main, root.nodes)
        return value


def attach(model: ir.Model, value: ir.Value, encoded: Encoded) -> ir.Value:
    """Replace the initializer `value` by nodes that decode `encoded`, in its own graph, under its own name.

    Every reader (in sub-graphs too) reads the decoded value, which is returned; `value` is gone afterwards.
    Raises ModelError if `value` is no initializer, may be overridden by the caller, or the opset is below 21.
    """
    name, graph = check_replaceable(model, value)
    writer = Writer(model, graph, make.arrays_of(encoded))
    new = recipes.emit(writer, encoded.layout)
    _shared_first(model.graph)
    _insert_first(graph, writer.nodes)
    surgery.replace_uses(value, new)
    surgery.remove_initializer(value)
    new.name = name
    if new.const_value is not None:
        new.const_value.name = name
    integer = encoded.kind == "int_tensor" or (encoded.kind == "palette" and encoded.layout.integer)
    new.type = ir.TensorType(INT8 if integer else FLOAT)
    new.shape = ir.Shape(encoded.shape)
    return new


def check_replaceable(model: ir.Model, value: ir.Value) -> tuple[str, ir.Graph]:
    """Name and graph of an initializer that may be replaced; raises ModelError otherwise."""
    if not value.is_initializer() or value.name is None:
        raise ModelError(f"only a stored tensor can be encoded, but {value.name!r} is computed or already encoded")
    if value.is_graph_input():
        raise ModelError(
            f"the stored tensor {value.name!r} is also an input that callers may set; normalise the model first"
        )
    opset = model.graph.opset_imports.get("", 0)
    if opset < MIN_OPSET:
        raise ModelError(f"encodings need opset {MIN_OPSET} or newer, but the model has {opset}; normalise it first")
    model.ir_version = max(model.ir_version, _MIN_IR_VERSION)
    return value.name, surgery.graph_of(value)


def _shared_first(graph: ir.Graph) -> None:
    """Let the shared tables (which depend on nothing) lead the main graph, whatever sorted it since."""
    tables = [node for node in graph if _is_shared(node)]
    leading = [node for node, _ in zip(graph, tables, strict=False)]
    if leading != tables:
        graph.remove(tables)
        graph.insert_before(graph[0], tables)


def _insert_first(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Put decode nodes at the start of a graph, after the shared tables that lead the main graph."""
    if not nodes:
        return
    follower = next((node for node in graph if not _is_shared(node)), None)
    if follower is None:
        graph.extend(nodes)
    else:
        graph.insert_before(follower, nodes)


def _is_shared(node: ir.Node) -> bool:
    return any((o.name or "").startswith(_SHARED) for o in node.outputs)
