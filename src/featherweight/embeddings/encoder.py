"""A table of word vectors as an ONNX model: from token ids to the mean of their vectors, by standard operators alone.

    input_ids, attention_mask int64 (batch, sequence) -> sentence_embedding float32 (batch, dim)

Everything linear is done after the sum over the tokens, so a long text costs little more than a short one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.embeddings.compressed import Compressed, Part
from featherweight.embeddings.table import F32
from featherweight.graph import encode, surgery
from featherweight.graph.encode.layout import Encoded

OPSET = 21
IR_VERSION = 10


class _Graph:
    """Nodes in order, each with one output named like it."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def stored(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        return surgery.add_initializer(self.model.graph, name, ir.Tensor(array, name=name))

    def op(self, op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: int) -> ir.Value:
        output = ir.Value(name=name)
        node = ir.node(op_type, inputs, attributes=attributes, outputs=[output], name=f"/{name}/{op_type}")
        self.model.graph.append(node)
        return output


def encoder(table: Compressed | F32, *, normalise: bool = False) -> ir.Model:
    """The model of a compressed table, or of plain vectors float32 (rows, dim). `normalise`: outputs of length 1.

    A text whose mask is all zero gives zeros. Ids must be below the number of rows, as the runtime checks.
    """
    ids, mask = (_input(name) for name in ("input_ids", "attention_mask"))
    graph = ir.Graph([ids, mask], [], nodes=[], opset_imports={"": OPSET}, name="word_vectors")
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="featherweight")
    g = _Graph(model)
    last, first = (g.stored(n, np.array([a], np.int64)) for n, a in (("last_axis", -1), ("token_axis", 1)))
    weight = g.op("Unsqueeze", [g.op("Cast", [mask], "mask", to=int(ir.DataType.FLOAT)), last], "token_weight")
    count = g.op("ReduceSum", [weight, first], "count", keepdims=0)
    count = g.op("Max", [count, g.stored("one", np.array(1, np.float32))], "count_positive")
    pooled, dim, waiting = _pooled(g, table, ids, weight, first)
    mean = g.op("Div", [pooled, count], "mean" if normalise else "sentence_embedding")
    if normalise:
        size = g.op("ReduceL2", [mean, last], "size", keepdims=1)
        size = g.op("Max", [size, g.stored("smallest", np.array(1e-12, np.float32))], "size_positive")
        mean = g.op("Div", [mean, size], "sentence_embedding")
    mean.type, mean.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", dim])
    graph.outputs.append(mean)
    for value, coded in waiting:
        encode.attach(model, value, coded)
    return model


def _input(name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "sequence"]))


def _pooled(
    g: _Graph, table: Compressed | F32, ids: ir.Value, weight: ir.Value, first: ir.Value
) -> tuple[ir.Value, int, list[tuple[ir.Value, Encoded]]]:
    """(batch, dim): the weighted sum of vectors, its width, and the stand-ins that coded tables replace."""
    if not isinstance(table, Compressed):
        rows = g.op("Gather", [g.stored("vectors", table), ids], "rows")
        summed = g.op("ReduceSum", [g.op("Mul", [rows, weight], "weighted"), first], "sum", keepdims=0)
        return summed, table.shape[1], []
    waiting: list[tuple[ir.Value, Encoded]] = []

    def looked_up(part: Part, name: str) -> ir.Value:
        # Only the shape of the stand-in counts; it takes no memory and is gone once the coded table is attached.
        stand_in = g.stored(name, np.broadcast_to(np.float32(0), part.layout.shape))
        waiting.append((stand_in, part.encoded()))
        rows = g.op("Gather", [stand_in, ids], f"{name}_rows")
        rows.type, rows.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", part.width])
        return rows

    if table.row_of is not None:
        kept = g.op("Gather", [g.stored("row_of", np.asarray(table.row_of)), ids], "kept_row")
        ids = g.op("Cast", [kept], "kept_ids", to=int(ir.DataType.INT64))
        ids.type, ids.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(["batch", "sequence"])
    if table.gain is not None:
        weight = g.op("Mul", [weight, looked_up(table.gain, "length")], "token_length")
    total = g.op("ReduceSum", [weight, first], "total_length", keepdims=0)
    parts = [looked_up(part, f"columns{i}") for i, part in enumerate(table.columns)]
    if table.basis is None and table.place is not None:
        # A column of zeros for the dropped ones: 0 times the weight, so that batch and sequence fit.
        parts.append(g.op("Mul", [weight, g.stored("zero", np.array(0, np.float32))], "zero_column"))
    total_sum: ir.Value | None = None
    if parts:
        columns = g.op("Concat", parts, "columns", axis=-1) if len(parts) > 1 else parts[0]
        total_sum = g.op("ReduceSum", [g.op("Mul", [columns, weight], "weighted"), first], "column_sum", keepdims=0)
        if table.basis is not None:
            basis = g.stored("basis", np.broadcast_to(np.float32(0), table.basis.layout.shape))
            waiting.append((basis, folded(table.basis)))
            total_sum = g.op("MatMul", [total_sum, basis], "turned")
        elif table.place is not None:
            total_sum = g.op("Gather", [total_sum, g.stored("place", table.place.astype(np.int64))], "placed", axis=-1)
    if table.mean is not None:
        offset = g.op("Mul", [total, g.stored("mean_vector", table.mean)], "offset")
        total_sum = offset if total_sum is None else g.op("Add", [total_sum, offset], "sum")
    assert total_sum is not None, "a table has columns or a mean"
    return total_sum, table.dim, waiting


def folded(part: Part) -> Encoded:
    """The basis as a table that is decoded at load, since all of it is used at each call."""
    made = part.encoded()
    return encode.linear(made.fields["codes"], made.fields["scale"], made.layout.bits, axis=0)
