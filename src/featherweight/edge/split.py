"""Cut a model in two files, head and tail, that run one after the other equal the whole.

The head gives every tensor the tail needs of it; inputs of the model that only the tail reads are inputs of the tail
alone. Outputs that are ready early are outputs of the head. Names, symbolic shapes and numbers stay; what depends on
no input is kept by each side that reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from featherweight.edge import cuts, mincut
from featherweight.edge.cuts import CutGraph, Tensor
from featherweight.errors import ModelError, OutputError
from featherweight.graph import io, surgery
from featherweight.whole import write_text

SPLIT_SCHEMA = 1
HEAD, TAIL, DESCRIPTION = "head.onnx", "tail.onnx", "split.json"


@dataclass(frozen=True, slots=True)
class WireTensor:
    """What goes from head to tail. Bytes are of one call at the shapes given; `int8_bytes` with floats as int8.

    `source`: "head" where the head computes it, "input" where it is an input of the model that the tail reads itself.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None
    size_bytes: int
    int8_bytes: int
    source: Literal["head", "input"]


@dataclass(frozen=True, slots=True)
class Part:
    """One side. `inputs` and `outputs` by name, `macs` of one call, `weight_bytes` of what it stores."""

    file: str
    sha256: str
    size_bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int
    weight_bytes: int
    blocks: int


@dataclass(frozen=True)
class Split:
    """Both files and what passes between them. `outputs` says for each output of the model which side gives it."""

    head: Path
    tail: Path
    wire: tuple[WireTensor, ...]
    outputs: Mapping[str, Literal["head", "tail"]]
    parts: tuple[Part, Part]
    rerun: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def wire_bytes(self) -> int:
        """Bytes of one call from head to tail as they are."""
        return sum(t.size_bytes for t in self.wire)


