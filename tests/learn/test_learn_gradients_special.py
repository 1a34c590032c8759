"""Gradients that need more than one node: straight-through estimates against a smooth stand-in, and control flow."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from featherweight.learn._grids import Affine, Book, Levels, Masked, Vectors  # noqa: E402
from featherweight.learn.execute import Executor  # noqa: E402
from featherweight.learn.ops import operator  # noqa: E402
from featherweight.learn.ops.quantizing import fake_quantize  # noqa: E402

N = helper.make_node


def stand_in(x: Any, scale: Any, zero: Any, low: float, high: float, residue: Any) -> Any:
    """Quantization with its rounding error, and what it cuts off, frozen: smooth; the straight-through derivative."""
    codes = x / scale + residue + zero
    whole = codes.detach().round()
    return (torch.where((whole < low) | (whole > high), whole.clamp(low, high), codes) - zero) * scale


@pytest.mark.parametrize("zero", [0.0, 3.0])
@pytest.mark.parametrize("per_channel", [False, True])
def test_rounding_passes_the_gradient_of_its_smooth_stand_in(zero, per_channel) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 6, generator=generator, dtype=torch.float64) * 3).requires_grad_()
    scale = torch.rand(4, 1, generator=generator, dtype=torch.float64) + 0.2
    scale = (scale if per_channel else scale[0, 0].clone()).requires_grad_()
    low, high = -7.0, 8.0
    with torch.no_grad():
        residue = torch.round(x / scale) - x / scale
    reading = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    mine = torch.autograd.grad((fake_quantize(x, scale, zero, low, high) * reading).sum(), [x, scale])
    theirs = torch.autograd.grad((stand_in(x, scale, zero, low, high, residue) * reading).sum(), [x, scale])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda a, s: stand_in(a, s, zero, low, high, residue), [x, scale])
    assert 0 < int((mine[0] == 0).sum()) < x.numel()  # some were cut off, and pass nothing


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "mixed", "strided"])
def test_the_scale_of_pictures_gets_the_same_gradient_in_any_layout(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, reading = (torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    steps = torch.round(x / 0.7)
    codes = steps.clamp(-5, 5)
    by_hand = (reading * (codes - (codes == steps) * x / 0.7)).sum()
    if layout in ("channels last", "mixed"):
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "channels last":
        reading = reading.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        x, reading = (t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in (x, reading))
    for shape in ((), (1,), (1, 1, 1, 1)):
        scale = torch.full(shape, 0.7, dtype=torch.float64).requires_grad_()
        (found,) = torch.autograd.grad((fake_quantize(x, scale, 1.0, -4, 6) * reading).sum(), scale)
        assert found.shape == scale.shape
        assert float(found) == pytest.approx(float(by_hand))


def executor_of(text: str, weights: dict[str, np.ndarray], **kwargs: Any) -> Executor:
    """A graph in ONNX text with stored weights, in float64."""
    proto = parser.parse_model('<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n' + text)
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    return Executor(ir.serde.deserialize_model(proto), **kwargs).double()


QDQ = {
    "together": "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Identity(d)",
    "apart": "q = QuantizeLinear(x, s, z) t = Transpose(q) u = Transpose(t) y = DequantizeLinear(u, s, z)",
    "microsoft": "q = QuantizeLinear(x, s, z) t = Identity(q) y = com.microsoft.DequantizeLinear(t, s, z)",
}


@pytest.mark.parametrize("form", QDQ)
def test_quantize_and_dequantize_together_and_apart_have_the_same_gradients(form) -> None:
    weights = {"s": np.float32(0.25), "z": np.uint8(9)}
    executor = executor_of(f"g (float[N, 3] x) => (float[N, 3] y) {{ {QDQ[form]} }}", weights, train_scales="all")
    x = torch.linspace(-4, 70, 24, dtype=torch.float64).reshape(8, 3).requires_grad_()
    (executor({"x": x})["y"] * torch.arange(24).reshape(8, 3)).sum().backward()
    with torch.no_grad():
        residue = torch.round(x / 0.25) - x / 0.25
    scale = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    (stand_in(again, scale, 9.0, 0.0, 255.0, residue) * torch.arange(24).reshape(8, 3)).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    (parameter,) = executor.parameters_by_name().values()
    torch.testing.assert_close(parameter.grad * 127**0.5, scale.grad)  # made smaller as LSQ asks


@pytest.mark.parametrize("product", ["MatMulInteger", "ConvInteger"])
def test_integer_products_pass_the_gradient_of_the_float_product(product) -> None:
    rng = np.random.default_rng(0)
    shape = (4, 5) if product == "MatMulInteger" else (5, 4, 1)
    axes = "N, 4" if product == "MatMulInteger" else "N, 4, 3"
    codes = rng.integers(-5, 6, shape).astype(np.int8)
    text = f"""g (float[{axes}] x) => (float[A, B{", C" if product != "MatMulInteger" else ""}] y) {{
        q, s, z = DynamicQuantizeLinear(x)
        p = {product}(q, w, z)
        f = Cast<to = 1>(p)
        y = Mul(f, s)
    }}"""
    proto = parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>\n' + text)
    proto.graph.initializer.append(numpy_helper.from_array(codes, "w"))
    executor = Executor(ir.serde.deserialize_model(proto))
    x = torch.randn(2, 4, *((3,) if product != "MatMulInteger" else ()), requires_grad=True)
    y = executor({"x": x})["y"]
    reading = torch.randn(y.shape)
    (y * reading).sum().backward()
    w = torch.from_numpy(codes).float()
    plain = x.detach() @ w if product == "MatMulInteger" else torch.nn.functional.conv1d(x.detach(), w)
    assert (y - plain).abs().max() < 0.2
    expected = reading @ w.t() if product == "MatMulInteger" else torch.einsum("nol,oi->nil", reading, w[..., 0])
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("op", ["QLinearMatMul", "QLinearConv"])
def test_layers_of_codes_pass_the_gradient_of_the_float_layer(op) -> None:
    rng = np.random.default_rng(1)
    conv = op == "QLinearConv"
    codes = rng.integers(-50, 51, (5, 4, 1) if conv else (4, 5)).astype(np.int8)
    stored = {"xs": np.float32(0.02), "xz": np.uint8(128), "w": codes, "ws": np.float32(0.01), "wz": np.int8(0),
              "ys": np.float32(0.1), "yz": np.uint8(128)}  # fmt: skip
    axes = "N, 4, 3" if conv else "N, 4"
    proto = parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[{axes}] x) => (float[A, B{", C" if conv else ""}] y) {{
            q = QuantizeLinear(x, xs, xz)
            p = {op}(q, xs, xz, w, ws, wz, ys, yz)
            y = DequantizeLinear(p, ys, yz)
        }}""")
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items())
    executor = Executor(ir.serde.deserialize_model(proto))
    x = (torch.rand(2, 4, *((3,) if conv else ())) - 0.5).requires_grad_()  # inside the range: nothing is cut off
    y = executor({"x": x})["y"]
    reading = torch.randn(y.shape)
    (y * reading).sum().backward()
    w = torch.from_numpy(codes).float() * 0.01
    expected = torch.einsum("nol,oi->nil", reading, w[..., 0]) if conv else reading @ w.t()
    torch.testing.assert_close(x.grad, expected)
    latent = executor.parameters_by_name()["w"].grad * 100  # in units of the scale
    quantised = (x.detach() / 0.02).round() * 0.02
    seen = torch.einsum("nol,nil->oi", reading, quantised)[..., None] if conv else quantised.t() @ reading
    torch.testing.assert_close(latent, seen, rtol=1e-4, atol=1e-5)


