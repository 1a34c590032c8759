"""What of a graph is trained: stored floats, and the floats that stored codes stand for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from featherweight.core import Note
from featherweight.errors import ModelError
from featherweight.learn import _biases, _encodings, _tensors
from featherweight.learn._choices import Scales
from featherweight.learn._grids import Affine, Bias, Masked, Rows
from featherweight.learn._program import Program, Source, needed
from featherweight.learn._trained import Trained, stored_tensor
from featherweight.learn.ops.registry import describe

_SETTINGS: dict[str, tuple[int, ...]] = {
    "Clip": (1, 2), "Resize": (1, 2, 3), "Upsample": (1,), "Pad": (2,), "BatchNormalization": (3, 4),
    "QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2), "Pow": (1,), "Range": (0, 1, 2), "OneHot": (1, 2),
    "Dropout": (1,), "Where": (0,), "QLinearMatMul": (1, 4, 6), "QLinearConv": (1, 4, 6), "MatMulNBits": (2, 3),
    "LSTM": (5, 6), "GRU": (5,), "RNN": (5,),
}  # fmt: skip
"""Inputs that set how an operator works, or are statistics: stored floats, but no weights."""
_WEIGHING = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "BatchNormalization",
                       "LayerNormalization", "InstanceNormalization", "GroupNormalization", "Gather"})  # fmt: skip
NARROW = (torch.float16, torch.bfloat16)
MASK_FROM = 1e9
"""No weight is as large; what attention masks add is."""
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
            for value, reads in zip(t.values, t.reads or ((),) * len(t.values), strict=True):
                others = tuple(program.number(v) for v in (*reads, *t.parts))
                program.sources[value] = Source(t.shaper, (slots[-1], *others), reads, f"weight {t.name!r}")
        return slots


class Plain(nn.Module):
    """A weight stored as floats: keeps the zeros of a pruned one, and rounds to the stored type."""

    mask: Tensor | None

    def __init__(self, mask: Tensor | None, kind: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self._narrow = kind if kind in NARROW else None

    def forward(self, latent: Tensor) -> Tensor:
        """The weight as the graph reads it."""
        value = latent if self.mask is None else latent * self.mask
        return value if self._narrow is None else value.to(self._narrow)


class Scale(nn.Module):
    """A trained scale: positive, its gradient made as small as LSQ asks (Esser 2020, arXiv:1902.08153)."""

    def __init__(self, share: float, kind: torch.dtype) -> None:
        super().__init__()
        self._share, self._narrow = share, kind if kind in NARROW else None

    def forward(self, latent: Tensor) -> Tensor:
        """The scale as the graph reads it."""
        value = latent.abs().clamp_min(torch.finfo(torch.float32).tiny)
        value = value.detach() + (value - value.detach()) * self._share
        return value if self._narrow is None else value.to(self._narrow)


def choose(
    model: ir.Model, trainable: Callable[[str], bool] | None, *, train_scales: Scales, keep_zeros: bool
) -> Chosen:
    """The weights of a model that can be trained and that `trainable` does not exclude."""
    chosen = Chosen()
    taken: set[str] = set()

    def wanted(name: str | None) -> bool:
        fresh = bool(name) and name not in taken and (trainable is None or trainable(name or ""))
        taken.add(name or "")
        return fresh

    for encoded in _encodings.find(model, chosen.notes):
        if wanted(encoded.name):
            chosen.trained.append(encoded)
    sources = {v: Source(lambda: None, (), r, "") for t in chosen.trained
               for v, r in zip(t.values, t.reads, strict=True)}  # fmt: skip
    nodes: set[ir.Node] = set()
    for graph in model.graphs():
        nodes |= needed(graph, graph.outputs, sources)
    frozen = [n for n in nodes if n.op_type == "MatMulNBits"]
    chosen.notes += [Note(describe(n), "its weight keeps its codes; gradients pass to its input") for n in frozen]
    parts = {p for t in chosen.trained for p in t.parts}
    for value in _stored_floats(model):
        if value in sources or value in parts:
            continue
        if _is_weight(value, nodes) and wanted(value.name):
            chosen.trained.append(_plain(value, keep_zeros))
    if train_scales != "none":
        in_order = [n for graph in model.graphs() for n in graph if n in nodes]  # a set's order is not the same twice
        chosen.trained, follow = _biases.linked(chosen.trained)
        taken |= follow
        chosen.trained.extend(_scales(chosen.trained, in_order if train_scales == "all" else [], wanted))
    return chosen


def _stored_floats(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()
        for node in graph:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                yield node.outputs[0]


def _is_weight(value: ir.Value, nodes: set[ir.Node]) -> bool:
    tensor = stored_tensor(value)
    if tensor is None or tensor.dtype not in _tensors.FLOATS or not tensor.size:
        return False
    readers = [n for n, i in value.uses() if n in nodes and i not in _SETTINGS.get(n.op_type, ())]
    if not readers or (tensor.size == 1 and not any(n.op_type in _WEIGHING for n in readers)):
        return False
    return not _is_mask(np.asarray(tensor.numpy()).astype(np.float32))


def _is_mask(values: npt.NDArray[np.float32]) -> bool:
    """True for constants that switch off: infinite or as good as that, or a matrix of nothing but 0 and 1."""
    if not np.isfinite(values).all() or np.abs(values).max() >= MASK_FROM:
        return True
    ones = values == 1
    return values.ndim > 1 and bool(ones.any()) and bool(((values == 0) | ones).all()) and not bool(ones.all())


def _is_float(value: ir.Value) -> bool:
    tensor = stored_tensor(value)
    return tensor is not None and tensor.dtype in _tensors.FLOATS


def _plain(value: ir.Value, keep_zeros: bool) -> Trained:
    initial, kind = _master(value)
    mask = None
    if keep_zeros and initial.ndim > 1:
        zeros = int((initial == 0).sum())
        if MIN_ZEROS * initial.numel() <= zeros < initial.numel():
            mask = (initial != 0).to(initial.dtype)
    shaper = Plain(mask, kind) if mask is not None or kind in NARROW else None
    return Trained(value.name or "", initial, (value,), shaper)


def _master(value: ir.Value) -> tuple[Tensor, torch.dtype]:
    """The stored tensor, at least in float32, and the type it is stored in."""
    tensor = stored_tensor(value)
    if tensor is None:
        raise ModelError(f"{value.name!r} must be stored, but it is not")
    stored = _tensors.from_ir(tensor)
    return (stored.float() if stored.dtype in NARROW else stored), stored.dtype


def _scales(encoded: list[Trained], nodes: list[ir.Node], wanted: Callable[[str | None], bool]) -> Iterator[Trained]:
    """Scales and codebooks of encoded weights, then scales of activations; each once."""
    for t in encoded:
        for part in () if isinstance(t.shaper, Bias) else t.parts:
            if _is_float(part) and wanted(part.name):
                latent, kind = _master(part)
                if isinstance(t.shaper, Affine | Masked | Rows) and latent.ndim < 3 and latent.min() >= 0:
                    grid = t.shaper.grid if isinstance(t.shaper, Rows) else t.shaper
                    top = max(getattr(grid, "high", 127), 1)
                    share = 1.0 / math.sqrt(max(t.initial.numel() / latent.numel(), 1.0) * top)
                    yield Trained(part.name or "", latent, (part,), Scale(share, kind))
                else:
                    yield Trained(part.name or "", latent, (part,), Plain(None, kind) if kind in NARROW else None)
    held = _held(nodes)
    for node in nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.inputs) > 1:
            scale = node.inputs[1]
            if scale is not None and scale not in held and stored_tensor(scale) is not None and wanted(scale.name):
                latent, kind = _master(scale)
                yield Trained(scale.name or "", latent, (scale,), Scale(1.0 / math.sqrt(127), kind))


def _held(nodes: list[ir.Node]) -> set[ir.Value]:
    """Scales of activations that stay, as they are stored apart but must be equal: of a quantizer and its dequantizer,
    and on both sides of an operator that hands codes on as they are (a kernel for codes asks for it).
    """
    found: set[ir.Value] = set()
    for node in nodes:
        if node.op_type == "QuantizeLinear":
            before = [node]
            behind = [n for n, _ in node.outputs[0].uses() if n.op_type == "DequantizeLinear"]
        elif node.op_type == "DequantizeLinear":
            continue
        else:
            makers = [v.producer() for v in node.inputs if v is not None]
            before = [m for m in makers if m is not None and m.op_type == "DequantizeLinear"]
            behind = [n for v in node.outputs for n, i in v.uses() if n.op_type == "QuantizeLinear" and i == 0]
        for one, other in itertools.product(before, behind):
            a, b = one.inputs[1], other.inputs[1]
            if a is not None and b is not None and a is not b and _equal(a, b):
                found |= {a, b}
    return found


def _equal(a: ir.Value, b: ir.Value) -> bool:
    x, y = stored_tensor(a), stored_tensor(b)
    return x is not None and y is not None and np.array_equal(x.numpy(), y.numpy())
