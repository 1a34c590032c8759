"""Inspect: counts against numbers worked out by hand, on a small network made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from featherweight import inspection
from featherweight.errors import ModelError
from featherweight.report.inspection import inspection_parts
from featherweight.report.json import document, plain
from featherweight.report.terminal import to_text

# Conv 3 -> 8, 3x3, on 10x10 with padding 1, then the mean over space, then a 8 -> 5 matrix.
CONV, GEMM = 8 * 3 * 3 * 3, 8 * 5
CONV_MACS, GEMM_MACS = CONV * 100, GEMM


def weight(name: str, *shape: int) -> ir.Value:
    rng = np.random.default_rng(len(name))
    array = rng.normal(size=shape).astype(np.float32)
    return ir.Value(name=name, const_value=ir.Tensor(array, name=name))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 3, 10, 10]))
    stem, head = weight("stem.weight", 8, 3, 3, 3), weight("head.weight", 8, 5)
    conv = ir.node("Conv", [x, stem], attributes={"pads": [1, 1, 1, 1]}, name="stem")
    mean = ir.node("GlobalAveragePool", [conv.outputs[0]], name="mean")
    flat = ir.node("Flatten", [mean.outputs[0]], name="flat")
    gemm = ir.node("MatMul", [flat.outputs[0], head], name="head")
    y = gemm.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(["batch", 5])
    for i, node in enumerate((conv, mean, flat)):
        node.outputs[0].name = f"v{i}"
    graph = ir.Graph([x], [y], nodes=[conv, mean, flat, gemm], initializers=[stem, head], opset_imports={"": 21})
    target = tmp_path / "small.onnx"
    ir.save(ir.Model(graph, ir_version=10, producer_name="test"), target)
    return target


def test_counts_are_those_worked_out_by_hand(path: Path) -> None:
    found = inspection.inspect(path, batch=2, profile="portable")
    assert found.file_bytes == path.stat().st_size
    assert found.parameters == CONV + GEMM
    assert found.weight_bytes == found.compressible_bytes == 4 * (CONV + GEMM)
    assert found.macs == 2 * (CONV_MACS + GEMM_MACS)
    assert (found.batch, found.ops["Conv"], found.opsets) == (2, 1, {"ai.onnx": 21})
    assert {n.name: n.macs for n in found.nodes if n.macs} == {"stem": 2 * CONV_MACS, "head": 2 * GEMM_MACS}
    assert [t.name for t in found.tensors[:2]] == ["stem.weight", "head.weight"]
    assert [t.role for t in found.tensors[:2]] == ["conv", "matmul"]
    assert found.inputs[0].shape == ("batch", 3, 10, 10)
    # The largest moment is the mean: its input and output, and the model's input, which is the caller's to free.
    assert found.peak_activation_bytes == 2 * 4 * (3 * 100 + 8 * 100 + 8)
    assert found.peak_node == "mean"
    assert found.inference_bytes == found.weight_bytes + found.peak_activation_bytes


def test_bit_floors_shrink_the_weights_and_nothing_else(path: Path) -> None:
    found = inspection.inspect(path, profile="portable")
    rest = found.file_bytes - 4 * (CONV + GEMM)
    assert [f.bits for f in found.bit_floors] == [8, 7, 6, 5, 4, 3, 2, 1]
    for floor in found.bit_floors:
        assert floor.weight_bytes == CONV * floor.bits // 8 + GEMM * floor.bits // 8
        assert floor.total_bytes == rest + floor.weight_bytes


def test_data_adds_the_time_of_each_node(path: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 3, 10, 10), np.float32))
    found = inspection.inspect(path, data=tmp_path / "d.npz", batch=4, profile="portable")
    assert found.batch == 4
    assert any(n.latency_ms is not None and n.latency_ms > 0 for n in found.nodes)


@pytest.mark.parametrize("width", [80, 120])
def test_text_fits_and_json_is_plain(path: Path, width: int) -> None:
    found = inspection.inspect(path, profile="portable")
    shown = to_text(inspection_parts(found), width=width)
    assert max(map(len, shown.splitlines())) <= width
    for words in ("small.onnx", "x float32 [batch, 3, 10, 10]", "21.6 k MACs a call", "training, adam", "stem.weight"):
        assert words in shown
    assert '"kind": "inspection"' in document("inspection", plain(found))


def test_missing_file_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.onnx"):
        inspection.inspect(tmp_path / "none.onnx")