def test_grids_pass_the_gradient_to_the_latent_weight_and_to_the_entries_that_were_read() -> None:
    latent = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    reading = torch.randn(4, 6, dtype=torch.float64)
    book = torch.tensor([-1.0, 0.1, 1.2], dtype=torch.float64, requires_grad=True)
    grid = Book(1, 3)
    (grid(latent, book) * reading).sum().backward()
    torch.testing.assert_close(latent.grad, reading)
    index = grid.codes(latent, book).reshape(4, 6)
    expected = torch.stack([reading[index == k].sum() for k in range(3)])
    torch.testing.assert_close(book.grad, expected)

    latent.grad = None
    vectors = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    (Vectors(3, 4)(latent, vectors) * reading).sum().backward()
    torch.testing.assert_close(latent.grad, reading)
    assert vectors.grad.abs().sum() > 0

    latent.grad = None
    mask = (torch.rand(4, 6) < 0.5).double()
    value = Masked(mask, Affine(-4, 3))(latent, torch.tensor(0.7, dtype=torch.float64))
    (value * reading).sum().backward()
    assert bool((latent.grad[mask == 0] == 0).all())
    assert bool((value[mask == 0] == 0).all())

    latent.grad = None
    allowed = torch.tensor([-20, 0, 3, 9], dtype=torch.int8)
    (Levels(Book(1, 4), 0, 0, None)(latent, torch.tensor(0.1), allowed) * reading).sum().backward()
    torch.testing.assert_close(latent.grad, reading)


