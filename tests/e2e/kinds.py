"""Small hostile models of the kinds that break quantizers, each with data: whole runs must get every one right.

Written in ONNX text; weights and data come from a fixed seed. `KINDS` lists the names, `write` makes the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

BATCHES = 16


@dataclass(frozen=True)
class Kind:
    """`weights` and `inputs` are shapes, or for other than float32 a (dtype, shape) pair; `given` whole arrays."""

    text: str
    weights: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, np.ndarray] = field(default_factory=dict)
    opset: int = 17
    ir: int = 8
    domains: str = ""
    functions: str = ""
    least_db: float = 20.0
    scale: float = 1.0
    below: int = 10


def _i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


_CONV = "c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>"

KINDS: dict[str, Kind] = {
    "gru_reset_before": Kind(
        """g (float[6, N, 10] x) => (float[6, 1, N, 8] y, float[1, N, 8] last) {
             y, last = GRU<hidden_size = 8>(x, w, r, b) }""",
        {"w": (1, 24, 10), "r": (1, 24, 8), "b": (1, 48)}, {"x": (6, 2, 10)},
    ),
    "rnn_reverse_with_lengths": Kind(
        """g (float[6, 2, 10] x) => (float[6, 1, 2, 8] y) {
             y = RNN<hidden_size = 8, direction = "reverse">(x, w, r, , lengths, h0) }""",
        {"w": (1, 8, 10), "r": (1, 8, 8), "h0": (1, 2, 8)}, {"x": (6, 2, 10)}, {"lengths": np.array([6, 4], np.int32)},
    ),
    "lstm_peepholes_last_state_only": Kind(
        """g (float[5, N, 12] x) => (float[N, 3] y) {
             , h, cell = LSTM<hidden_size = 8>(x, w, r, b, , , , p)
             s = Squeeze(h, first)
             y = MatMul(s, head) }""",
        {"w": (1, 32, 12), "r": (1, 32, 8), "b": (1, 64), "p": (1, 24), "head": (8, 3)}, {"x": (5, 3, 12)},
        {"first": _i64(0)},
    ),
    "gru_without_weights_of_its_own": Kind(
        """g (float[4, 2, 6] x, float[1, 15, 6] w, float[1, 15, 5] r) => (float[4, 1, 2, 5] y) {
             y = GRU<hidden_size = 5>(x, w, r) }""",
        {}, {"x": (4, 2, 6), "w": (1, 15, 6), "r": (1, 15, 5)},
    ),
    "if_branches_with_gemms": Kind(
        """g (float[N, 16] x) => (float[N, 16] y) {
             m = ReduceMean<keepdims = 0>(x)
             flag = Greater(m, zero)
             y = If(flag) <
               then_branch = a () => (float[N, 16] t) { t = Gemm(x, w1, b1) },
               else_branch = b () => (float[N, 16] e) { h = MatMul(x, w2) e = Relu(h) }> }""",
        {"w1": (16, 16), "b1": (16,), "w2": (16, 16)}, {"x": (3, 16)}, {"zero": np.float32(0)},
    ),
    "if_inside_loop_captured_weight": Kind(
        """g (float[N, 16] x, bool flag) => (float[N, 16] y) {
             y = Loop(trips, keep, x) <
             body = turn (int64 i, bool go, float[N, 16] h) => (bool go_out, float[N, 16] out) {
               out = If(flag) <
                 then_branch = a () => (float[N, 16] t) { m = MatMul(h, w) t = Tanh(m) },
                 else_branch = b () => (float[N, 16] e) { m2 = MatMul(h, w) e = Sigmoid(m2) }>
               go_out = Identity(go) }> }""",
        {"w": (16, 16)}, {"x": (3, 16), "flag": (np.bool_, ())},
        {"trips": np.array(3, np.int64), "keep": np.array(True)},
    ),
    "scan_two_states": Kind(
        """g (float[5, 8] x, float[8] a0) => (float[8] a, float[5, 8] out) {
             a, out = Scan<num_scan_inputs = 1, body = step (float[8] s, float[8] v) => (float[8] s2, float[8] o) {
               m = MatMul(v, w) u = Add(s, m) s2 = Tanh(u) o = Relu(m) }>(a0, x) }""",
        {"w": (8, 8)}, {"x": (5, 8), "a0": (8,)},
    ),
    "opset8_old_forms": Kind(
        f"""g (float[2, 3, 8, 8] x) => (float[2, 5] y) {{
             {_CONV}(x, w1, b1)
             n = BatchNormalization<epsilon = 0.001, momentum = 0.9, spatial = 1>(c, s, o, m, v)
             r = Clip<min = 0.0, max = 6.0>(n)
             d = Dropout<ratio = 0.5>(r)
             u = Upsample<mode = "nearest", scales = [1.0, 1.0, 2.0, 2.0]>(d)
             p = GlobalAveragePool(u)
             f = Flatten(p)
             y = Gemm<transB = 1>(f, w2, b2) }}""",
        {"w1": (8, 3, 3, 3), "b1": (8,), "s": (8,), "o": (8,), "m": (8,), "w2": (5, 8), "b2": (5,)},
        {"x": (2, 3, 8, 8)}, {"v": np.linspace(0.5, 2, 8, dtype=np.float32)}, opset=8, ir=3,
    ),
    "opset9_upsample_scale_input": Kind(
        f"""g (float[N, 3, 6, 6] x) => (float[N, 4, 12, 12] y) {{
             {_CONV}(x, w1) r = Relu(c) u = Upsample<mode = "linear">(r, scales)
             y = Conv<kernel_shape = [1, 1]>(u, w2, b2) }}""",
        {"w1": (8, 3, 3, 3), "w2": (4, 8, 1, 1), "b2": (4,)}, {"x": (2, 3, 6, 6)},
        {"scales": np.array([1, 1, 2, 2], np.float32)}, opset=9, ir=4,
    ),
    "opset10_resize_topk_dropout_mask": Kind(
        f"""g (float[N, 3, 6, 6] x) => (float[N, 8, 12, 12] u, float[N, 8, 6, 3] top, int64[N, 8, 6, 3] at) {{
             {_CONV}(x, w1, b1) r, mask = Dropout(c) u = Resize<mode = "nearest">(r, scales)
             top, at = TopK<axis = -1>(r, k) }}""",
        {"w1": (8, 3, 3, 3), "b1": (8,)}, {"x": (2, 3, 6, 6)},
        {"scales": np.array([1, 1, 2, 2], np.float32), "k": _i64(3)}, opset=10, ir=5,
    ),
    "opset11_softmax_flattens": Kind(
        """g (float[N, 4, 6] x) => (float[N, 4, 5] y) {
             m = MatMul(x, w) s = Softmax<axis = 1>(m) q = Unsqueeze<axes = [0]>(s) y = Squeeze<axes = [0]>(q) }""",
        {"w": (6, 5)}, {"x": (2, 4, 6)}, opset=11, ir=6,
    ),
    "opset13_split_and_reduce": Kind(
        """g (float[N, 12] x) => (float[N, 7] y, float[N, 1] s) {
             a, b = Split<axis = 1>(x, parts) h = MatMul(a, w1) k = MatMul(b, w2) y = Sub(h, k)
             s = ReduceSum<keepdims = 1>(y, ones) }""",
        {"w1": (5, 7), "w2": (7, 7)}, {"x": (3, 12)}, {"parts": _i64(5, 7), "ones": _i64(1)}, opset=13, ir=7,
    ),
    "many_outputs_inner_scalar_integer": Kind(
        f"""g (float[N, 3, 8, 8] x) => (
                 float[N, 16, 8, 8] r, float[N, 5] y, float total, int64[N] best, bool[N, 5] sure) {{
             {_CONV}(x, w1, b1) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p)
             y = Gemm<transB = 1>(f, w2, b2) total = ReduceSum<keepdims = 0>(y)
             best = ArgMax<axis = 1, keepdims = 0>(y) sure = Greater(y, zero) }}""",
        {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (5, 16), "b2": (5,)}, {"x": (2, 3, 8, 8)}, {"zero": np.float32(0)},
        least_db=15,
    ),
    "no_constant_weights": Kind(
        """g (float[N, 6] a, float[6, 5] b) => (float[N, 5] y) { m = MatMul(a, b) y = Softmax<axis = -1>(m) }""",
        {}, {"a": (3, 6), "b": (6, 5)},
    ),
    "calibration_is_all_zero": Kind(
        f"""g (float[N, 3, 6, 6] x) => (float[N, 4] y) {{
             {_CONV}(x, w1) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p) y = Gemm(f, w2, b2) }}""",
        {"w1": (16, 3, 3, 3), "w2": (16, 4), "b2": (4,)}, {"x": (2, 3, 6, 6)}, scale=0.0,
    ),
    "tiny_and_huge_activations": Kind(
        """g (float[N, 24] x) => (float[N, 6] y) {
             m = MatMul(x, w1) k = Mul(m, big) r = Relu(k) y = Gemm(r, w2, b2) }""",
        {"w1": (24, 16), "w2": (16, 6), "b2": (6,)}, {"x": (3, 24)}, {"big": np.float32(1e12)}, scale=1e-9,
    ),
    "int8_input": Kind(
        """g (int8[N, 20] x) => (float[N, 12] y) { f = Cast<to = 1>(x) s = Mul(f, step) y = MatMul(s, w) }""",
        {"w": (20, 12)}, {"x": (np.int8, (3, 20))}, {"step": np.float32(0.05)},
    ),
    "uint8_image_input": Kind(
        f"""g (uint8[1, 8, 8, 3] x) => (float[1, 10, 8, 8] y) {{
             f = Cast<to = 1>(x) t = Transpose<perm = [0, 3, 1, 2]>(f) n = Sub(t, mean)
             {_CONV}(n, w, b) y = Relu(c) }}""",
        {"w": (10, 3, 3, 3), "b": (10,)}, {"x": (np.uint8, (1, 8, 8, 3))}, {"mean": np.float32(4)},
    ),
    "only_a_gather": Kind(
        """g (int64[N, 5] ids) => (float[N, 5, 16] y) { y = Gather(words, ids) }""",
        {"words": (40, 16)}, {"ids": (np.int64, (2, 5))}, below=40,
    ),
    "gather_of_columns_and_scalars": Kind(
        """g (int32 i) => (float[20] column, float[30] row) {
             column = Gather<axis = 1>(table, i) row = Gather(table, i) }""",
        {"table": (20, 30)}, {"i": (np.int32, ())}, below=20,
    ),
    "no_sites": Kind("""g (float[N, 4] x) => (float[N, 4] y) { r = Relu(x) y = Exp(r) }""", {}, {"x": (2, 4)}),
    "input_is_output": Kind("""g (float[N, 4] x) => (float[N, 4] x) { }""", {}, {"x": (2, 4)}),
    "identity_only": Kind("""g (float[N, 4] x) => (float[N, 4] y) { y = Identity(x) }""", {}, {"x": (2, 4)}),
    "output_is_a_weight": Kind(
        """g (float[N, 16] x) => (float[N, 16] y, float[16, 16] w) { y = MatMul(x, w) }""",
        {"w": (16, 16)}, {"x": (2, 16)},
    ),
    "float16_model": Kind(
        """g (float16[N, 32] x) => (float16[N, 8] y) { m = MatMul(x, w1) r = Relu(m) y = Gemm(r, w2, b2) }""",
        {"w1": (np.float16, (32, 32)), "w2": (np.float16, (32, 8)), "b2": (np.float16, (8,))},
        {"x": (np.float16, (3, 32))},
    ),
    "double_model": Kind(
        """g (double[N, 32] x) => (double[N, 8] y) { m = MatMul(x, w1) r = Relu(m) y = Gemm(r, w2, b2) }""",
        {"w1": (np.float64, (32, 32)), "w2": (np.float64, (32, 8)), "b2": (np.float64, (8,))},
        {"x": (np.float64, (3, 32))},
    ),
    "double_input_float_inside": Kind(
        """g (double[N, 32] x) => (double[N, 8] y) { f = Cast<to = 1>(x) m = MatMul(f, w1) y = Cast<to = 11>(m) }""",
        {"w1": (32, 8)}, {"x": (np.float64, (3, 32))},
    ),
    "string_input": Kind(
        """g (string[N] s, float[N, 16] x) => (float[N, 16] y, string[N] same) {
             y = MatMul(x, w) same = Identity(s) }""",
        {"w": (16, 16)}, {"s": (np.str_, (3,)), "x": (3, 16)},
    ),
    "fixed_batch_of_four": Kind(
        f"""g (float[4, 3, 6, 6] x) => (float[4, 6] y) {{
             {_CONV}(x, w1, b1) r = Relu(c) p = GlobalAveragePool(r) f = Reshape(p, shape) y = Gemm(f, w2, b2) }}""",
        {"w1": (12, 3, 3, 3), "b1": (12,), "w2": (12, 6), "b2": (6,)}, {"x": (4, 3, 6, 6)}, {"shape": _i64(4, 12)},
    ),
    "shapes_unknown": Kind(
        f"""g (float[] x) => (float[] y) {{ {_CONV}(x, w1, b1) r = Relu(c) y = ReduceMean(r) }}""",
        {"w1": (12, 3, 3, 3), "b1": (12,)}, {"x": (2, 3, 7, 5)},
    ),
    "bias_and_weight_shared": Kind(
        """g (float[N, 8, 5, 5] x) => (float[N, 8, 5, 5] y) {
             a = Conv<kernel_shape = [1, 1]>(x, w, b) r = Relu(a) k = Mul(r, big)
             c = Conv<kernel_shape = [1, 1]>(k, w, b) y = Add(c, w_as_data) }""",
        {"w": (8, 8, 1, 1), "b": (8,), "w_as_data": (1, 8, 1, 1)}, {"x": (2, 8, 5, 5)}, {"big": np.float32(50)},
    ),
    "weight_also_used_as_data": Kind(
        """g (float[N, 16] x) => (float[N, 16] y, float[16, 16] z) { y = MatMul(x, w) z = Mul(w, two) }""",
        {"w": (16, 16)}, {"x": (2, 16)}, {"two": np.float32(2)},
    ),
    "extreme_weights": Kind(
        """g (float[N, 16] x) => (float[N, 16] y) { y = Gemm(x, w, b) }""",
        {"b": (16,)}, {"x": (2, 16)},
        {"w": (np.geomspace(1e-40, 1e30, 16)[None, :] * np.linspace(-1, 1, 16)[:, None]).astype(np.float32)},
    ),
    "empty_weight": Kind(
        """g (float[N, 16] x) => (float[N, 0] none, float[N, 16] y) { none = MatMul(x, w0) y = MatMul(x, w) }""",
        {"w": (16, 16)}, {"x": (2, 16)}, {"w0": np.zeros((16, 0), np.float32)},
    ),
    "already_integer_matmul": Kind(
        """g (uint8[N, 16] x) => (float[N, 8] y) { i = MatMulInteger(x, w8) f = Cast<to = 1>(i) y = MatMul(f, w) }""",
        {"w": (16, 8)}, {"x": (np.uint8, (2, 16))}, {"w8": (np.arange(256) % 7 - 3).astype(np.int8).reshape(16, 16)},
    ),
    "einsum_and_sequences": Kind(
        """g (float[2, 16] x) => (float[2, 16] y) {
             e = Einsum<equation = "ab,bc->ac">(x, w1) parts = SplitToSequence<axis = 0>(e)
             first = SequenceAt(parts, zero) second = SequenceAt(parts, one)
             both = Concat<axis = 0>(second, first) y = MatMul(both, w2) }""",
        {"w1": (16, 16), "w2": (16, 16)}, {"x": (2, 16)}, {"zero": np.array(0, np.int64), "one": np.array(1, np.int64)},
    ),
    "dilated_transposed_and_auto_pad": Kind(
        """g (float[N, 4, 9, 9] x) => (float[N, 3, 18, 18] y) {
             a = Conv<auto_pad = "SAME_LOWER", kernel_shape = [2, 3]>(x, w1, b1) r = LeakyRelu(a)
             d = Conv<kernel_shape = [3, 3], dilations = [2, 2], pads = [2, 2, 2, 2]>(r, w3)
             t = ConvTranspose<strides = [2, 2], output_padding = [1, 1], pads = [1, 1, 1, 1]>(d, w2, b2)
             y = HardSwish(t) }""",
        {"w1": (8, 4, 2, 3), "b1": (8,), "w3": (8, 8, 3, 3), "w2": (8, 3, 3, 3), "b2": (3,)}, {"x": (2, 4, 9, 9)},
    ),
    "nested_functions": Kind(
        """g (float[N, 16] x) => (float[N, 16] y) { y = own.Twice(x, w) }""",
        {"w": (16, 16)}, {"x": (2, 16)}, domains=', "own" : 1',
        functions="""
          <domain: "own", opset_import: ["" : 17]> Once (a, m) => (b) { h = MatMul(a, m) b = Tanh(h) }
          <domain: "own", opset_import: ["" : 17, "own" : 1]> Twice (a, m) => (b) {
             h = own.Once(a, m) b = own.Once(h, m) }""",
    ),
    "attention_block": Kind(
        """g (float[N, 6, 16] x) => (float[N, 6, 16] y) {
             n = LayerNormalization(x, gain, shift)
             q = MatMul(n, wq) k = MatMul(n, wk) v = MatMul(n, wv) kt = Transpose<perm = [0, 2, 1]>(k)
             s = MatMul(q, kt) d = Div(s, four) p = Softmax(d) o = MatMul(p, v) z = MatMul(o, wo) y = Add(x, z) }""",
        {"gain": (16,), "shift": (16,), "wq": (16, 16), "wk": (16, 16), "wv": (16, 16), "wo": (16, 16)},
        {"x": (2, 6, 16)}, {"four": np.float32(4)},
    ),
    "odd_names": Kind(
        """g (float[N, 16] a) => (float[N, 16] y) { m = MatMul(a, w) y = Relu(m) }""",
        {"w": (16, 16)}, {"a": (2, 16)},
    ),
    "one_by_one": Kind(
        """g (float[N, 1] x) => (float[N, 1] y) { y = Gemm(x, w, b) }""", {"w": (1, 1), "b": (1,)}, {"x": (2, 1)}
    ),
    "vector_times_vector": Kind("""g (float[64] x) => (float y) { y = MatMul(x, w) }""", {"w": (64,)}, {"x": (64,)}),
    "infinite_mask_then_softmax": Kind(
        """g (float[N, 16] x, bool[N, 16] keep) => (float[N, 16] y, float[N, 16] m) {
             h = MatMul(x, w) m = Where(keep, h, low) y = Softmax(m) }""",
        {"w": (16, 16)}, {"x": (2, 16), "keep": (np.bool_, (2, 16))}, {"low": np.float32(-np.inf)},
    ),
}  # fmt: skip

#: Slashes, blanks, colons and other scripts, as in real exports.
_ODD = {"a": "ein/Gabe 0:1", "w": "层.weight::0", "m": "m m", "y": "out/put:0"}


def model_of(kind: Kind, *, seed: int = 0) -> onnx.ModelProto:
    """The model with seeded weights."""
    rng = np.random.default_rng(seed)
    head = f'<ir_version: {kind.ir}, opset_import: ["" : {kind.opset}{kind.domains}]>\n'
    model = onnx.parser.parse_model(head + kind.text + kind.functions)
    arrays = {k: _weights(rng, s) for k, s in kind.weights.items()} | dict(kind.given)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), k) for k, a in arrays.items())
    if kind.ir < 4:  # where initializers had to be inputs as well
        for name, array in arrays.items():
            kind_of = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind_of, array.shape))
    for value in (*model.graph.input, *model.graph.output):
        if kind.text.startswith("g (float[] x)"):
            value.type.tensor_type.ClearField("shape")
    return model


def _weights(rng: np.random.Generator, shape: Any) -> np.ndarray:
    dtype, dims = shape if shape and isinstance(shape[0], type) else (np.float32, shape)
    return (rng.normal(size=dims) / np.sqrt(max(np.prod(dims[1:]), 1))).astype(dtype)


def batches_of(kind: Kind, n: int = BATCHES, *, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Seeded batches by input name."""
    rng = np.random.default_rng(seed)
    return [{k: _values(rng, s, kind) for k, s in kind.inputs.items()} for _ in range(n)]


