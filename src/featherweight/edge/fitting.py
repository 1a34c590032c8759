"""Does a model fit a device: its file in the storage, it and the runtime in memory, and is there a runtime at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from featherweight.core import Profile
from featherweight.graph import cost, surgery
from featherweight.graph import shapes as shape_inference
from featherweight.quantities import format_bytes

# A process that holds ONNX Runtime and no model, where a profile does not say (docs/targets.md).
RUNTIME_BYTES = 64 << 20


@dataclass(frozen=True)
class Fit:
    """Bytes needed and there. `storage`, `memory` and `runtime` say what is enough, `reasons` in words what is not.

    `memory_bytes` is what a call needs: weights as they lie in memory once loaded, the planned peak of activations, and
    the runtime itself.
    """

    storage: bool
    memory: bool
    runtime: bool
    reasons: tuple[str, ...]
    storage_bytes: int
    memory_bytes: int
    loaded_bytes: int
    peak_bytes: int
    runtime_bytes: int

    @property
    def ok(self) -> bool:
        """True if nothing stands in the way."""
        return self.storage and self.memory and self.runtime


def fits(
    model: ir.Model,
    profile: Profile,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    file_bytes: int | None = None,
) -> Fit:
    """Whether the model can be stored and run on the device. `shapes`: of the inputs, open axes 1.

    `file_bytes`: size of the file, else that of its stored tensors.
    """
    counted = cost.costs(model, input_shapes=shapes)
    stored = counted.weight_bytes if file_bytes is None else file_bytes
    loaded = loaded_bytes(model)
    runtime = profile.runtime_bytes if profile.runtime_bytes is not None else RUNTIME_BYTES
    needed = loaded + counted.peak_activation_bytes + runtime
    room = profile.storage_bytes
    reasons = []
    if room is not None and stored > room:
        reasons.append(f"the file of {format_bytes(stored)} does not fit the storage of {format_bytes(room)}")
    if needed > profile.memory_bytes:
        parts = (
            f"{format_bytes(loaded)} weights, {format_bytes(counted.peak_activation_bytes)} activations, "
            f"{format_bytes(runtime)} runtime"
        )
        have = format_bytes(profile.memory_bytes)
        reasons.append(f"it needs {format_bytes(needed)} of memory ({parts}), and there are {have}")
    if not profile.onnxruntime:
        reasons.append("ONNX Runtime does not run there: the file must be converted for a runtime that does")
    return Fit(
        storage=room is None or stored <= room,
        memory=needed <= profile.memory_bytes,
        runtime=profile.onnxruntime,
        reasons=tuple(reasons),
        storage_bytes=stored,
        memory_bytes=needed,
        loaded_bytes=loaded,
        peak_bytes=counted.peak_activation_bytes,
        runtime_bytes=runtime,
    )


def loaded_bytes(model: ir.Model) -> int:
    """Bytes of constants once the runtime has loaded the model.

    A constant that standard operators decode (palettes, bit planes) lies unfolded in memory; one behind
    DequantizeLinear stays as its codes, for integer kernels read those.
    """
    known = shape_inference.infer(model)
    constants: dict[ir.Value, bool] = {}
    kept: dict[ir.Value, int] = {}
    for node in model.graph.all_nodes():
        if node.outputs and all(surgery.is_constant(o, constants) for o in node.outputs if o.name):
            continue
        for value in node.inputs:
            if value is None or not surgery.is_constant(value, constants):
                continue
            made = value.producer()
            if made is not None and made.op_type == "DequantizeLinear" and made.inputs[0] is not None:
                value = made.inputs[0]
            kept[value] = _nbytes(value, known)
    return sum(kept.values())


def _nbytes(value: ir.Value, known: Mapping[str, shape_inference.Known]) -> int:
    tensor = surgery.constant_tensor(value)
    if tensor is not None:
        return int(tensor.nbytes)
    found = known.get(value.name or "")
    sizes = found.sizes if found is not None else None
    if sizes is None:
        return 0
    dtype = value.dtype or (found.type.dtype if found is not None and found.type is not None else None)
    width = dtype.bitwidth if dtype is not None and dtype != ir.DataType.STRING else 32
    return -(-math.prod(sizes) * width // 8)