def body(nodes: list[onnx.NodeProto], inputs: dict[str, int], outputs: dict[str, int]) -> onnx.GraphProto:
    """A sub-graph of tensors of these types."""
    return helper.make_graph(
        nodes, "body",
        [helper.make_tensor_value_info(k, t, None) for k, t in inputs.items()],
        [helper.make_tensor_value_info(k, t, None) for k, t in outputs.items()],
    )  # fmt: skip


F, B, INT = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64


def control_flow(kind: str) -> Executor:
    """y from x [3, 4] through a body that captures the weight w [4, 4]."""
    rng = np.random.default_rng(0)
    stored = {"w": rng.standard_normal((4, 4)).astype(np.float32) * 0.5, "count": np.int64(3), "yes": np.array(True)}
    step = [N("MatMul", ["s", "w"], ["m"]), N("Tanh", ["m"], ["t"]), N("Identity", ["t"], ["row"])]
    match kind:
        case "If":
            then = body([N("MatMul", ["x", "w"], ["a"]), N("Sin", ["a"], ["p"])], {}, {"p": F})
            other = body([N("Neg", ["x"], ["q"])], {}, {"q": F})
            nodes = [N("If", ["yes"], ["y"], then_branch=then, else_branch=other)]
        case "Loop":
            inner = body(
                [*step, N("Identity", ["go"], ["on"])], {"k": INT, "go": B, "s": F}, {"on": B, "t": F, "row": F}
            )
            nodes = [N("Loop", ["count", "", "x"], ["last", "rows"], body=inner)]
            nodes += [N("ReduceSum", ["rows", "zero"], ["sum"], keepdims=0), N("Add", ["sum", "last"], ["y"])]
            stored["zero"] = np.array([0], np.int64)
        case _:
            inner = body([N("Add", ["s0", "e"], ["s"]), *step], {"s0": F, "e": F}, {"t": F, "row": F})
            stored["start"] = np.zeros(4, np.float32)
            nodes = [N("Scan", ["start", "x"], ["last", "y"], body=inner, num_scan_inputs=1,
                       scan_input_directions=[1])]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", F, [3, 4])], [helper.make_tensor_value_info("y", F, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Executor(ir.serde.deserialize_model(proto)).double()


@pytest.mark.parametrize("kind", ["If", "Loop", "Scan"])
def test_control_flow_passes_gradients_to_inputs_and_captured_weights(kind) -> None:
    executor = control_flow(kind)
    weight = executor.parameters_by_name()["w"]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    step, analytic = 1e-6, torch.autograd.grad(executor({"x": x})["y"].sum(), [x, weight])
    for tensor, gradient in zip((x, weight), analytic, strict=True):
        assert gradient.abs().sum() > 0
        flat, slopes = tensor.detach().reshape(-1), []
        for k in range(flat.numel()):
            values = []
            for sign in (1, -1):
                flat[k] += sign * step
                values.append(float(executor({"x": x})["y"].detach().sum()))
                flat[k] -= sign * step
            slopes.append((values[0] - values[1]) / (2 * step))
        torch.testing.assert_close(
            torch.tensor(slopes, dtype=torch.float64), gradient.reshape(-1), rtol=1e-5, atol=1e-7
        )


def test_an_operator_is_registered_once() -> None:
    with pytest.raises(ValueError, match="Relu since opset 1 must be registered once"):
        operator("Relu")(lambda call: lambda x: x)