def split(
    model: str | Path,
    cut: str | Sequence[str] | int | mincut.Cut,
    out: str | Path,
    *,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Split:
    """Write head.onnx, tail.onnx and split.json into the folder `out` (made if needed); the files of each are whole.

    Args:
        model: an ONNX file; its external data may lie beside it.
        cut: the name of a tensor (or several): the head makes it and what it depends on; a number k: the head is the
            first k blocks of `split --list`; "auto": the cut with fewest bytes on the wire among those whose bytes are
            fewer than the inputs'; or a cut found by `mincut`.
        out: folder.
        input_shapes: sizes of open axes, for the bytes and MACs in split.json.

    Raises:
        ModelError: no such tensor or number, or one side would be empty.
        OutputError: the folder cannot be written.
    """
    where = Path(model)
    prepared = cuts.prepare(io.load(where))
    graph = cuts.cut_graph(prepared, input_shapes=input_shapes)
    chosen = cut if isinstance(cut, mincut.Cut) else resolve(graph, cut)
    graph.check(chosen.head)
    folder = Path(out)
    _make(folder)
    head, tail, given = halves(prepared, graph, chosen)
    external = len(io.files(where)) > 1
    (folder / DESCRIPTION).unlink(missing_ok=True)
    for half, name in ((head, HEAD), (tail, TAIL)):
        io.save(half, folder / name, external=True if external else None)
    made = _described(folder, graph, chosen, head, tail, given)
    write_text(_json(where, made), folder / DESCRIPTION, make_folder=False)
    return made


def resolve(graph: CutGraph, cut: str | Sequence[str] | int) -> mincut.Cut:
    """The cut a name, several names, a number or "auto" stand for. Raises ModelError."""
    if isinstance(cut, int):
        n = len(graph.proper)
        if not 0 < cut < n:
            raise ModelError(
                f"a cut's number must be from 1 to {n - 1} (the model has {n} blocks), but got {cut}; "
                "see featherweight split MODEL --list"
            )
        return mincut.wire_of(graph, frozenset(graph.proper[:cut]))
    if cut == "auto":
        return smallest_wire(graph)
    names = (cut,) if isinstance(cut, str) else tuple(cut)
    position = {v.name: t for t, v in enumerate(graph.tensors)}
    unknown = [n for n in names if n not in position]
    if unknown or not names:
        known = [v.name for v in graph.tensors if not v.is_input]
        raise ModelError(
            f"a model is cut at the name of a tensor between its blocks, but {unknown[0] if unknown else 'no name'!r} "
            f"is none; use one of {', '.join(known[:4])}, ... ({len(known)} in all: featherweight split MODEL --list)"
        )
    made = [position[n] for n in names]
    head = graph.above(graph.maker[t] for t in made if t in graph.maker)
    if not head or len(head) == len(graph.proper):
        side = "head" if not head else "tail"
        raise ModelError(
            f"a cut must leave at least one node on each side, but cutting at {', '.join(names)} leaves none for "
            f"the {side}; choose a tensor nearer the middle"
        )
    return mincut.wire_of(graph, head)


def smallest_wire(graph: CutGraph) -> mincut.Cut:
    """The cut with fewest bytes on the wire of those in stored order.

    Raises ModelError where none sends less than the inputs.
    """
    found = [mincut.wire_of(graph, head) for head in graph.linear()]
    whole = sum(v.nbytes for v in graph.tensors if v.is_input)
    best = min(found, key=lambda c: c.total, default=None)
    if best is None or best.total >= whole:
        least = "none" if best is None else f"{best.total:.0f} B"
        raise ModelError(
            f"'auto' wants a cut that sends fewer bytes than the inputs' {whole} B, but the smallest is {least}; "
            "name a tensor or a number"
        )
    return best


def halves(
    prepared: ir.Model, graph: CutGraph, cut: mincut.Cut
) -> tuple[ir.Model, ir.Model, dict[str, Literal["head", "tail"]]]:
    """Head and tail of a prepared model, and which of them gives each output. The model is not changed."""
    here = cut.here
    late = {graph.tensors[t].name for i, b in enumerate(graph.blocks) if i not in here for t in b.writes}
    names = [v.name or "" for v in prepared.graph.outputs]
    given: dict[str, Literal["head", "tail"]] = {n: "tail" if n in late else "head" for n in names}
    wire = [graph.tensors[t] for t in cut.wire]
    return _head(prepared, wire, given), _tail(prepared, wire, given), given


def _head(prepared: ir.Model, wire: Sequence[Tensor], given: Mapping[str, str]) -> ir.Model:
    model = surgery.copy_model(prepared)
    values = _values(model.graph)
    early = [v for v in model.graph.outputs if given[v.name or ""] == "head"]
    sent = [values[t.name] for t in wire if not t.is_input]
    for value, tensor in zip(sent, (t for t in wire if not t.is_input), strict=True):
        _say_type(value, tensor)
    _set_outputs(model.graph, [*early, *(v for v in sent if v not in early)])
    _finish(model, keep=())
    return model


def _tail(prepared: ir.Model, wire: Sequence[Tensor], given: Mapping[str, str]) -> ir.Model:
    model = surgery.copy_model(prepared)
    graph = model.graph
    values = _values(graph)
    _set_outputs(graph, [v for v in graph.outputs if given[v.name or ""] == "tail"])
    for tensor in wire:
        if tensor.is_input:
            continue
        old = values[tensor.name]
        new = ir.Value(name=tensor.name)
        _say_type(new, tensor)
        for node, index in list(old.uses()):
            node.replace_input_with(index, new)
        for body in graph.subgraphs():
            for i, output in enumerate(body.outputs):
                if output is old:
                    body.outputs[i] = new
        old.name = f"{tensor.name}/made_by_head"
        graph.inputs.append(new)
    _finish(model, keep={t.name for t in wire})
    return model


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    found = {v.name or "": v for v in graph.inputs}
    found.update({o.name or "": o for node in graph for o in node.outputs})
    return found


def _say_type(value: ir.Value, tensor: Tensor) -> None:
    if tensor.dtype is None:
        raise ModelError(
            f"a tensor on the wire must have a known type, but that of {tensor.name!r} cannot be inferred "
            "(an operator of an unknown domain makes it); cut at another tensor"
        )
    value.type = ir.TensorType(tensor.dtype)
    value.shape = None if tensor.shape is None else ir.Shape(tensor.shape)


def _set_outputs(graph: ir.Graph, outputs: Sequence[ir.Value]) -> None:
    graph.outputs.clear()
    graph.outputs.extend(outputs)


def _finish(model: ir.Model, keep: Sequence[str] | set[str]) -> None:
    """Drop what this side does not need: nodes, weights, inputs."""
    surgery.remove_unused(model)
    for value in list(model.graph.inputs):
        captured = any(value in body.outputs for body in model.graph.subgraphs())
        if not (list(value.uses()) or captured or value.is_graph_output() or value.name in keep):
            model.graph.inputs.remove(value)
    for node in model.graph.all_nodes():
        for output in node.outputs:
            if output.name and output.name.endswith("/made_by_head"):
                output.name = None  # an output nobody reads of a node that is run again


def _make(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"the output must be a folder, but {folder} is a file; name another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"the folder {folder} cannot be made ({e.strerror or e}); name another") from e


def _described(
    folder: Path, graph: CutGraph, cut: mincut.Cut, head: ir.Model, tail: ir.Model,
    given: dict[str, Literal["head", "tail"]],
) -> Split:  # fmt: skip
    here = cut.here
    there = (frozenset(graph.proper) - cut.head) | cut.rerun
    read = {p for i in cut.head for p in graph.parents[i]}
    sides = []
    for model, name, blocks in ((head, HEAD, here), (tail, TAIL, there)):
        sides.append(
            Part(
                file=name,
                sha256=io.sha256(folder / name),
                size_bytes=io.size_bytes(folder / name),
                inputs=tuple(v.name or "" for v in model.graph.inputs),
                outputs=tuple(v.name or "" for v in model.graph.outputs),
                macs=sum(graph.blocks[i].macs for i in blocks),
                weight_bytes=io.stored_bytes(model),
                blocks=len(blocks),
            )
        )
    return Split(
        head=folder / HEAD,
        tail=folder / TAIL,
        wire=tuple(wire_tensor(graph.tensors[t]) for t in cut.wire),
        outputs=given,
        parts=(sides[0], sides[1]),
        rerun=tuple(graph.blocks[i].name for i in sorted(cut.rerun & here)),
        after=tuple(graph.blocks[i].name for i in sorted(cut.head - read)),
    )


def wire_tensor(tensor: Tensor) -> WireTensor:
    """A tensor of the graph as one on the wire."""
    dtype = "unknown" if tensor.dtype is None else tensor.dtype.name
    numpy_name = {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype, dtype.lower())
    source: Literal["head", "input"] = "input" if tensor.is_input else "head"
    return WireTensor(tensor.name, numpy_name, tensor.shape, tensor.nbytes, tensor.wire_bytes, source)


def _json(model: Path, made: Split) -> str:
    """Text of split.json; see docs/place.md."""
    raw: dict[str, Any] = {
        "schema": SPLIT_SCHEMA,
        "kind": "split",
        "model": {"file": model.name, "sha256": io.sha256(model), "size_bytes": io.size_bytes(model)},
        **{name: _plain(part) for name, part in zip(("head", "tail"), made.parts, strict=True)},
        "wire": [_plain(t) for t in made.wire],
        "outputs": dict(made.outputs),
        "after": list(made.after),
        "rerun": list(made.rerun),
    }
    return json.dumps(raw, indent=1) + os.linesep.replace("\r\n", "\n")


def _plain(value: Part | WireTensor) -> dict[str, Any]:
    found = {name: getattr(value, name) for name in value.__slots__}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}
