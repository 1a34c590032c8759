"""The only code that edits nodes. Every function works in place on the model it is given; copy first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from featherweight.errors import ModelError


def copy_model(model: ir.Model) -> ir.Model:
    """A copy whose graphs may be edited freely; the weights' bytes are shared, not copied.

    Raises ModelError for a graph that cannot be walked, such as a body that reads a tensor of a sister body.
    """
    if _is_sorted(model):
        try:
            new = model.clone()
        except RuntimeError as e:
            raise ModelError("the graph contradicts itself (a node reads what it cannot see); export it again") from e
    else:
        # The library clones only sorted graphs; the way through the protobuf does not care.
        new = ir.serde.deserialize_model(to_proto(model))
        for old_graph, new_graph in zip(model.graphs(), new.graphs(), strict=True):
            for name, value in old_graph.initializers.items():
                new_graph.initializers[name].const_value = value.const_value
    # A tensor carries its name, so a shared one would be renamed in both models.
    _map_tensors(new, _share)
    return new


def _share(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Another tensor object on the same bytes."""
    if isinstance(tensor, ir.TensorProtoTensor):
        return materialise(tensor)
    return copy.copy(tensor)


def materialise(tensor: ir.TensorProtoTensor) -> ir.TensorProtocol:
    """A tensor read out of the protobuf once, instead of at each access."""
    if tensor.dtype == ir.DataType.STRING:
        return ir.StringTensor(tensor.numpy().ravel().tolist(), shape=tensor.shape, name=tensor.name)
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)


def _map_tensors(model: ir.Model, change: Callable[[ir.TensorProtocol], ir.TensorProtocol]) -> None:
    """Replace every tensor of every graph and function, initializers and attributes."""
    for graph in [*model.graphs(), *(f.graph for f in model.functions.values())]:
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = change(value.const_value)
        for node in graph:
            for name, attr in list(node.attributes.items()):
                if not attr.is_ref() and attr.type == ir.AttributeType.TENSOR:
                    node.attributes[name] = ir.AttrTensor(name, change(attr.as_tensor()))


