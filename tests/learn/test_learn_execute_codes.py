"""Weights stored as codes: executed as stored, trained on their grid, written back in the same bytes elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from featherweight.graph import encode, io  # noqa: E402
from featherweight.learn.execute import Executor  # noqa: E402
from featherweight.runtime import ort  # noqa: E402

N = helper.make_node
KINDS = ("linear", "dequantize", "palette", "bitmask", "float16", "product")


def model_of(nodes, weights: dict[str, Any], inputs: dict[str, Any], output_rank: int, *, opset: int = 21) -> ir.Model:
    """A graph whose inputs are float32 (or int64, named i...) of symbolic shape and whose output is y."""
    made = []
    for name, shape in inputs.items():
        kind = TensorProto.INT64 if name.startswith("i") else TensorProto.FLOAT
        made.append(helper.make_tensor_value_info(name, kind, shape))
    stored = [v if isinstance(v, onnx.TensorProto) else numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = helper.make_graph(
        nodes, "g", made, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * output_rank)], stored
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ir.serde.deserialize_model(proto)


def run_ort(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ONNX Runtime computes, node by node as written."""
    return ort.session(io.to_bytes(model), optimize=False).run(feeds)


def train(executor: Executor, feeds: dict[str, np.ndarray], step: float = 0.3) -> dict[str, Any]:
    """One step along the sign of the gradient of a fixed random reading of the output; returns the gradients."""
    given_ = {k: torch.from_numpy(v) for k, v in feeds.items()}
    y = executor(given_)["y"]
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    grads = {}
    with torch.no_grad():
        for name, parameter in executor.parameters_by_name().items():
            grads[name] = parameter.grad
            if parameter.grad is not None:
                parameter -= step * parameter.grad.sign() * parameter.detach().abs().mean()
    return grads


def check(model: ir.Model, feeds: dict[str, np.ndarray], names: set[str], steps: int = 1, **kwargs: Any) -> ir.Model:
    """Executed equal to the runtime, untouched bytes when nothing moved, equal again after training."""
    executor = Executor(model, **kwargs)
    tensors = {k: torch.from_numpy(v) for k, v in feeds.items()}
    assert set(executor.parameters_by_name()) == names
    np.testing.assert_allclose(
        executor(tensors)["y"].detach().numpy(), run_ort(model, feeds)["y"], rtol=1e-5, atol=1e-5
    )
    assert io.to_bytes(executor.write_back(model)) == io.to_bytes(model)
    for _ in range(steps):
        grads = train(executor, feeds)
    assert all(g is not None for g in grads.values())
    written = executor.write_back(model)
    mine = executor(tensors)["y"].detach().numpy()
    np.testing.assert_allclose(run_ort(written, feeds)["y"], mine, rtol=1e-5, atol=1e-5)
    again = Executor(written, **kwargs)
    np.testing.assert_allclose(again(tensors)["y"].detach().numpy(), mine, rtol=1e-5, atol=1e-5)
    return written


