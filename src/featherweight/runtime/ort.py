"""ONNX Runtime behind one door: the only import of onnxruntime in the package.

It stays silent on the user's terminal (errors arrive as `RunError` with the cause), threads do not spin unless
asked, and outputs come as a dict by name.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from featherweight.errors import RunError

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

# Fatal only: every error also comes as an exception, and the same text on the user's terminal says it twice.
_SEVERITY = 4
_ERRORS: tuple[type[BaseException], ...] = (
    *(t for t in vars(_state).values() if isinstance(t, type) and issubclass(t, Exception)),
    RuntimeError,
    ValueError,
    TypeError,
    MemoryError,
)
_DTYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "bool": "bool", "string": "object",
    **{f"{u}int{b}": f"{u}int{b}" for u in ("", "u") for b in (8, 16, 32, 64)},
}  # fmt: skip

onnxruntime.set_default_logger_severity(_SEVERITY)
if hasattr(onnxruntime, "disable_telemetry_events"):
    onnxruntime.disable_telemetry_events()

VERSION: str = onnxruntime.__version__


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input or output of a model. `dtype` is a numpy name or the runtime's own word; symbolic axes are strings."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class Session:
    """A loaded model. `run` takes arrays by input name and gives arrays by output name."""

    def __init__(self, inner: Any, label: str) -> None:
        self._inner = inner
        self.label = label
        self.inputs: tuple[TensorInfo, ...] = tuple(map(_info, inner.get_inputs()))
        self.outputs: tuple[TensorInfo, ...] = tuple(map(_info, inner.get_outputs()))
        self._overridable = {i.name for i in inner.get_overridable_initializers()}

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once. `outputs` limits what is computed (None: all). Raises RunError with the cause in words."""
        known = {i.name for i in self.inputs}
        missing = sorted(known - set(feeds))
        unknown = sorted(set(feeds) - known - self._overridable)
        if missing or unknown:
            raise RunError(
                f"{self.label} takes the inputs {sorted(known)}, but got {sorted(feeds)}"
                + (f"; missing: {missing}" if missing else "")
                + (f"; unknown: {unknown}" if unknown else "")
            )
        names = [o.name for o in self.outputs] if outputs is None else list(outputs)
        absent = sorted(set(names) - {o.name for o in self.outputs})
        if absent:
            raise RunError(f"{self.label} has the outputs {[o.name for o in self.outputs]}, but {absent} was asked for")
        try:
            values = self._inner.run(names, dict(feeds))
        except _ERRORS as e:
            raise RunError(f"ONNX Runtime failed to run {self.label}: {cause(e)}") from e
        return {name: _as_array(v) for name, v in zip(names, values, strict=True) if v is not None}

    def end_profiling(self) -> Path:
        """Stop the profiler and return its JSON file (only if the session was made with `profile_prefix`)."""
        return Path(self._inner.end_profiling())