def read_protobuf(model: ir.Model) -> None:
    """Take all tensors out of the protobuf they were parsed from, in place."""
    _map_tensors(model, lambda t: materialise(t) if isinstance(t, ir.TensorProtoTensor) else t)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a protobuf. Raises ModelError where something in it has no place in the format."""
    try:
        return ir.serde.serialize_model(model)
    except (ValueError, TypeError, AttributeError, RuntimeError) as e:
        root: BaseException = e
        while root.__cause__ is not None:
            root = root.__cause__
        reason = (str(root).strip() or type(root).__name__).splitlines()[0][:200]
        raise ModelError(f"the model cannot be written as ONNX: {reason}; export it again") from e


def _is_sorted(model: ir.Model) -> bool:
    seen: set[ir.Node] = set()
    for graph in model.graphs():
        seen.clear()
        for node in graph:
            if any(p not in seen for p in node.predecessors() if p.graph is graph):
                return False
            seen.add(node)
    return True


def read_small(model: ir.Model, *, below_bytes: int = 1 << 16) -> None:
    """Bring small tensors of side files into memory: graph libraries need the values of shapes and axes.

    Raises ModelError if the side file cannot be read.
    """
    _map_tensors(model, lambda t: in_memory(t) if t.nbytes < below_bytes else t)


def in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same tensor without reference to a file; its bytes stay memory-mapped until they are touched."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    try:
        return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)
    except (OSError, ValueError) as e:
        raise ModelError(f"the external data of {tensor.name!r} cannot be read from {tensor.path}: {e}") from e


def walk(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """Every node of `graph` and of the sub-graphs inside it, outer node before its body."""
    yield from ir.traversal.RecursiveGraphIterator(graph)


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The sub-graphs of one node."""
    for attr in node.attributes.values():
        if not attr.is_ref() and attr.type == ir.AttributeType.GRAPH:
            yield attr.as_graph()
        elif not attr.is_ref() and attr.type == ir.AttributeType.GRAPHS:
            yield from attr.as_graphs()


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node needs of its own graph: its inputs and what its sub-graphs capture, at any depth."""
    yield from (v for v in node.inputs if v is not None)
    for body in bodies(node):
        yield from (v for v in _captured(body) if v.graph is node.graph)


def _captured(body: ir.Graph) -> Iterator[ir.Value]:
    yield from body.outputs
    for inner in walk(body):
        yield from (v for v in inner.inputs if v is not None)
        for deeper in bodies(inner):
            yield from deeper.outputs


def names(model: ir.Model) -> set[str]:
    """Every node and value name in use anywhere in the model."""
    used: set[str] = set()
    for graph in model.graphs():
        used.update(v.name for v in graph.inputs if v.name)
        used.update(graph.initializers)
        for node in graph:
            if node.name:
                used.add(node.name)
            used.update(v.name for v in node.outputs if v.name)
    return used


def fresh_name(model: ir.Model, hint: str) -> str:
    """`hint`, or `hint_2`, `hint_3`...: the first that no node or value of the model has.

    Reads the whole model; for many names at once use `Namer`.
    """
    return Namer(model)(hint)


class Namer:
    """Gives names that are free in one model, remembering those it gave."""

    def __init__(self, model: ir.Model) -> None:
        self._used = names(model)

    def __call__(self, hint: str) -> str:
        """The first free of `hint`, `hint_2`, `hint_3`..."""
        name, i = hint or "value", 1
        while name in self._used:
            i += 1
            name = f"{hint}_{i}"
        self._used.add(name)
        return name


def graph_of(value: ir.Value) -> ir.Graph:
    """The graph in which a value is made or stored. Raises ModelError for a value that belongs to none."""
    owner = value.graph
    if not isinstance(owner, ir.Graph):
        raise ModelError(f"the value {value.name!r} belongs to no graph; it must be an input, initializer or output")
    return owner


def add_initializer(
    graph: ir.Graph, name: str, array: np.ndarray[Any, Any] | ir.TensorProtocol, *, dtype: ir.DataType | None = None
) -> ir.Value:
    """Store `array` in `graph` under a free `name`; `dtype` is needed only for types numpy cannot tell."""
    if name in graph.initializers:
        raise ModelError(f"an initializer's name must be free, but {name!r} exists; use fresh_name")
    if isinstance(array, np.ndarray | np.generic):
        tensor: ir.TensorProtocol = ir.Tensor(np.array(array, order="C"), dtype=dtype, name=name)
    else:
        tensor = array
    tensor.name = name
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def set_initializer(value: ir.Value, array: np.ndarray[Any, Any], *, dtype: ir.DataType | None = None) -> None:
    """Give an existing initializer another content; type and shape follow the array."""
    tensor = ir.Tensor(np.array(array, order="C"), dtype=dtype, name=value.name)
    value.const_value = tensor
    value.type = ir.TensorType(tensor.dtype)
    value.shape = ir.Shape(tensor.shape.numpy())


def remove_initializer(value: ir.Value) -> None:
    """Take an initializer nobody reads out of its graph. Raises ModelError if it is still read."""
    if list(value.uses()) or value.is_graph_output():
        raise ModelError(f"an initializer must be unused to be removed, but {value.name!r} is still read")
    if value.name is not None:
        graph_of(value).initializers.pop(value.name, None)


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer (not of a default that the caller may override), else None."""
    if value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The array of an initializer (memory-mapped if it lies in a side file), else None. Treat as read-only."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def is_constant(value: ir.Value | None, known: dict[ir.Value, bool] | None = None) -> bool:
    """True if the value depends on no input of the model: an initializer or computed from such alone.

    `known` may be passed to reuse answers over many calls on one unchanged model.
    """
    if value is None:
        return True
    known = {} if known is None else known
    stack = [value]
    while stack:
        current = stack[-1]
        if current in known:
            stack.pop()
            continue
        node = current.producer()
        if node is None:
            known[current] = current.is_initializer() and not current.is_graph_input()
        elif node.op_type in RANDOM_OPS or any(a.type in _GRAPH_ATTRS for a in node.attributes.values()):
            known[current] = False
        else:
            inputs = [v for v in node.inputs if v is not None]
            missing = [v for v in inputs if v not in known]
            if missing:
                stack.extend(missing)
                continue
            known[current] = all(known[v] for v in inputs)
        stack.pop()
    return known[value]


_GRAPH_ATTRS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
RANDOM_OPS = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def replace_input(node: ir.Node, index: int, value: ir.Value | None) -> None:
    """Let input `index` of `node` read `value`; None makes an optional input absent. Grows the inputs if needed."""
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def replace_uses(old: ir.Value, new: ir.Value, *, keep: Iterable[ir.Node] = ()) -> None:
    """Let every reader of `old`, in sub-graphs too, read `new` instead, but for the nodes in `keep`.

    Where `old` is a graph output, `new` takes its name and place, so the interface stays the same.
    """
    kept = set(keep)
    for node, index in list(old.uses()):
        if node not in kept:
            node.replace_input_with(index, new)
    for graph in {g for g in (old.graph, new.graph) if isinstance(g, ir.Graph)}:
        for i, output in enumerate(graph.outputs):
            if output is old:
                _take_output_place(graph, i, old, new)


