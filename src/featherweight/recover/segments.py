"""Parts of a graph as models of their own: what must be kept at a cut, and running from there to wanted values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from featherweight.runtime import ort

Array = npt.NDArray[Any]


class Parts:
    """A model whose nodes can be run in parts. `stored`: initializers by name, which may be replaced."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._proto = proto
        self.nodes = list(proto.graph.node)
        self.stored: dict[str, onnx.TensorProto] = {t.name: t for t in proto.graph.initializer}
        self._sparse = {t.values.name: t for t in proto.graph.sparse_initializer}
        self.inputs = [v.name for v in proto.graph.input if v.name not in self.stored]
        self.at = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        known = set(self.at) | set(self.inputs)
        self.reads = [[n for n in dict.fromkeys(_read(node)) if n in known] for node in self.nodes]

    def store(self, name: str, array: Array) -> None:
        """Replace an initializer."""
        self.stored[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)

    def needed(self, targets: Iterable[str], have: Collection[str] = ()) -> list[int]:
        """Indices of the nodes that make `targets` out of `have` and the inputs, in order."""
        todo, found = [t for t in targets if t not in have], set()
        while todo:
            i = self.at.get(todo.pop())
            if i is not None and i not in found:
                found.add(i)
                todo += [n for n in self.reads[i] if n not in have]
        return sorted(found)

    def live(self, cut: int, targets: Iterable[str]) -> list[str]:
        """Values made before node `cut` that are wanted, or read by a node from there on that `targets` need."""
        wanted = list(targets)
        read = [n for i in self.needed(wanted) if i >= cut for n in self.reads[i]]
        return [n for n in dict.fromkeys([*read, *wanted]) if self.at.get(n, -1) < cut]

    def part(self, targets: Iterable[str], have: Mapping[str, Array]) -> Part:
        """What makes `targets` out of the values in `have` (of which only types are looked at)."""
        wanted = list(dict.fromkeys(targets))
        passed = [t for t in wanted if t in have]
        made = [t for t in wanted if t not in have]
        chosen = self.needed(made, have)
        if not chosen:
            return Part(None, (), passed, ())
        nodes = [self.nodes[i] for i in chosen]
        names = {n for node in nodes for n in _read(node)}
        inputs = [n for n in dict.fromkeys(n for i in chosen for n in self.reads[i]) if n in have]
        proto = onnx.ModelProto(ir_version=self._proto.ir_version)
        proto.opset_import.extend(self._proto.opset_import)
        proto.functions.extend(self._proto.functions)
        graph = proto.graph
        graph.name = "part"
        graph.node.extend(nodes)
        graph.initializer.extend(t for n, t in self.stored.items() if n in names)
        graph.sparse_initializer.extend(t for n, t in self._sparse.items() if n in names)
        graph.input.extend(_info(n, have[n]) for n in inputs)
        graph.output.extend(onnx.ValueInfoProto(name=t) for t in made)
        return Part(proto.SerializeToString(), tuple(inputs), passed, tuple(made))


class Part:
    """A runnable part; values asked for that were there already pass through."""

    def __init__(self, model: bytes | None, inputs: tuple[str, ...], passed: list[str], made: tuple[str, ...]) -> None:
        self._model, self._inputs, self._passed, self._made = model, inputs, passed, made
        self._session: ort.Session | None = None

    def run(self, have: Mapping[str, Array], *, threads: int) -> dict[str, Array]:
        """The targets for one batch. Raises RunError."""
        found = {n: have[n] for n in self._passed}
        if self._model is not None:
            if self._session is None:
                self._session = ort.session(self._model, threads=threads)
            found.update(self._session.run({n: have[n] for n in self._inputs}, self._made))
        return found


def _info(name: str, array: Array) -> onnx.ValueInfoProto:
    if array.dtype.kind in "OUS":
        kind = onnx.TensorProto.STRING
    else:
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    info = onnx.ValueInfoProto(name=name)
    info.type.tensor_type.elem_type = kind
    # The rank alone: sizes may differ from batch to batch.
    info.type.tensor_type.shape.SetInParent()
    for _ in range(array.ndim):
        info.type.tensor_type.shape.dim.add()
    return info


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """Names a node reads, those its bodies take from outside among them."""
    yield from (n for n in node.input if n)
    for attribute in node.attribute:
        for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from (v.name for v in body.output)
            for inner in body.node:
                yield from _read(inner)
