"""One trained tensor: how it enters the graph, and how it goes back into a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from featherweight.errors import ModelError
from featherweight.graph.encode.codes import pack_bytes
from featherweight.learn import _tensors
from featherweight.learn._grids import Grid
from featherweight.learn.ops.quantizing import along

_NIBBLES = (ir.DataType.INT4, ir.DataType.UINT4)


class Store(Protocol):
    """Puts a latent weight back as codes."""

    def __call__(self, model: ir.Model, latent: Tensor, parts: Sequence[Tensor]) -> None:
        """Change the stored codes of `model` in place; those whose weight did not move stay."""
        ...


@dataclass(frozen=True)
class Trained:
    """A parameter under the name of the value it stands for.

    `shaper` makes the value from the parameter, from dynamic `reads` (indices of a looked-up table) and from stored
    `parts` (scales, codebooks); without one the value is the parameter itself. `values` are all places that read it,
    each with its own reads. `encoded` writes codes; None means plain numbers.
    """

    name: str
    initial: Tensor
    values: tuple[ir.Value, ...]
    shaper: nn.Module | None = None
    parts: tuple[ir.Value, ...] = ()
    reads: tuple[tuple[ir.Value, ...], ...] = ()
    encoded: Store | None = None

    def store(self, model: ir.Model, tensors: Mapping[str, Tensor]) -> None:
        """Put the trained value into `model`, in place, given all `final` ones by name.

        Raises ModelError if the model has no such tensor.
        """
        latent = tensors[self.name]
        if self.encoded is not None:
            self.encoded(model, latent, [_part(p, tensors) for p in self.parts])
            return
        holder = Holder.find(model, self.name)
        if holder.shape != tuple(latent.shape):
            raise ModelError(
                f"{self.name!r} must be stored with shape {tuple(latent.shape)}, but its shape is {holder.shape}"
            )
        old = _tensors.from_ir(holder.tensor)
        if not torch.equal(old, latent.to(old.dtype).cpu()):
            holder.replace(_tensors.to_array(latent, holder.tensor.dtype))

    def grid(self, tensors: Mapping[str, Tensor]) -> Grid | None:
        """Where it is rounded at each use; None where it is not, or only to a narrower float."""
        name = self.values[0].name or ""
        spacing: Any = getattr(self.shaper, "spacing", None) if self.encoded is not None else None
        if spacing is not None:
            parts = [_part(p, tensors) for p in self.parts]
            around: Any = getattr(self.shaper, "around", None)
            with torch.no_grad():
                step: Tensor | None = spacing(tensors[self.name], *parts)
                near = None if around is None or step is None else around(tensors[self.name], *parts)
            return None if step is None else Grid(step, name, near)
        node = next((n for n, i in self.values[0].uses() if n.op_type == "QuantizeLinear" and i == 0), None)
        behind = None if node is None else next((n for n, _ in node.outputs[0].uses()), None)
        if node is None or behind is None or behind.op_type != "DequantizeLinear" or node.inputs[1] is None:
            return None
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
        latent = tensors[self.name]
        step = along(_part(node.inputs[1], tensors).to(latent.dtype), latent, axis % max(latent.ndim, 1), block)
        return Grid(step, behind.outputs[0].name or "")

    def final(self, latent: Tensor) -> Tensor:
        """What a file stores of it: floats as the graph reads them (zeros kept, scales positive), else the latent."""
        with torch.no_grad():
            value: Tensor = latent if self.shaper is None or self.encoded is not None else self.shaper(latent)
        return value.detach()


def _part(value: ir.Value, tensors: Mapping[str, Tensor]) -> Tensor:
    """The trained scale or codebook, or the stored one."""
    if value.name is not None and value.name in tensors:
        return tensors[value.name]
    tensor = stored_tensor(value)
    if tensor is None:
        raise ModelError(f"{value.name!r} must be stored, but it is not")
    return _tensors.from_ir(tensor)


def stored_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What an initializer or a Constant node holds; defaults of inputs count."""
    if value is None:
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    attribute = node.attributes.get("value")
    return attribute.as_tensor() if attribute is not None and attribute.type == ir.AttributeType.TENSOR else None


@dataclass(frozen=True)
class Holder:
    """Where a tensor is stored: an initializer or a Constant node."""

    value: ir.Value
    tensor: ir.TensorProtocol

    @classmethod
    def find(cls, model: ir.Model, name: str) -> Holder:
        """The stored tensor of that name in any graph. Raises ModelError if there is none."""
        found = find_value(model, name)
        tensor = stored_tensor(found)
        if found is None or tensor is None:
            raise ModelError(f"the model must hold the tensor {name!r} that was trained, but it does not")
        return cls(found, tensor)

    @classmethod
    def all(cls, model: ir.Model) -> dict[int, Holder]:
        """Every stored tensor by its identity."""
        found: dict[int, Holder] = {}
        for graph in model.graphs():
            values = [*graph.initializers.values(), *(v for node in graph for v in node.outputs)]
            for value in values:
                tensor = stored_tensor(value)
                if tensor is not None:
                    found[id(tensor)] = cls(value, tensor)
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        return tuple(int(d) for d in self.tensor.shape.numpy())

    def replace(self, array: npt.NDArray[Any]) -> None:
        """New content, same type and shape; codes of 4 bits one a byte."""
        dtype = self.tensor.dtype
        new: ir.TensorProtocol
        if dtype in _NIBBLES:
            nibbles = array.reshape(-1).astype(np.int8).view(np.uint8) & np.uint8(15)
            packed = pack_bytes(np.pad(nibbles, (0, nibbles.size % 2)), 4)
            new = ir.PackedTensor(packed, dtype, shape=ir.Shape(self.shape), name=self.tensor.name)
        else:
            content = np.array(array.reshape(self.shape), dtype.numpy(), order="C")
            new = ir.Tensor(content, dtype=dtype, name=self.tensor.name)
        node = self.value.producer()
        if node is None:
            self.value.const_value = new
        else:
            node.attributes["value"] = ir.AttrTensor("value", new)


def find_value(model: ir.Model, name: str) -> ir.Value | None:
    """The value of that name in any graph of a model."""
    for graph in model.graphs():
        if name in graph.initializers:
            return graph.initializers[name]
        for node in graph:
            for value in node.outputs:
                if value.name == name:
                    return value
    return None