def _take_output_place(graph: ir.Graph, i: int, old: ir.Value, new: ir.Value) -> None:
    name = old.name
    old.name = f"{name}_replaced"
    if new.is_graph_input() or new.is_initializer() or new.is_graph_output():
        # An input or stored value keeps its own name; the output becomes a copy of it.
        node = ir.node("Identity", [new], outputs=[ir.Value(name=name, type=old.type, shape=old.shape)], name=name)
        graph.append(node)
        new = node.outputs[0]
    new.name, new.type, new.shape = name, old.type, old.shape
    graph.outputs[i] = new


def insert_before(node: ir.Node, new_nodes: Sequence[ir.Node]) -> None:
    """Put nodes into the graph of `node`, just before it."""
    graph = node.graph
    if graph is None:
        raise ModelError(f"node {node.name!r} must be in a graph to insert before it")
    graph.insert_before(node, new_nodes)


def insert_after(value: ir.Value, new_nodes: Sequence[ir.Node]) -> None:
    """Put nodes right after the place where `value` becomes known (the start of the graph for inputs and weights)."""
    producer = value.producer()
    graph = graph_of(value)
    if producer is not None:
        graph.insert_after(producer, new_nodes)
    elif len(graph):
        graph.insert_before(graph[0], new_nodes)
    else:
        graph.extend(new_nodes)


def make_node(
    namer: Namer, op_type: str, inputs: Sequence[ir.Value | None], hint: str, *, domain: str = "",
    attributes: dict[str, Any] | None = None, n_outputs: int = 1,
) -> ir.Node:  # fmt: skip
    """A node, not yet in a graph, whose name and output names are free."""
    outputs = [ir.Value(name=namer(hint if i == 0 else f"{hint}.{i}")) for i in range(n_outputs)]
    return ir.node(
        op_type, inputs, attributes=attributes or {}, domain=domain, outputs=outputs, name=namer(f"{hint}/{op_type}")
    )


def remove_node(node: ir.Node) -> None:
    """Take a node out of its graph. Raises ModelError if somebody still reads it."""
    if node.graph is None:
        return
    if any(list(o.uses()) or o.is_graph_output() for o in node.outputs):
        raise ModelError(f"a node must be unused to be removed, but {node.name!r} is still read")
    node.graph.remove(node, safe=True)


def remove_unused(model: ir.Model) -> int:
    """Drop nodes, initializers and functions that no output depends on; returns how many nodes and weights went."""
    before = _count(model)
    for graph in list(model.graphs()):
        _release(graph)
    common.RemoveUnusedNodesPass()(model)
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not list(value.uses()) and not value.is_graph_output() and not value.is_graph_input():
                graph.initializers.pop(name)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    return before - _count(model)


def _release(graph: ir.Graph) -> None:
    """Let nodes that lead to no output capture nothing: a body that goes with its node would else count as a reader."""
    stack, live = [v.producer() for v in graph.outputs], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in live:
            live.add(node)
            stack.extend(v.producer() for v in reads(node))
    for node in graph:
        for body in () if node in live else bodies(node):
            for inner in walk(body):
                for index in range(len(inner.inputs)):
                    inner.replace_input_with(index, None)
            body.outputs.clear()


def _count(model: ir.Model) -> int:
    return sum(len(g) + len(g.initializers) for g in model.graphs())


def sort(model: ir.Model) -> None:
    """Order nodes so that each comes after what it reads. Raises ModelError on a cycle."""
    try:
        for graph in model.graphs():
            graph.sort()
    except ValueError as e:
        raise ModelError(f"the graph must have no cycle, but one was found ({e}); export the model again") from e


def paths(model: ir.Model) -> dict[ir.Node, str]:
    """Name of each node, dotted inside sub-graphs: `loop.body_matmul`."""
    found: dict[ir.Node, str] = {}

    def visit(graph: ir.Graph, prefix: str) -> None:
        for node in graph:
            path = prefix + (node.name or node.op_type)
            found[node] = path
            for body in bodies(node):
                visit(body, path + ".")

    visit(model.graph, "")
    return found
