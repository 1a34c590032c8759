"""Several widths in one model: the tables they share are written once, under names of their own."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from featherweight.graph import encode, io

WIDTHS = (2, 3, 5, 6, 7)


def chain(layers: int) -> ir.Model:
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape([2, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, inits, value = [], [], x
    for i in range(layers):
        w = ir.Value(name=f"w{i}", const_value=ir.tensor(rng.normal(size=(8, 8)).astype(np.float32), name=f"w{i}"))
        node = ir.node("MatMul", [value, w], name=f"m{i}")
        nodes.append(node)
        inits.append(w)
        value = node.outputs[0]
    value.name, value.shape, value.type = "y", ir.Shape([2, 8]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [value], nodes=nodes, initializers=inits, opset_imports={"": 21}, name="chain")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("widths", list(itertools.combinations_with_replacement(WIDTHS, 3)), ids=str)
def test_any_mix_of_widths_loads_and_decodes(widths):
    model, wanted = chain(len(widths)), []
    rng = np.random.default_rng(1)
    for i, bits in enumerate(widths):
        codes = rng.integers(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), size=(8, 8)).astype(np.int8)
        encoded = encode.linear(codes, np.float32(0.25), bits)
        wanted.append(encode.decode(encoded))
        encode.attach(model, model.graph.initializers[f"w{i}"], encoded)
    x = rng.normal(size=(2, 8)).astype(np.float32)
    session = ort.InferenceSession(io.to_bytes(model), providers=["CPUExecutionProvider"])
    y = x.astype(np.float64)
    for w in wanted:
        y = y @ w
    assert session.run(None, {"x": x})[0] == pytest.approx(y, rel=1e-4, abs=1e-4)