def _values(rng: np.random.Generator, shape: Any, kind: Kind) -> np.ndarray:
    dtype, dims = shape if shape and isinstance(shape[0], type) else (np.float32, shape)
    if dtype is np.bool_:
        return np.asarray(rng.random(dims) < 0.7)
    if dtype is np.str_:
        return np.asarray(rng.choice(["a", "longer text", ""], dims))
    if np.issubdtype(dtype, np.integer):
        return np.asarray(rng.integers(0, kind.below, dims), dtype)
    return np.asarray(kind.scale * (rng.normal(size=dims) + 0.3), dtype)


@dataclass(frozen=True)
class Written:
    """Files of one kind; `inputs` is a batch that calibration does not hold."""

    model: Path
    data: Path
    inputs: dict[str, np.ndarray]


def write(name: str, folder: Path) -> Written:
    """Save model and calibration data of a kind under `folder`."""
    kind = KINDS[name]
    model, batches = model_of(kind), batches_of(kind)
    inputs = batches_of(kind, 1, seed=2)[0]
    if name == "odd_names":
        _rename(model, _ODD)
        batches, inputs = [{_ODD[k]: v for k, v in b.items()} for b in batches], {_ODD[k]: v for k, v in inputs.items()}
    onnx.save(model, folder / f"{name}.onnx")
    np.savez(folder / f"{name}.npz", **{f"{i}::{k}": v for i, b in enumerate(batches) for k, v in b.items()})
    return Written(folder / f"{name}.onnx", folder / f"{name}.npz", inputs)


def _rename(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