def random_encoded(kind: str, bits: int, shape: tuple[int, int], seed: int) -> encode.Encoded:
    """Random codes; the seed draws where scales are."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape)
    placing, axis = int(rng.integers(3)), int(rng.integers(2))
    if kind in ("linear", "dequantize"):
        if placing == 0:
            return getattr(encode, kind)(codes, np.float32(0.37), bits)
        if placing == 1:
            return getattr(encode, kind)(codes, rng.random(shape[axis], np.float32) + 0.1, bits, axis=axis)
        block = int(rng.integers(1, shape[axis] + 1))
        sizes = [-(-d // block) if i == axis else d for i, d in enumerate(shape)]
        half = rng.choice([np.float32, np.float16])
        return getattr(encode, kind)(codes, (rng.random(sizes) + 0.1).astype(half), bits, axis=axis, block=block)
    if kind == "palette":
        groups = shape[0] if placing == 2 else 1
        book = rng.standard_normal((groups, 1 << bits)).astype(np.float32)
        return encode.palette(rng.integers(0, 1 << bits, shape), book[0] if groups == 1 else book, bits)
    if kind == "bitmask":
        mask = rng.random(shape) < 0.5
        if placing == 0:
            return encode.bitmask(rng.standard_normal(int(mask.sum())).astype(np.float32), mask)
        return encode.bitmask(codes[mask].astype(np.int8), mask, scale=np.float32(0.2), bits=bits)
    if kind == "float16":
        return encode.float16(rng.standard_normal(shape).astype(np.float32))
    width = 2 if shape[1] % 2 == 0 else 1
    groups = shape[1] // width
    book = rng.standard_normal((groups, 1 << bits, width)).astype(np.float32)
    return encode.product(rng.integers(0, 1 << bits, (shape[0], groups)), book, bits)


def encoded_model(encoded: encode.Encoded) -> ir.Model:
    """y = x W with W encoded."""
    nodes = [N("MatMul", ["x", "W"], ["h"]), N("Tanh", ["h"], ["y"])]
    model = model_of(nodes, {"W": np.zeros(encoded.shape, np.float32)}, {"x": [None, encoded.shape[0]]}, 2)
    encode.attach(model, model.graph.initializers["W"], encoded)
    return model


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), st.integers(2, 8), st.integers(2, 9), st.integers(2, 9), st.integers(0, 1000))
def test_our_encodings_are_trained_on_their_grid_and_written_back(kind, bits, rows, columns, seed) -> None:
    encoded = random_encoded(kind, bits, (rows, columns), seed)
    if encoded.kind == "bitmask" and not encoded.fields["mask"].any():
        return
    model = encoded_model(encoded)
    x = np.random.default_rng(seed).standard_normal((3, rows)).astype(np.float32)
    written = check(model, {"x": x}, {"W"})
    value = next(v for n in written.graph for v in n.outputs if v.name == "W")
    back = encode.read(written, value)
    assert back is not None
    assert back.layout == encoded.layout
    if kind == "bitmask":
        np.testing.assert_array_equal(back.fields["mask"], encoded.fields["mask"])
    for field in ("scale", "codebook"):
        if field in encoded.fields:
            np.testing.assert_array_equal(back.fields[field], encoded.fields[field])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(("linear", "palette", "product")), st.integers(2, 8), st.integers(0, 1000))
def test_looked_up_tables_are_trained_by_the_rows_that_were_read(kind, bits, seed) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (7, 8))
    match (kind, seed % 4):
        case ("linear", 0):
            encoded = encode.linear(codes, np.float32(0.3), bits)
        case ("linear", 1):
            encoded = encode.linear(codes, rng.random(7, np.float32) + 0.1, bits, axis=0)
        case ("linear", 2):
            encoded = encode.linear(codes, rng.random(8, np.float32) + 0.1, bits, axis=1)
        case ("linear", _):
            encoded = encode.linear(codes, rng.random((7, 2), np.float32) + 0.1, bits, axis=1, block=4)
        case ("palette", _):
            book = rng.standard_normal(1 << bits).astype(np.float32)
            encoded = encode.palette(rng.integers(0, 1 << bits, (7, 8)), book, bits)
        case _:
            book = rng.standard_normal((4, 1 << bits, 2)).astype(np.float32)
            encoded = encode.product(rng.integers(0, 1 << bits, (7, 4)), book, bits)
    nodes = [N("Gather", ["W", "i"], ["h"]), N("Tanh", ["h"], ["y"])]
    model = model_of(nodes, {"W": np.zeros((7, 8), np.float32)}, {"i": [None, None]}, 3)
    encode.attach_lookup(model, model.graph.initializers["W"], encoded)
    index = rng.integers(-7, 7, (2, 3)) if kind == "linear" else rng.integers(0, 7, (2, 3))
    written = check(model, {"i": index}, {"W"})
    unread = np.setdiff1d(np.arange(7), index % 7)
    tables = [run_ort(m, {"i": unread[None]})["y"] for m in (model, written)]
    np.testing.assert_array_equal(*tables)


def test_four_bit_blocks_with_zero_points_keep_their_type() -> None:
    rng = np.random.default_rng(0)
    codes = helper.make_tensor("q", TensorProto.UINT4, [8, 6], rng.integers(0, 16, 48))
    zero = helper.make_tensor("z", TensorProto.UINT4, [2, 6], rng.integers(4, 12, 12))
    nodes = [N("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0, block_size=4), N("MatMul", ["x", "w"], ["y"])]
    weights = {"q": codes, "z": zero, "s": rng.random((2, 6), np.float32) + 0.1}
    model = model_of(nodes, weights, {"x": [None, 8]}, 2)
    written = check(model, {"x": rng.standard_normal((5, 8)).astype(np.float32)}, {"w"})
    assert written.graph.initializers["q"].dtype == ir.DataType.UINT4
    assert written.graph.initializers["z"].const_value.tobytes() == model.graph.initializers["z"].const_value.tobytes()


def qdq_conv(*, product: bool = False) -> ir.Model:
    """x -> Q -> DQ -> Conv(int8 weights per channel, int32 bias) -> Relu -> Q -> DQ."""
    rng = np.random.default_rng(1)
    weights = {
        "xs": np.float32(0.03), "xz": np.uint8(120), "ys": np.float32(0.05), "yz": np.uint8(0),
        "wq": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8), "ws": rng.random(4, np.float32) * 0.01 + 0.005,
        "bq": rng.integers(-2000, 2000, 4).astype(np.int32), "bs": np.full(4, 0.0003, np.float32),
        "wz": np.zeros(4, np.int8),
    }  # fmt: skip
    if product:
        weights["bs"] = weights["xs"] * weights["ws"]
    nodes = [
        N("QuantizeLinear", ["x", "xs", "xz"], ["xq"]), N("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        N("DequantizeLinear", ["wq", "ws", "wz"], ["w"], axis=0), N("DequantizeLinear", ["bq", "bs"], ["b"], axis=0),
        N("Conv", ["xd", "w", "b"], ["c"], pads=[1, 1, 1, 1]), N("Relu", ["c"], ["r"]),
        N("QuantizeLinear", ["r", "ys", "yz"], ["yq"]), N("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
    ]  # fmt: skip
    return model_of(nodes, weights, {"x": [None, 3, 5, 5]}, 4)


def test_int8_weights_and_activations_are_trained_and_written_back() -> None:
    model = qdq_conv()
    x = np.random.default_rng(2).standard_normal((2, 3, 5, 5)).astype(np.float32)
    written = check(model, {"x": x}, {"w", "b"})
    for name in ("xs", "xz", "ws", "wz", "ys", "bs"):
        assert written.graph.initializers[name].const_value.tobytes() == (
            model.graph.initializers[name].const_value.tobytes()
        )
    assert written.graph.initializers["wq"].dtype == ir.DataType.INT8
    check(model, {"x": x}, {"w", "b", "ys"}, train_scales="all")  # a bias of steps of its own holds the others


@pytest.mark.parametrize(("kind", "names"), [("weights", {"w", "b", "ws"}), ("all", {"w", "b", "xs", "ys", "ws"})])
def test_steps_of_an_integer_bias_follow_the_scales_beside_it(kind: Any, names: set[str]) -> None:
    """Integer kernels add codes of the bias to products of codes, whatever its scale in the file says."""
    model = qdq_conv(product=True)
    x = np.random.default_rng(2).standard_normal((2, 3, 5, 5)).astype(np.float32)
    # Weights that lie on their grid say nothing of its step, so the first step of training leaves it.
    written = check(model, {"x": x}, names, steps=2, train_scales=kind)
    new, old = ({n: v.const_value.numpy() for n, v in m.graph.initializers.items()} for m in (written, model))
    assert not np.allclose(new["ws"], old["ws"], rtol=1e-4)
    np.testing.assert_allclose(new["bs"], new["xs"] * new["ws"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["none", "weights", "all"])
@pytest.mark.parametrize("late", [False, True])
def test_scales_may_stand_in_constant_nodes(kind: Any, late: bool) -> None:
    """As exporters of quantized networks write them: anywhere before the first reader."""
    proto = ir.to_proto(qdq_conv(product=True))
    names = ("xs", "xz", "ys", "yz", "ws", "wz", "bs")
    held = {t.name: t for t in proto.graph.initializer if t.name in names}
    body, kept = list(proto.graph.node), [t for t in proto.graph.initializer if t.name not in names]
    body.sort(key=lambda n: "b" not in n.output)  # the bias first: the scales beside it come after
    nodes, made = [], set()
    for node in body:
        wanted = [n for n in node.input if n in held and n not in made] if late else sorted(held.keys() - made)
        nodes += [helper.make_node("Constant", [], [n], f"{n}.constant", value=held[n]) for n in wanted]
        nodes.append(node)
        made |= set(wanted)
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(kept)
    x = np.random.default_rng(2).standard_normal((2, 3, 5, 5)).astype(np.float32)
    trained = {"none": set(), "weights": {"ws"}, "all": {"xs", "ys", "ws"}}[kind]
    check(ir.from_proto(proto), {"x": x}, {"w", "b"} | trained, train_scales=kind)


@pytest.mark.parametrize(
    ("scales", "trained"),
    [
        (("s", "s", "t", "t"), {"s", "t"}),  # other values: no kernel for codes anyway
        (("s", "s", "same", "same"), set()),  # the pool hands codes on
        (("s", "s", "s", "s"), {"s"}),
        (("s", "same", "t", "t"), {"t"}),  # a quantizer and its dequantizer
    ],
)
def test_scales_that_must_stay_equal_are_not_trained_apart(scales: tuple[str, ...], trained: set[str]) -> None:
    weights = {
        "s": np.float32(0.03), "same": np.float32(0.03), "t": np.float32(0.05), "z": np.uint8(128),
        "w": np.random.default_rng(0).standard_normal((2, 3, 1, 1)).astype(np.float32),
    }  # fmt: skip
    one, two, three, four = scales
    nodes = [
        N("Conv", ["x", "w"], ["c"]), N("QuantizeLinear", ["c", one, "z"], ["cq"]),
        N("DequantizeLinear", ["cq", two, "z"], ["cd"]), N("MaxPool", ["cd"], ["p"], kernel_shape=[2, 2]),
        N("QuantizeLinear", ["p", three, "z"], ["pq"]), N("DequantizeLinear", ["pq", four, "z"], ["y"]),
    ]  # fmt: skip
    used = {n: v for n, v in weights.items() if n in ("w", "z", *scales)}
    model = model_of(nodes, used, {"x": [None, 3, 5, 5]}, 4)
    x = np.random.default_rng(2).standard_normal((2, 3, 5, 5)).astype(np.float32)
    check(model, {"x": x}, {"w"} | trained, train_scales="all")


def test_scales_and_codebooks_are_trained_when_asked() -> None:
    rng = np.random.default_rng(3)
    linear = encode.linear(rng.integers(-4, 4, (6, 5)), rng.random(5, np.float32) + 0.1, 3, axis=1)
    palette = encode.palette(rng.integers(0, 8, (6, 5)), rng.standard_normal(8).astype(np.float32), 3)
    for encoded in (linear, palette):
        model = encoded_model(encoded)
        executor = Executor(model, train_scales="all")
        names = set(executor.parameters_by_name())
        assert len(names) == 2
        check(model, {"x": rng.standard_normal((4, 6)).astype(np.float32)}, names, train_scales="all")


def test_codes_read_twice_are_one_weight() -> None:
    rng = np.random.default_rng(4)
    weights = {"q": rng.integers(-127, 127, (5, 5)).astype(np.int8), "s": np.float32(0.01)}
    nodes = [
        N("DequantizeLinear", ["q", "s"], ["w1"]), N("DequantizeLinear", ["q", "s"], ["w2"]),
        N("MatMul", ["x", "w1"], ["h"]), N("MatMul", ["h", "w2"], ["y"]),
    ]  # fmt: skip
    model = model_of(nodes, weights, {"x": [None, 5]}, 2)
    assert len(Executor(model).parameters_by_name()) == 1
    check(model, {"x": rng.standard_normal((2, 5)).astype(np.float32)}, set(Executor(model).parameters_by_name()))


def test_integers_packed_below_a_byte_behind_dequantize_linear() -> None:
    rng = np.random.default_rng(5)
    for encoded in (
        encode.int_tensor(rng.integers(-4, 4, (6, 5)).astype(np.int8), 3),
        encode.palette(rng.integers(0, 8, (6, 5)), rng.choice(np.arange(-127, 127), 8, False).astype(np.int8), 3),
    ):
        nodes = [N("DequantizeLinear", ["W", "s"], ["w"]), N("MatMul", ["x", "w"], ["y"])]
        weights = {"W": np.zeros((6, 5), np.int8), "s": np.float32(0.1)}
        model = model_of(nodes, weights, {"x": [None, 6]}, 2)
        encode.attach(model, model.graph.initializers["W"], encoded)
        check(model, {"x": rng.standard_normal((2, 6)).astype(np.float32)}, {"w"})


def test_pruned_zeros_stay_zero() -> None:
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((8, 8)).astype(np.float32)
    weight[rng.random((8, 8)) < 0.5] = 0
    model = model_of([N("MatMul", ["x", "W"], ["y"])], {"W": weight}, {"x": [None, 8]}, 2)
    feeds = {"x": rng.standard_normal((3, 8)).astype(np.float32)}
    written = check(model, feeds, {"W"})
    after = written.graph.initializers["W"].const_value.numpy()
    np.testing.assert_array_equal(after == 0, weight == 0)
    assert not np.array_equal(after, weight)
    free = Executor(model, keep_zeros=False)
    train(free, feeds)
    assert (free.write_back(model).graph.initializers["W"].const_value.numpy() != 0).all()


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_precision_weights_are_written_in_their_type(dtype) -> None:
    rng = np.random.default_rng(7)
    stored = helper.make_tensor("W", dtype, [4, 4], rng.standard_normal(16).astype(np.float32))
    nodes = [N("Cast", ["W"], ["w"], to=TensorProto.FLOAT), N("MatMul", ["x", "w"], ["y"])]
    model = model_of(nodes, {"W": stored}, {"x": [None, 4]}, 2)
    feeds = {"x": rng.standard_normal((3, 4)).astype(np.float32)}
    executor = Executor(model)
    written = check(model, feeds, set(executor.parameters_by_name()))
    assert written.graph.initializers["W"].dtype == ir.DataType(dtype)


def test_codes_of_integer_products_are_trained_in_their_own_units() -> None:
    rng = np.random.default_rng(8)
    weights = {"w": rng.integers(-100, 100, (6, 5)).astype(np.int8), "s": rng.random(5, np.float32) * 0.01 + 0.01}
    nodes = [
        N("DynamicQuantizeLinear", ["x"], ["q", "xs", "xz"]), N("MatMulInteger", ["q", "w", "xz"], ["p"]),
        N("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
        N("Mul", ["xs", "s"], ["scale"]), N("Mul", ["f", "scale"], ["y"]),
    ]  # fmt: skip
    model = model_of(nodes, weights, {"x": [None, 6]}, 2)
    written = check(model, {"x": rng.standard_normal((3, 6)).astype(np.float32)}, {"w", "s"})
    assert written.graph.initializers["w"].dtype == ir.DataType.INT8


def qlinear(op: str) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """x -> codes -> integer layer -> codes -> y."""
    rng = np.random.default_rng(9)
    conv = op == "QLinearConv"
    shape = (4, 3, 3, 3) if conv else (6, 5)
    weights = {
        "xs": np.float32(0.03), "xz": np.uint8(120), "ys": np.float32(0.2), "yz": np.uint8(128),
        "w": rng.integers(-100, 100, shape).astype(np.int8),
        "ws": (rng.random(4 if conv else 5) * 0.02).astype(np.float32),
        "wz": np.zeros(4 if conv else 5, np.int8),
    }  # fmt: skip
    inputs = ["q", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
    if conv:
        weights["b"] = rng.integers(-500, 500, 4).astype(np.int32)
        inputs.append("b")
    nodes = [N("QuantizeLinear", ["x", "xs", "xz"], ["q"]), N(op, inputs, ["p"]),
             N("DequantizeLinear", ["p", "ys", "yz"], ["y"])]  # fmt: skip
    x = rng.standard_normal((2, 3, 5, 5) if conv else (3, 6)).astype(np.float32)
    return model_of(nodes, weights, {"x": [None, *x.shape[1:]]}, x.ndim), {"x": x}


@pytest.mark.parametrize("op", ["QLinearConv", "QLinearMatMul"])
def test_layers_of_codes_are_executed_and_their_weights_trained(op) -> None:
    model, feeds = qlinear(op)
    executor = Executor(model)
    mine = executor({"x": torch.from_numpy(feeds["x"])})["y"].detach().numpy()
    # The runtime's integer kernels may round one code differently.
    np.testing.assert_allclose(mine, run_ort(model, feeds)["y"], atol=0.2001)
    assert (np.abs(mine - run_ort(model, feeds)["y"]) > 1e-3).mean() < 0.02
    grads = train(executor, feeds, 0.1)
    assert set(grads) == ({"w", "b"} if op == "QLinearConv" else {"w"})
    assert all(g.abs().sum() > 0 for g in grads.values())
    written = executor.write_back(model)
    assert written.graph.initializers["w"].dtype == ir.DataType.INT8
    mine = executor({"x": torch.from_numpy(feeds["x"])})["y"].detach().numpy()
    np.testing.assert_allclose(mine, run_ort(written, feeds)["y"], atol=0.2001)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_the_runtimes_own_blocks_pass_gradients_on(bits, zeros) -> None:
    rng = np.random.default_rng(10)
    n, k, block = 5, 40, 16
    blocks, size = -(-k // block), block * bits // 8
    weights: dict[str, Any] = {
        "b": rng.integers(0, 256, (n, blocks, size)).astype(np.uint8), "s": rng.random(n * blocks, np.float32) * 0.1,
        "u": rng.standard_normal((7, k)).astype(np.float32) * 0.3,
    }  # fmt: skip
    inputs = ["h", "b", "s"]
    if zeros:
        weights["z"] = rng.integers(0, 256, n * -(-blocks * bits // 8)).astype(np.uint8)
        inputs.append("z")
    sizes = {"K": k, "N": n, "bits": bits, "block_size": block}
    nodes = [N("MatMul", ["x", "u"], ["h"]), N("MatMulNBits", inputs, ["y"], domain="com.microsoft", **sizes)]
    model = model_of(nodes, weights, {"x": [None, 7]}, 2)
    model.graph.opset_imports["com.microsoft"] = 1
    check(model, {"x": rng.standard_normal((3, 7)).astype(np.float32)}, {"u"})


def test_neighbours_on_a_palette_by_hand() -> None:
    """What learned rounding moves between: the entries below and above in the order of values, none past the ends."""
    book = np.array([[3.0, -1.0, 0.5, 0.5], [10.0, 20.0, 40.0, 80.0]], np.float32)
    model = encoded_model(encode.palette(np.array([[0, 1], [2, 2], [3, 1], [0, 2]]), book, 2))
    (grid,) = Executor(model).grids().values()
    assert grid.around is not None
    here, down, up = (x.tolist() for x in grid.around)
    assert here == [[3.0, -1.0], [0.5, 0.5], [80.0, 20.0], [10.0, 40.0]]
    assert down[0] == [2.5, 0.0]
    assert up[0] == [0.0, 1.5]
    assert down[2:] == [[40.0, 10.0], [0.0, 20.0]]
    assert up[2:] == [[0.0, 20.0], [10.0, 40.0]]


def test_neighbours_behind_a_mask_by_hand() -> None:
    """What is always 0 stays, and the ends of the codes are ends."""
    mask = np.array([[True, False, True], [True, True, False]])
    encoded = encode.bitmask(np.array([-128, 127, 0, 1], np.int8), mask, scale=np.float32(0.5), bits=8)
    (grid,) = Executor(encoded_model(encoded)).grids().values()
    assert grid.around is not None
    here, down, up = (x.tolist() for x in grid.around)
    assert here == [[-64.0, 0.0, 63.5], [0.0, 0.5, 0.0]]
    assert down == [[0.0, 0.0, 0.5], [0.5, 0.5, 0.0]]
    assert up == [[0.5, 0.0, 0.0], [0.5, 0.5, 0.0]]


@pytest.mark.parametrize("kind", ["palette", "linear", "bitmask"])
def test_learned_moves_are_to_values_a_file_can_hold(kind: str) -> None:
    from featherweight.learn.rounding import Rounding

    model = encoded_model(random_encoded(kind, 3, (6, 5), 4))
    executor = Executor(model)
    rounding = Rounding(executor, executor.parameters_by_name())
    assert rounding
    (name,) = rounding.names
    before = executor.parameters_by_name()[name].detach().clone()
    with torch.no_grad():
        for p in rounding.parameters().values():
            p.copy_(torch.linspace(-3, 3, p.numel()).reshape(p.shape))
    (moved,) = rounding.weights(hard=True).values()
    rounding.settle()
    feeds = {"x": np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)}
    written = executor.write_back(model)
    again = Executor(written).parameters_by_name()[name].detach()
    assert torch.allclose(again, moved, atol=1e-6)
    assert not torch.allclose(again, before, atol=1e-6)
    if kind == "bitmask":
        around = Executor(model).grids()[name].around
        assert around is not None
        assert bool((again[around[2].expand_as(again) == 0] == 0).all())
    np.testing.assert_allclose(
        executor({k: torch.from_numpy(v) for k, v in feeds.items()})["y"].detach().numpy(),
        run_ort(written, feeds)["y"], rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_learned_moves_stay_within_each_channels_own_codes() -> None:
    """With zero points of their own, channels end at different values though their codes end alike."""
    from featherweight.learn.rounding import Rounding

    codes = np.array([[15, 0, 3, 15], [0, 15, 15, 0], [7, 9, 0, 4]], np.uint8)
    stored = {
        "q": onnx.helper.make_tensor("q", onnx.TensorProto.UINT4, codes.shape, codes.reshape(-1).tolist()),
        "z": onnx.helper.make_tensor("z", onnx.TensorProto.UINT4, [4], [2, 12, 8, 4]),
        "s": onnx.numpy_helper.from_array(np.array([1, 0.5, 2, 0.25], np.float32), "s"),
    }
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], "dq", axis=1),
            onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "product"),
        ],
        "g", [onnx.helper.make_tensor_value_info("x", 1, ["N", 3])],
        [onnx.helper.make_tensor_value_info("y", 1, ["N", 4])], list(stored.values()),
    )  # fmt: skip
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]))
    executor = Executor(model)
    rounding = Rounding(executor, executor.parameters_by_name())
    (name,) = rounding.names
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for p in rounding.parameters().values():
                p.fill_(9 * sign)
        (moved,) = rounding.weights(hard=True).values()
        steps = np.round(moved.detach().numpy() / np.array([1, 0.5, 2, 0.25])) + np.array([2, 12, 8, 4])
        assert steps.min() >= 0
        assert steps.max() <= 15
        assert not np.array_equal(steps, codes)
    rounding.settle()
    again = Executor(executor.write_back(model)).parameters_by_name()[name]
    assert torch.allclose(again.detach(), moved.detach(), atol=1e-6)
