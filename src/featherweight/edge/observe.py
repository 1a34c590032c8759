"""Which operators a model really executes: one run through ONNX Runtime, whose profiler tells every shape.

What the runtime fuses, folds, inserts or chooses by data (If, Loop) is seen as it is. It runs in a child process.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.edge.work import Executed, Tensor
from featherweight.runtime.outputs import Array
from featherweight.runtime.sandbox import Worker


def executed(path: str | Path, feeds: Mapping[str, Array], *, worker: Worker | None = None) -> list[Executed]:
    """The operators of one call, in order, named by the file's nodes where they can be traced.

    Raises RunError, ChildCrashed if the model does not run here.
    """
    doing = f"looking at the operators of '{Path(path).name}'"
    if worker is not None:
        return worker.call(_executed, str(path), dict(feeds), doing=doing)
    with Worker() as own:
        return own.call(_executed, str(path), dict(feeds), doing=doing)


def random_feeds(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Inputs of these shapes: small random floats, ones for integers (a token that is always there)."""
    import onnx

    rng = np.random.default_rng(0)
    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {i.name for i in graph.initializer}
    feeds: dict[str, Array] = {}
    for value in graph.input:
        if value.name in stored:
            continue
        tensor = value.type.tensor_type
        dims = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else 1 for d in tensor.shape.dim)
        shape = tuple(shapes.get(value.name, dims))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if np.issubdtype(dtype, np.floating):
            feeds[value.name] = (rng.normal(size=shape) * 0.1).astype(dtype)
        else:
            feeds[value.name] = np.ones(shape, dtype)
    return feeds


def _executed(path: str, feeds: dict[str, Array]) -> list[Executed]:
    """In the child."""
    import onnx

    from featherweight.runtime import ort
    from featherweight.runtime.profiling import Origin

    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        out = Path(folder) / "optimised.onnx"
        session = ort.session(path, profile_prefix=Path(folder) / "profile", optimised_path=out, prepack=False)
        session.run(feeds)
        events = ort.profile_events(session.end_profiling())
        attributes = dict(_attributes(onnx.load(out, load_external_data=False).graph))
    origin = Origin(path)
    return [_read(event, attributes.get(event["name"], {}), origin) for event in events]


def _attributes(graph: Any) -> list[tuple[str, dict[str, Any]]]:
    """What of the attributes matters for time, by node name, bodies included."""
    import onnx

    found: list[tuple[str, dict[str, Any]]] = []
    for node in graph.node:
        kept: dict[str, Any] = {}
        for a in node.attribute:
            if a.name in ("activation", "num_heads", "channels_last", "kernel_shape", "axis"):
                kept[a.name] = onnx.helper.get_attribute_value(a)
            if a.HasField("g"):
                found += _attributes(a.g)
        found.append((node.name, kept))
    return found


def _read(event: Mapping[str, Any], attributes: Mapping[str, Any], origin: Any) -> Executed:
    inputs, outputs = _tensors(event["inputs"]), _tensors(event["outputs"])
    if attributes.get("channels_last"):
        inputs = (_channels_first(inputs[0]), *inputs[1:])
        outputs = (_channels_first(outputs[0]), *outputs[1:])
    fused = attributes.get("activation", b"")
    hidden = int(attributes.get("num_heads", 0)) or math.prod(attributes.get("kernel_shape", (0,)))
    return Executed(
        origin.of(event["name"], event["op"]), event["op"], inputs, outputs,
        fused.decode() if isinstance(fused, bytes) else str(fused), hidden,
    )  # fmt: skip


def _tensors(raw: list[Mapping[str, list[int]]]) -> tuple[Tensor, ...]:
    return tuple(Tensor(dtype, tuple(shape)) for entry in raw for dtype, shape in entry.items())


def _channels_first(tensor: Tensor) -> Tensor:
    n, *size, c = tensor.shape
    return Tensor(tensor.dtype, (n, c, *size))
