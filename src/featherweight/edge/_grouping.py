"""Which nodes must stay together when a graph is cut, and which may run on both sides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from featherweight.graph import encode, surgery

_LAYOUT = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Cast"})
_ELEMENTWISE = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Not", "And", "Or", "Equal", "Less", "Greater", "LessOrEqual",
        "GreaterOrEqual", "Where", "Clip", "Min", "Max",
    }
)  # fmt: skip
KEEPS_READABLE = _LAYOUT | _ELEMENTWISE | {"QuantizeLinear", "DequantizeLinear", "Pad", "Expand", "Tile", "Slice"}
"""Of an input, these leave something from which it is seen at a glance."""
_GROWS = frozenset({"DequantizeLinear", "Expand", "Tile", "Shape", "Size", "ConstantOfShape"})
"""Cheap to run, and give more bytes than they take (or ask only for a shape): run where they are read."""
_FUSED = frozenset({"Relu", "Clip"})
"""Activation functions that the runtime's integer kernels take in between an operator and its quantizer."""
_RECOMPUTE_ELEMENTS = 1 << 22
_STORED_BYTES = 4096
_DECODER_DEPTH = 40


def tensor_bytes(shape: tuple[int, ...] | None, dtype: ir.DataType | None) -> tuple[int, int]:
    """(bytes as it is, bytes with floats as int8 with one scale and zero point); 0 where not known."""
    if shape is None or dtype is None:
        return 0, 0
    elements = math.prod(shape)
    if dtype == ir.DataType.STRING:
        return 4 * elements, 4 * elements
    nbytes = -(-elements * dtype.bitwidth // 8)
    floats = dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return nbytes, min(elements + 8, nbytes) if floats else nbytes


def cheap(
    nodes: Sequence[ir.Node],
    node_reads: Mapping[ir.Node, tuple[ir.Value, ...]],
    raw: frozenset[ir.Value],
    group: Mapping[ir.Node, int],
) -> frozenset[ir.Node]:
    """Nodes that may run on both sides: shape arithmetic, masks made from inputs, and what only grows its input."""
    alone = _sizes(group)
    found: set[ir.Node] = set()
    shape_values: set[ir.Value] = set()
    for n in nodes:
        if (
            alone[group[n]] > 1
            or n.op_type in surgery.RANDOM_OPS
            or any(True for _ in surgery.bodies(n))
            or not n.outputs
        ):
            continue
        of_shapes = n.op_type in ("Shape", "Size") or (
            bool(node_reads[n]) and all(v in shape_values for v in node_reads[n]) and _stores_little(n)
        )
        if of_shapes:
            shape_values.update(n.outputs)
        mask = n.op_type in KEEPS_READABLE and all(v in raw for v in node_reads[n]) and _small(n)
        mask = mask and _stores_little(n)
        if node_reads[n] and not n.domain and (of_shapes or mask or n.op_type in _GROWS):
            found.add(n)
    return frozenset(found)


def _stores_little(node: ir.Node) -> bool:
    """False where both sides would have to keep a large table."""
    stored = (surgery.constant_tensor(v) for v in node.inputs)
    return sum(t.nbytes for t in stored if t is not None) <= _STORED_BYTES


def _small(node: ir.Node) -> bool:
    """False where a shape is known to be large: recomputing is then no longer free."""
    for value in node.outputs:
        if value.shape is not None and all(isinstance(d, int) for d in value.shape):
            return math.prod(int(d) for d in value.shape if isinstance(d, int)) <= _RECOMPUTE_ELEMENTS
    return True


def groups(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    node_reads: Mapping[ir.Node, tuple[ir.Value, ...]],
    types: Mapping[ir.Value, ir.TypeProtocol | None],
    const: dict[ir.Value, bool],
) -> dict[ir.Node, int]:
    """A number for each node; nodes of one number stay on one side."""
    users: dict[ir.Value, list[ir.Node]] = {}
    for n in nodes:
        for v in node_reads[n]:
            users.setdefault(v, []).append(n)
    joined = _Joined(nodes)
    for n in nodes:
        if n.op_type == "QuantizeLinear" and len(node_reads[n]) == 1:
            _join_quantizer(n, users, node_reads, joined)
        for o in n.outputs:
            type_ = types.get(o)
            if type_ is not None and not isinstance(type_, ir.TensorType):
                # Sequences, optionals and sparse tensors have no place on a wire.
                joined.join(n, *users.get(o, ()))
    for part in _decoders(model, nodes, const):
        joined.join(*part)
    return _acyclic(nodes, node_reads, joined)


def _join_quantizer(
    quantizer: ir.Node,
    users: Mapping[ir.Value, list[ir.Node]],
    node_reads: Mapping[ir.Node, tuple[ir.Value, ...]],
    joined: _Joined,
) -> None:
    """A quantizer stays with what it quantizes, so that the runtime's integer kernels are reached on both sides."""
    node = quantizer
    while True:
        value = node.inputs[0]
        maker = value.producer() if value is not None else None
        if maker is None or maker not in joined or value is None or value.is_graph_output():
            return
        if maker.op_type == "DequantizeLinear":
            return
        joined.join(node, maker)
        if maker.op_type not in _FUSED or len(node_reads[maker]) != 1 or len(users.get(value, ())) != 1:
            return
        node = maker


def _decoders(model: ir.Model, nodes: Iterable[ir.Node], const: dict[ir.Value, bool]) -> Iterator[list[ir.Node]]:
    """The nodes of each decoder of rows looked up in a stored table."""
    for node in nodes:
        value = node.outputs[0] if node.outputs else None
        if value is None or value.producer() is None:
            continue
        found = encode.read(model, value)
        if found is not None and found.kind == "lookup":
            yield list(_back_to_tables(node, const))


def _back_to_tables(node: ir.Node, const: dict[ir.Value, bool]) -> Iterator[ir.Node]:
    """From the end of a decoder back to the Gathers that read its stored tables by row."""
    seen, level = {node}, [node]
    for _ in range(_DECODER_DEPTH):
        above = []
        for n in level:
            yield n
            if n.op_type == "Gather" and surgery.is_constant(n.inputs[0], const) and not _is_codebook(n, const):
                continue
            for v in n.inputs:
                maker = v.producer() if v is not None and not surgery.is_constant(v, const) else None
                if maker is not None and maker not in seen:
                    seen.add(maker)
                    above.append(maker)
        level = above


def _is_codebook(gather: ir.Node, const: dict[ir.Value, bool]) -> bool:
    """True where the index of a Gather is itself decoded from a stored table."""
    value = gather.inputs[1]
    for _ in range(_DECODER_DEPTH):
        node = value.producer() if value is not None else None
        if node is None:
            return False
        if node.op_type == "Gather" and surgery.is_constant(node.inputs[0], const):
            return True
        value = next((v for v in node.inputs if v is not None and not surgery.is_constant(v, const)), None)
    return False


class _Joined:
    """Disjoint sets of nodes."""

    def __init__(self, nodes: Sequence[ir.Node]) -> None:
        self.index = {n: i for i, n in enumerate(nodes)}
        self._parent = list(range(len(nodes)))

    def __contains__(self, node: ir.Node) -> bool:
        return node in self.index

    def find(self, node: ir.Node) -> int:
        """The number of the set a node is in."""
        i = self.index[node]
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, first: ir.Node, *others: ir.Node) -> None:
        """Put nodes into one set; nodes that are not among ours are passed over."""
        for other in others:
            if first in self.index and other in self.index:
                a, b = self.find(first), self.find(other)
                self._parent[max(a, b)] = min(a, b)


def _acyclic(
    nodes: Sequence[ir.Node], node_reads: Mapping[ir.Node, tuple[ir.Value, ...]], joined: _Joined
) -> dict[ir.Node, int]:
    """Sets that read from each other in a circle become one: no order would run them apart."""
    if not nodes:
        return {}
    edges = [
        (joined.find(maker), joined.find(n))
        for n in nodes
        for v in node_reads[n]
        if (maker := v.producer()) is not None and maker in joined
    ]
    pairs = np.array(edges, np.int64).reshape(-1, 2)
    size = len(nodes)
    graph = coo_matrix((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    _, labels = connected_components(graph.tocsr(), directed=True, connection="strong")
    return {n: int(labels[joined.find(n)]) for n in nodes}


def _sizes(group: Mapping[ir.Node, int]) -> dict[int, int]:
    counted: dict[int, int] = {}
    for g in group.values():
        counted[g] = counted.get(g, 0) + 1
    return counted