def session(
    model: str | Path | bytes,
    *,
    threads: int = 1,
    optimize: bool = True,
    spin: bool = False,
    profile_prefix: str | Path | None = None,
    optimised_path: str | Path | None = None,
    prepack: bool = True,
) -> Session:
    """Load a model file (or its bytes) on the CPU.

    Args:
        model: path or bytes.
        threads: of one operator; operators run one after another.
        optimize: graph optimisation as users have it by default; False runs the graph as written.
        spin: let idle threads of the pool spin. Off, because two pools that spin make each other look slow.
        profile_prefix: turn the profiler on; its file starts with this.
        optimised_path: write the optimised graph there.
        prepack: let kernels keep weights in a form of their own; without it the profiler also tells weights' shapes.

    Raises:
        RunError: the runtime refuses the model; the text says which operator or shape and why.
    """
    if threads < 1:
        raise RunError(f"threads must be >= 1, but got {threads}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SEVERITY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    if optimised_path is not None:
        options.optimized_model_filepath = str(optimised_path)
        weights = f"{Path(optimised_path).name}.data"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    label = "the model" if isinstance(model, bytes) else f"'{Path(model).name}'"
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise RunError(f"a model must be a file, but '{model}' is not one")
    try:
        inner = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except _ERRORS as e:
        raise RunError(f"ONNX Runtime cannot load {label}: {cause(e)}") from e
    return Session(inner, label)


def run_model(
    path: str | Path | bytes,
    feeds_list: Sequence[Feeds],
    *,
    outputs: Sequence[str] | None = None,
    threads: int = 1,
    optimize: bool = True,
) -> list[dict[str, Array]]:
    """Outputs by name for each feeds. `outputs` may name intermediate values that the caller made outputs."""
    loaded = session(path, threads=threads, optimize=optimize)
    return [loaded.run(feeds, outputs) for feeds in feeds_list]


def optimised_graph(path: str | Path, folder: str | Path | None = None) -> Path:
    """Write the graph as the runtime really runs it on this CPU into `folder` (None: a new temporary one)."""
    target = Path(tempfile.mkdtemp(prefix="featherweight-")) if folder is None else Path(folder)
    out = target / "optimised.onnx"
    session(path, optimised_path=out)
    return out


def optimised_ops(path: str | Path) -> Counter[str]:
    """How often each operator type stands in the optimised graph; tells whether integer kernels are reached."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        model = onnx.load(optimised_graph(path, folder), load_external_data=False)
    return Counter(_op_types(model.graph))


def _op_types(graph: Any) -> list[str]:
    found: list[str] = []
    for node in graph.node:
        found.append(node.op_type)
        for attribute in node.attribute:
            for sub in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                found.extend(_op_types(sub))
    return found


def profile_events(path: Path) -> list[dict[str, Any]]:
    """Node events of a profile in call order.

    Dicts with `name` (of the node), `op`, `us` (kernel time), `inputs` and `outputs` (lists of {type: shape}).
    """
    suffix = "_kernel_time"
    return [
        {
            "name": e["name"][: -len(suffix)],
            "op": e["args"].get("op_name", ""),
            "us": float(e["dur"]),
            "inputs": e["args"].get("input_type_shape", []),
            "outputs": e["args"].get("output_type_shape", []),
        }
        for e in json.loads(path.read_text())
        if e.get("cat") == "Node" and e["name"].endswith(suffix)
    ]


def cause(error: BaseException) -> str:
    """The runtime's message as one readable line, with what it most often means."""
    if isinstance(error, MemoryError):
        return "out of memory"
    text = re.sub(r"^\s*\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", str(error))
    text = re.sub(r"(/[\w.+-]+)+/([\w.-]+\.(cc|h)):\d+ ", r"\2: ", text)  # build-machine paths tell a user nothing
    text = " ".join(text.split())
    for pattern, meaning in _MEANINGS:
        if re.search(pattern, text, re.IGNORECASE):
            return f"{meaning}. {text}"
    return text


_MEANINGS: tuple[tuple[str, str], ...] = (
    (r"could not find an implementation", "this runtime has no kernel for an operator with these types"),
    (r"is not a registered function/op|no op registered for|unknown op", "this runtime does not know an operator"),
    (r"invalid dimensions for input|invalid rank for input", "an input has the wrong shape"),
    (r"unexpected input data type", "an input has the wrong type"),
    (r"ir.?version|opset \d+ is (under development|till)", "the model's version is newer than this runtime"),
    (r"bad_alloc|failed to allocate|alloc.*failed", "out of memory"),
    (r"protobuf parsing failed", "the file is not an ONNX model or is cut off"),
    (r"non-zero status code.*(shape|dimension|broadcast)", "shapes inside the model do not fit this input"),
)


def _info(arg: Any) -> TensorInfo:
    inner = re.fullmatch(r"tensor\((\w+)\)", arg.type)
    dtype = _DTYPES.get(inner.group(1), inner.group(1)) if inner else arg.type
    return TensorInfo(arg.name, dtype, tuple(arg.shape or ()))


def _as_array(value: Any) -> Array:
    """Tensors as they are; a sequence of maps (scikit-learn's class probabilities) as (n, classes) float32."""
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        keys = sorted(value[0])
        return np.array([[row[k] for k in keys] for row in value], dtype=np.float32)
    if isinstance(value, list):
        try:
            return np.stack([np.asarray(v) for v in value]) if value else np.zeros((0,), np.float32)
        except ValueError:
            boxed = np.empty(len(value), dtype=object)
            boxed[:] = value
            return boxed
    return np.asarray(value)
