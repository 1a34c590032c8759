"""A node nobody here knows, run by ONNX Runtime: right values, no gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from featherweight.errors import ModelError, RunError
from featherweight.graph import io, surgery
from featherweight.learn import _tensors
from featherweight.learn.ops.registry import describe


class Fence:
    """A kernel that runs one node in a session of its own, made at the first call for the types that arrive."""

    def __init__(self, node: ir.Node, model: ir.Model) -> None:
        if any(True for _ in surgery.bodies(node)):
            raise ModelError(f"{describe(node)} holds a graph and is not known here; it can be neither run nor passed")
        self._node, self._opsets, self._version = node, dict(model.graph.opset_imports), model.ir_version
        self._sessions: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *inputs: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        """Outputs of the node, cut off from the gradient. Raises RunError with the runtime's reason."""
        arrays = [None if t is None else self._array(t, i) for i, t in enumerate(inputs)]
        key = tuple(None if a is None else a.dtype.str for a in arrays)
        if key not in self._sessions:
            self._sessions[key] = self._session(arrays)
        feeds = {f"i{i}": a for i, a in enumerate(arrays) if a is not None}
        found = self._sessions[key].run(feeds)
        device = next((t.device for t in inputs if t is not None), torch.device("cpu"))
        outputs = tuple(_tensors.from_array(a).to(device) for a in found.values())
        return outputs[0] if len(outputs) == 1 else outputs

    def _array(self, tensor: Tensor, index: int) -> np.ndarray[Any, Any]:
        """As the graph declares it, or as it is where the graph does not say."""
        value = self._node.inputs[index]
        plain = tensor.detach().cpu()
        declared = value.dtype if value is not None else None
        if declared is not None and declared in _tensors.HELD and plain.dtype != torch.float64:
            return _tensors.to_array(plain, declared)
        return np.asarray(plain.float().numpy() if plain.dtype == torch.bfloat16 else plain.numpy())

    def _session(self, arrays: list[np.ndarray[Any, Any] | None]) -> Any:
        from featherweight.runtime import ort

        inputs = [
            None
            if a is None
            else ir.Value(
                name=f"i{i}", type=ir.TensorType(ir.DataType.from_numpy(a.dtype)), shape=ir.Shape([None] * a.ndim)
            )
            for i, a in enumerate(arrays)
        ]
        outputs = [ir.Value(name=v.name and f"o{i}") for i, v in enumerate(self._node.outputs)]
        node = ir.node(
            self._node.op_type, inputs, attributes=dict(self._node.attributes), domain=self._node.domain,
            outputs=outputs, name="fenced",
        )  # fmt: skip
        graph = ir.Graph(
            [v for v in inputs if v is not None], [o for o in outputs if o.name], nodes=[node],
            opset_imports=self._opsets, name="fenced",
        )  # fmt: skip
        try:
            return ort.session(io.to_bytes(ir.Model(graph, ir_version=self._version)))
        except (RunError, ModelError) as e:
            raise RunError(
                f"{describe(self._node)} is not known here, and ONNX Runtime cannot run it alone either: {e}"
            ) from e
