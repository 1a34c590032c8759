"""What of a graph is trained: stored floats, and the floats that stored codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from featherweight.core import Note
from featherweight.errors import ModelError
from featherweight.graph import surgery
from featherweight.learn import _tensors
from featherweight.learn._program import Program, Source
from featherweight.learn._trained import Trained
from featherweight.learn.ops import find
from featherweight.learn.ops.registry import describe

_SETTINGS: dict[str, tuple[int, ...]] = {
    "Clip": (1, 2), "Resize": (1, 2, 3), "Upsample": (1,), "Pad": (2,), "BatchNormalization": (3, 4),
    "QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2), "Pow": (1,), "Range": (0, 1, 2), "OneHot": (1, 2),
    "Dropout": (1,), "Where": (0,), "Max": (), "Min": (),
}  # fmt: skip
"""Inputs that set how an operator works, or are statistics: stored floats, but no weights."""
_WEIGHING = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "BatchNormalization",
                       "LayerNormalization", "InstanceNormalization", "GroupNormalization", "Gather"})  # fmt: skip
MIN_ZEROS = 0.05
"""From this share of zeros on, a weight of two or more axes counts as pruned."""


@dataclass
class Chosen:
    """What is trained, the modules that shape it, and notes on what is not."""

    trained: list[Trained] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @property
    def modules(self) -> list[nn.Module]:
        """Modules between parameters and the values of the graph."""
        return [t.shaper for t in self.trained if t.shaper is not None]

    def number(self, program: Program) -> list[int]:
        """Give each parameter a number; values that are shaped get a source."""
        slots = []
        for t in self.trained:
            if t.shaper is None:
                slots.append(program.number(t.values[0]))
                program.parameters.add(slots[-1])
                continue
            slots.append(program.fresh())
            parts = tuple(program.number(v) for v in t.parts)
            for value in t.values:
                program.sources[value] = Source(t.shaper, (slots[-1], *parts), f"weight {t.name!r}")
        return slots


class Zeros(nn.Module):
    """Keeps the zeros of a pruned weight, and rounds to the stored type."""

    mask: Tensor | None

    def __init__(self, mask: Tensor | None, kind: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self._kind = kind

    def forward(self, latent: Tensor) -> Tensor:
        """The weight as the graph reads it."""
        value = latent if self.mask is None else latent * self.mask
        return value.to(self._kind) if self._kind in (torch.float16, torch.bfloat16) else value


def choose(model: ir.Model, trainable: Callable[[str], bool] | None, *, train_scales: bool, keep_zeros: bool) -> Chosen:
    """The weights of a model that can be trained and that `trainable` does not exclude."""
    chosen = Chosen()
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.name and _is_weight(value, model) and (trainable is None or trainable(value.name)):
                chosen.trained.append(_plain(value, keep_zeros))
    return chosen


def _is_weight(value: ir.Value, model: ir.Model) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.dtype not in _tensors.FLOATS or not tensor.size:
        return False
    readers = [(n, i) for n, i in value.uses() if i not in _SETTINGS.get(n.op_type, ())]
    if not readers or (tensor.size == 1 and not any(n.op_type in _WEIGHING for n, _ in readers)):
        return False
    return bool(np.isfinite(np.asarray(tensor.numpy()).astype(np.float32)).all())


def _plain(value: ir.Value, keep_zeros: bool) -> Trained:
    tensor = value.const_value
    if tensor is None:
        raise ModelError(f"{value.name!r} must be stored, but it is not")
    initial = _tensors.from_ir(tensor)
    kind = initial.dtype
    if kind in (torch.float16, torch.bfloat16):
        initial = initial.float()
    mask = None
    if keep_zeros and initial.ndim > 1:
        zeros = int((initial == 0).sum())
        if MIN_ZEROS * initial.numel() <= zeros < initial.numel():
            mask = (initial != 0).to(initial.dtype)
    shaper = Zeros(mask, kind) if mask is not None or kind != initial.dtype else None
    return Trained(value.name or "", initial, (value,), shaper)
