"""One trained tensor: how it enters the graph, and how it goes back into a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from featherweight.errors import ModelError
from featherweight.learn import _tensors


@dataclass(frozen=True)
class Trained:
    """A parameter under the name of the value it stands for.

    `shaper` makes the value from the parameter and from the stored values `parts` (scales, codebooks); without one the
    value is the parameter itself. `values` are all places that read it (more than one where codes are tied).
    """

    name: str
    initial: Tensor
    values: tuple[ir.Value, ...]
    shaper: nn.Module | None = None
    parts: tuple[ir.Value, ...] = ()

    def store(self, model: ir.Model, tensors: Mapping[str, Tensor]) -> None:
        """Put the trained value into `model`, in place. Raises ModelError if it has no such tensor."""
        value = initializer(model, self.name)
        stored = value.const_value
        latent = tensors[self.name]
        if stored is None or tuple(stored.shape.numpy()) != tuple(latent.shape):
            raise ModelError(f"{self.name!r} must be stored with shape {tuple(latent.shape)}, but it is not")
        with torch.no_grad():
            final = latent if self.shaper is None else self.shaper(latent)
        old = _tensors.from_ir(stored)
        if torch.equal(old, final.to(old.dtype)):
            return
        replace(value, _tensors.to_array(final, stored.dtype), stored.dtype)


def initializer(model: ir.Model, name: str) -> ir.Value:
    """The stored tensor of that name in any graph of a model. Raises ModelError if there is none."""
    for graph in model.graphs():
        if name in graph.initializers:
            return graph.initializers[name]
    raise ModelError(f"the model must hold the tensor {name!r} that was trained, but it does not")


def replace(value: ir.Value, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], dtype: ir.DataType) -> None:
    """Give a stored tensor new content of the same type and shape."""
    value.const_value = ir.Tensor(array, dtype=dtype, name=value.name)
