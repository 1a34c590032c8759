"""How a node reads a weight's input: picklable recipes for the child, and the rows they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Note
from featherweight.stats import padding
from featherweight.stats.accumulate import F32
from featherweight.stats.windows import Window, columns

if TYPE_CHECKING:
    from featherweight.graph.weights import Weight, WeightUse

I64 = npt.NDArray[np.int64]
LEAST_POSITIONS = 8
MATRIX_ROWS = 1024  # rows drawn of each batch for a MatMul or Gemm


@dataclass(frozen=True)
class Read:
    """One use of one weight. `values`: the activations it needs. `lead`: batched MatMul weights' leading sizes."""

    weight: str
    role: str
    values: tuple[str, ...]
    groups: int = 1
    window: Window | None = None
    transposed: bool = False
    time_first: bool = True
    directions: int = 1
    lead: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tables:
    """Gather tables: (weight, indices value, rows, constant indices)."""

    entries: tuple[tuple[str, str, int], ...]

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the index tensors that must be put out."""
        return tuple(entry[1] for entry in self.entries)

    @classmethod
    def of(cls, weights: Sequence[Weight]) -> Tables:
        """Every lookup along axis 0 by indices computed in the top-level graph."""
        entries = []
        for weight in weights:
            for use in weight.uses:
                if use.role == "gather" and "." not in _outer(use):
                    indices = use.node.inputs[1]
                    if indices is not None and indices.name and int(_attribute(use.node, "axis", 0)) == 0:
                        entries.append((weight.name, indices.name, weight.shape[0]))
        return cls(tuple(entries))

    def zeros(self) -> dict[str, I64]:
        """Fresh counters."""
        return {name: np.zeros(rows, np.int64) for name, _, rows in self.entries}

    def add(self, counts: dict[str, I64], got: dict[str, Any]) -> None:
        """Count one batch of indices (negative ones count from the end)."""
        for name, indices, rows in self.entries:
            found = got.get(indices)
            if found is not None and found.dtype.kind in "iu":
                flat = found.ravel().astype(np.int64)
                counts[name] += np.bincount(np.where(flat < 0, flat + rows, flat), minlength=rows)[:rows]


def _outer(use: WeightUse) -> str:
    graph = use.node.graph
    return "" if graph is not None and getattr(graph, "parent_node", None) is None else "."


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def reads_of(weights: Sequence[Weight]) -> tuple[list[Read], list[Note]]:
    """Recipes for every use that can be followed; a note for each that cannot."""
    reads, notes = [], []
    for weight in weights:
        for use in weight.uses:
            if use.role == "gather":
                continue
            if _outer(use):
                notes.append(
                    Note(
                        weight.name, "read inside a sub-graph: its input is not observed, so its error is not weighted"
                    )
                )
                continue
            read = _read(weight, use)
            if read is None:
                notes.append(
                    Note(weight.name, f"the input of {use.path!r} is not an activation: its error is not weighted")
                )
            else:
                reads.append(read)
    return reads, notes


def _read(weight: Weight, use: WeightUse) -> Read | None:
    node = use.node
    if use.role in ("rnn_input", "rnn_recurrent"):
        return _rnn(weight, use)
    other = node.inputs[1 - use.index] if use.role in ("matmul", "matmul_left", "gemm") else node.inputs[0]
    if other is None or not other.name or other.const_value is not None:
        return None
    if use.role in ("conv", "conv_transpose"):
        return Read(
            weight.name,
            use.role,
            (other.name,),
            use.groups,
            window_of(node, weight.seen_shape(use)[2:], use.role == "conv_transpose"),
        )
    if use.role == "gemm":
        # Gemm(A, W): rows are those of A; Gemm(W, B): rows are the columns of B.
        flag = bool(_attribute(node, "transA" if use.index == 1 else "transB", 0))
        return Read(weight.name, "gemm", (other.name,), transposed=flag if use.index == 1 else not flag)
    lead = weight.seen_shape(use)[:-2]
    return Read(weight.name, use.role, (other.name,), lead=tuple(lead))


def window_of(node: ir.Node, kernel: Sequence[int], transposed: bool) -> Window:
    """The geometry of a Conv or ConvTranspose node."""
    rank = len(kernel)
    auto = _attribute(node, "auto_pad", "NOTSET")
    return Window(
        kernel=tuple(int(v) for v in kernel),
        strides=tuple(_attribute(node, "strides", (1,) * rank)),
        dilations=tuple(_attribute(node, "dilations", (1,) * rank)),
        pads=tuple(_attribute(node, "pads", (0,) * 2 * rank)),
        auto_pad=auto.decode() if isinstance(auto, bytes) else str(auto),
        transposed=transposed,
        output_padding=tuple(_attribute(node, "output_padding", ())),
        output_shape=tuple(_attribute(node, "output_shape", ())),
    )


def _rnn(weight: Weight, use: WeightUse) -> Read | None:
    node = use.node
    directions = weight.shape[0]
    layout = int(_attribute(node, "layout", 0))
    if use.role == "rnn_input":
        source = node.inputs[0]
    else:
        source = node.outputs[0] if node.outputs and node.outputs[0].name else None
    if source is None or not source.name or source.const_value is not None:
        return None
    return Read(weight.name, use.role, (source.name,), time_first=layout == 0, directions=directions)


def rows_of(
    read: Read,
    got: dict[str, Any],
    *,
    limit: int,
    rng: np.random.Generator,
    mask: npt.NDArray[np.bool_] | None = None,
) -> F32 | None:
    """The rows (groups, n, k) that one batch of activations gives the weight, or None if it was not put out.

    `mask`: (batch, length), False where a text has ended; rows of such places are left out.
    """
    x = got.get(read.values[0])
    if x is None or x.dtype.kind != "f" or not x.size:
        return None
    x = x.astype(np.float32, copy=False)
    if read.window is not None:
        k = x.shape[1] // read.groups * int(np.prod(read.window.kernel))
        # Few inputs need few rows: a depthwise kernel of 9 is known after some hundred of them over all data.
        drawn = min(limit, max(32, k // 2))
        return columns(x, read.window, groups=read.groups, limit=drawn, rng=rng)
    if read.role == "rnn_input":
        rows = _some(x.reshape(-1, x.shape[-1]), limit * 4, rng)
        return np.ascontiguousarray(np.broadcast_to(rows, (read.directions, *rows.shape)))
    if read.role == "rnn_recurrent":
        # Y (time, direction, batch, hidden) or, layout 1, (batch, time, direction, hidden): the states it meets.
        by_direction = np.moveaxis(x, 1 if read.time_first else 2, 0)
        states: F32 = by_direction.reshape(len(by_direction), -1, x.shape[-1])
        return states
    if read.role == "gemm":
        rows = x.T if read.transposed else x
    elif read.role == "matmul_left":
        rows = x.reshape(1, -1) if x.ndim == 1 else np.swapaxes(x, -1, -2)
    else:
        rows = x
    if int(np.prod(read.lead, dtype=np.int64)) > 1:
        return _batched(rows, read.lead)
    real = padding.rows_shown(rows.shape, mask) if read.role != "matmul_left" else None
    flat = rows.reshape(-1, rows.shape[-1])
    return _some(flat if real is None else flat[real], MATRIX_ROWS, rng)[None]


def _some(rows: F32, limit: int, rng: np.random.Generator) -> F32:
    if len(rows) <= limit:
        return rows
    return rows[np.sort(rng.choice(len(rows), limit, replace=False))]


def _batched(rows: F32, lead: tuple[int, ...]) -> F32:
    """Rows of a MatMul whose weight has leading sizes: one group an element of `lead`."""
    full = np.broadcast_to(rows, np.broadcast_shapes(rows.shape[:-2], lead) + rows.shape[-2:])
    extra = full.ndim - 2 - len(lead)
    moved = np.moveaxis(full, range(extra), range(len(lead), len(lead) + extra)) if extra else full
    return np.ascontiguousarray(moved).reshape(int(np.prod(lead)), -1, rows.shape[-1])
