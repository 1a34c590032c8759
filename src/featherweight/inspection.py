"""What a model is made of: where bytes, operations, time and memory are, and what each bit width would leave.

Bytes and operations are counted on the normalised graph, sizes on the file as it is; times are measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.core import Note, Profile
from featherweight.errors import DataError

if TYPE_CHECKING:
    import onnx_ir as ir

    from featherweight.edge.fitting import Fit
    from featherweight.edge.predict import Prediction
    from featherweight.graph.cost import Costs, TrainingMemory
    from featherweight.graph.weights import Weight

BIT_WIDTHS = (8, 7, 6, 5, 4, 3, 2, 1)


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of the model; a dimension is a number, a symbol, or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, slots=True)
class TensorLine:
    """One stored tensor. `role` is how it is used as a weight, '' if it is none; `encoding` how it is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    size_bytes: int
    role: str = ""
    encoding: str = ""
    readers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeLine:
    """One node's cost a call, None where its shapes are not known.

    `latency_ms` is measured, and only there where data was given; `predicted_ms` only for a device that is not here.
    """

    name: str
    op_type: str
    macs: int | None
    weight_bytes: int
    output_bytes: int | None
    latency_ms: float | None = None
    predicted_ms: float | None = None


@dataclass(frozen=True, slots=True)
class BitFloor:
    """The bytes if every weight took `bits` bits an element and nothing else changed; scales not counted."""

    bits: int
    weight_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect` found. Counts are a call at batch `batch`.

    `inference_bytes` are all stored tensors and the planned peak of activations, which is at `peak_node`; `training`
    is by optimiser. For a target other than this machine `predicted_ms` is the predicted latency of a call there, None
    where its profile has nothing to predict from, and `fit` whether it fits there.
    """

    model: str
    file_bytes: int
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    ops: Mapping[str, int]
    tensors: tuple[TensorLine, ...]
    nodes: tuple[NodeLine, ...]
    parameters: int
    weight_bytes: int
    compressible_bytes: int
    macs: int
    batch: int
    peak_activation_bytes: int
    peak_node: str
    inference_bytes: int
    training: Mapping[str, TrainingMemory] = field(default_factory=dict)
    bit_floors: tuple[BitFloor, ...] = ()
    encodings: Mapping[str, int] = field(default_factory=dict)
    target: Profile | None = None
    predicted_ms: float | None = None
    fit: Fit | None = None
    notes: tuple[Note, ...] = ()


def inspect(
    model: str | Path,
    *,
    data: Any = None,
    preprocess: Any = None,
    tokenizer: Path | None = None,
    profile: Profile | str | Path | None = None,
    batch: int = 1,
    threads: int = 1,
) -> Inspection:
    """Look into a model file; runs it (in a child process) only if `data` or a device as `profile` is given.

    Raises ModelError for an unusable file, DataError where the data does not fit it, RunError if it does not run.
    """
    from featherweight.graph import cost, io
    from featherweight.graph.normalise import normalise
    from featherweight.graph.weights import skipped, weights
    from featherweight.runtime.measure import node_times
    from featherweight.runtime.targets import load_profile

    target = profile if isinstance(profile, Profile) else load_profile("this" if profile is None else profile)
    path = Path(model)
    original = io.load(path)
    graph = normalise(original, run=None).model
    found = weights(graph)
    times: Mapping[str, float] = {}
    shapes, feeds, notes = input_shapes(original, graph, data, preprocess, tokenizer, batch)
    prediction, fit = (None, None)
    if profile is not None and target.arch != "any":
        prediction, fit = _on_device(path, graph, target, shapes, feeds, notes)
    if feeds and prediction is None:
        times = node_times(path, feeds, threads=threads).ms
    counted = cost.costs(graph, input_shapes=shapes)
    notes += [Note(name, "shape not known: its operations and memory are counted as none") for name in counted.unknown]
    file_bytes = io.size_bytes(path)
    return Inspection(
        model=path.name,
        file_bytes=file_bytes,
        ir_version=int(original.ir_version),
        opsets={domain or "ai.onnx": int(v) for domain, v in original.opset_imports.items()},
        producer=original.producer_name or "",
        inputs=_ports(original.graph.inputs),
        outputs=_ports(original.graph.outputs),
        ops=dict(Counter(_op(node) for node in original.graph.all_nodes()).most_common()),
        tensors=_tensors(original, found),
        nodes=_nodes(counted, times, prediction.per_node if prediction is not None else {}),
        parameters=sum(t.elements for t in _stored(original)),
        weight_bytes=sum(t.size_bytes for t in _stored(original)),
        compressible_bytes=sum(w.size_bytes for w in found),
        macs=counted.macs,
        batch=counted.batch,
        peak_activation_bytes=counted.peak_activation_bytes,
        peak_node=counted.peak_node,
        inference_bytes=counted.weight_bytes + counted.peak_activation_bytes,
        training={"adam": counted.train_bytes("adam"), "sgd": counted.train_bytes("sgd")},
        bit_floors=bit_floors(found, file_bytes),
        encodings=_encodings(original),
        target=target,
        predicted_ms=None if prediction is None else prediction.ms,
        fit=fit,
        notes=(*notes, *skipped(graph)),
    )


def input_shapes(
    original: ir.Model, graph: ir.Model, data: Any, preprocess: Any, tokenizer: Path | None, batch: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any], list[Note]]:
    """(shapes of the inputs, the first batch of the data or nothing, what was assumed)."""
    notes: list[Note] = []
    if data is None:
        return _assumed_shapes(_ports(graph.graph.inputs), batch, notes), {}, notes
    feeds = _feeds(original, data, preprocess, tokenizer, batch)
    return {name: tuple(array.shape) for name, array in feeds.items()}, feeds, notes


def _on_device(
    path: Path, graph: ir.Model, target: Profile, shapes: dict[str, tuple[int, ...]], feeds: dict[str, Any],
    notes: list[Note],
) -> tuple[Prediction | None, Fit]:  # fmt: skip
    """The predicted latency on another device (None for this machine, which is measured), and whether it fits there."""
    from featherweight.edge import predict
    from featherweight.errors import RunError
    from featherweight.graph import io
    from featherweight.runtime.targets import is_this_machine

    fit = predict.fits(graph, target, shapes=shapes, file_bytes=io.size_bytes(path))
    here = is_this_machine(target)
    if here and (feeds or not target.predicts):
        return None, fit
    if not target.predicts:
        notes.append(
            Note(target.name, "its profile has no rates to predict a latency from: run `featherweight profile`")
        )
        return None, fit
    notes += predict.denormal_notes(graph)
    try:
        return predict.latency_of_file(path, target, feeds or None, shapes=shapes), fit
    except RunError as e:
        notes.append(Note(path.name, f"does not run here ({e}): its latency is predicted from the graph alone"))
        return predict.latency(graph, target, shapes), fit


def bit_floors(found: list[Weight], file_bytes: int) -> tuple[BitFloor, ...]:
    """What the file would weigh with every weight at 8..1 bits an element, the rest as it is."""
    elements = [math.prod(w.shape) for w in found]
    rest = max(file_bytes - sum(w.size_bytes for w in found), 0)
    floors = []
    for bits in BIT_WIDTHS:
        weight_bytes = sum(-(-n * bits // 8) for n in elements)
        floors.append(BitFloor(bits, weight_bytes, rest + weight_bytes))
    return tuple(floors)


def _ports(values: Any) -> tuple[Port, ...]:
    ports = []
    for value in values:
        shape = None if value.shape is None else tuple(_dimension(d) for d in value.shape)
        ports.append(Port(value.name or "", "unknown" if value.dtype is None else _type_name(value.dtype), shape))
    return tuple(ports)


def _type_name(dtype: ir.DataType) -> str:
    """Numpy's name where it differs from ONNX's."""
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def _dimension(d: Any) -> int | str | None:
    return d if isinstance(d, int) else (str(d.value) if d.value is not None else None)


def _assumed_shapes(ports: tuple[Port, ...], batch: int, notes: list[Note]) -> dict[str, tuple[int, ...]]:
    """Input shapes with an open first axis at `batch` and other open axes at 1, which is noted."""
    shapes = {}
    for port in ports:
        if port.shape is None:
            continue
        dims = [batch if i == 0 and not isinstance(d, int) else d for i, d in enumerate(port.shape)]
        if not all(isinstance(d, int) for d in dims):
            notes.append(Note(port.name, "open axes are counted with size 1; give --data for real ones"))
        shapes[port.name] = tuple(d if isinstance(d, int) else 1 for d in dims)
    return shapes


def _op(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _stored(model: ir.Model) -> list[TensorLine]:
    """Every initializer of the model and its sub-graphs, and every tensor in a Constant node."""
    lines = []
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                lines.append(_line(value.name or "", value.const_value, tuple(u.node.name or "" for u in value.uses())))
        for node in graph:
            tensor = node.attributes.get("value") if node.op_type == "Constant" else None
            if tensor is not None and hasattr(tensor.value, "nbytes"):
                output = node.outputs[0]
                lines.append(_line(output.name or "", tensor.value, tuple(u.node.name or "" for u in output.uses())))
    return lines


def _line(name: str, tensor: Any, readers: tuple[str, ...]) -> TensorLine:
    shape = tuple(int(d) for d in tensor.shape)
    return TensorLine(name, shape, _type_name(tensor.dtype), math.prod(shape), int(tensor.nbytes), readers=readers)


def _tensors(original: ir.Model, found: list[Weight]) -> tuple[TensorLine, ...]:
    """Stored tensors by falling size, with the role of those that are weights."""
    roles = {w.name: "+".join(dict.fromkeys(u.role for u in w.uses)) for w in found}
    lines = [dataclasses.replace(line, role=roles.get(line.name, "")) for line in _stored(original)]
    return tuple(sorted(lines, key=lambda line: (-line.size_bytes, line.name)))


def _nodes(counted: Costs, times: Mapping[str, float], predicted: Mapping[str, float]) -> tuple[NodeLine, ...]:
    return tuple(
        NodeLine(n.name, n.op_type, n.macs, n.weight_bytes, n.output_bytes, times.get(n.name), predicted.get(n.name))
        for n in counted.nodes
    )


def _encodings(model: ir.Model) -> dict[str, int]:
    """How many tensors are stored in each compact form, e.g. {'palette 3 bit': 12}."""
    from featherweight.graph import encode

    kinds: Counter[str] = Counter()
    seen: set[int] = set()
    for node in model.graph.all_nodes():
        for value in node.inputs:
            # A decoded tensor is what a node with further consumers' weights reads; its own parts match nothing.
            if value is None or value.producer() is None or id(value) in seen:
                continue
            seen.add(id(value))
            found = encode.read(model, value)
            if found is not None:
                kinds[found.kind if found.kind == "float16" else f"{found.kind} {found.layout.bits} bit"] += 1
    return dict(kinds.most_common())


def _feeds(model: ir.Model, data: Any, preprocess: Any, tokenizer: Path | None, batch: int) -> dict[str, Any]:
    """The first batch of the data."""
    from featherweight.data.opening import open_data
    from featherweight.search.problem import first_feeds, input_specs

    opened = open_data(data, input_specs(model), preprocess=preprocess, tokenizer=tokenizer, batch_size=batch)
    feeds = first_feeds(opened, 1)
    if not feeds:
        raise DataError(f"the data {data!r} has no batch to measure on")
    return feeds[0]
