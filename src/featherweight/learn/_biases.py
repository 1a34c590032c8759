"""Biases kept as integers: their scale follows from the scales of the input and the weight beside them.

Integer kernels add the codes of a bias to products of codes and never read the scale that the file gives it. So where
scales are trained it must stay the product of the two; a bias of which that was not so keeps the scale it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from featherweight.learn import _tensors
from featherweight.learn._grids import Affine, Bias, product
from featherweight.learn._trained import Holder, Store, Trained, stored_tensor

#: Inputs of the operators that have a bias: data, weight, bias.
_PLACES = {"Conv": (0, 1, 2), "ConvTranspose": (0, 1, 2), "Gemm": (0, 1, 2)}
_MOVING = frozenset({"Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
#: A scale is the product of two others if it is so near to it.
_NEAR = 1e-4


def linked(trained: Sequence[Trained]) -> tuple[list[Trained], set[str]]:
    """The same with integer biases on grids that follow the other two scales; names of scales that are not free."""
    found, names = [], set()
    for t in trained:
        scale = t.parts[0] if _is_integer_bias(t) else None
        if scale is None:
            found.append(t)
            continue
        names.add(scale.name or "")
        others = _others(t, scale)
        if others is None or t.encoded is None or not isinstance(t.shaper, Affine):
            names |= {v.name or "" for v in _scales_beside(t)}
            found.append(t)
            continue
        store = _Bias(t.encoded, scale.name or "")
        found.append(dataclasses.replace(t, shaper=Bias(t.shaper), parts=others, encoded=store))
    return found, names


def _is_integer_bias(t: Trained) -> bool:
    """True for int32 codes that an operator reads as its bias."""
    if not isinstance(t.shaper, Affine) or t.shaper.low != torch.iinfo(torch.int32).min or not t.parts:
        return False
    uses = [(node, i) for v in t.values for node, i in v.uses()]
    return any(node.op_type in _PLACES and i == _PLACES[node.op_type][2] for node, i in uses)


def _scales_beside(t: Trained) -> list[ir.Value]:
    """Scales of the inputs and weights that stand beside a bias."""
    found = []
    for value in t.values:
        for node, _ in value.uses():
            for place in _PLACES.get(node.op_type, ())[:2]:
                maker = _maker(node.inputs[place])
                if maker is not None and maker.op_type == "DequantizeLinear" and maker.inputs[1] is not None:
                    found.append(maker.inputs[1])
    return found


def _maker(value: ir.Value | None) -> ir.Node | None:
    """What makes a value, seen through operators that only move numbers."""
    maker = None if value is None else value.producer()
    while maker is not None and maker.op_type in _MOVING:
        value = maker.inputs[0]
        maker = None if value is None else value.producer()
    return maker


def _others(t: Trained, scale: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Scales of the input and the weight of the one operator that reads the bias, if their product is its scale."""
    beside = _scales_beside(t)
    tensors = [stored_tensor(v) for v in (scale, *beside)]
    alone = len(t.values) == 1 and len(list(t.values[0].uses())) == 1 and len(list(scale.uses())) == 1
    if not alone or scale in beside or len(beside) != 2 or any(x is None for x in tensors):
        return None
    own, x, w = (_tensors.from_ir(tensor).float() for tensor in tensors if tensor is not None)
    if x.numel() != 1 and w.numel() != 1 and x.numel() != w.numel():
        return None
    made = product(x, w)
    if made.numel() != own.numel() or not torch.allclose(made, own.reshape(made.shape), rtol=_NEAR, atol=0):
        return None
    return beside[0], beside[1]


@dataclass(frozen=True)
class _Bias:
    """Stores the scale that follows from the others, and the codes in steps of it."""

    codes: Store
    scale: str

    def __call__(self, model: ir.Model, latent: Tensor, parts: Sequence[Tensor]) -> None:
        made = product(*parts).cpu()
        holder = Holder.find(model, self.scale)
        old = _tensors.from_ir(holder.tensor)
        if not torch.allclose(made, old.float().reshape(made.shape), rtol=_NEAR, atol=0):
            holder.replace(_tensors.to_array(made.reshape(old.shape), holder.tensor.dtype))
        else:  # as it was: codes stay in its steps, to the last bit
            made = old.float().reshape(made.shape)
        self.codes(model, latent, [made])


__all__ = ["linked"]
