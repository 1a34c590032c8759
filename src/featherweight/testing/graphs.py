"""Small models for tests, written in ONNX text: one for each way in which weights are used.

`build(name)` gives the model with seeded weights and two batches of inputs. Third-party techniques may use them
as they are; `NAMES` lists them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Small:
    """A model and two feeds that run on it."""

    name: str
    model: ir.Model
    feeds: tuple[dict[str, Array], ...]


@dataclass(frozen=True)
class _Recipe:
    text: str
    weights: dict[str, tuple[int, ...]]
    inputs: dict[str, tuple[int, ...]]
    ids_below: int = 0


_HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'

_RECIPES: dict[str, _Recipe] = {
    "gemm_matmul": _Recipe(
        """g (float[N, 24] x) => (float[N, 10] y) {
          [fc1] h = Gemm<transB = 1>(x, w1, b1)
          [act1] a = Relu(h)
          [fc2] m = MatMul(a, w2)
          [bias2] p = Add(m, b2)
          [act2] q = Sigmoid(p)
          [fc3] y = Gemm<alpha = 0.5, beta = 2.0>(q, w3, b3)
        }""",
        {"w1": (40, 24), "b1": (40,), "w2": (40, 64), "b2": (64,), "w3": (64, 10), "b3": (10,)},
        {"x": (6, 24)},
    ),
    "convolutions": _Recipe(
        """g (float[N, 3, 12, 12] x) => (float[N, 7] y) {
          [stem] c1 = Conv<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(x, w1, b1)
          [act1] r1 = Relu(c1)
          [depthwise] c2 = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 16>(r1, w2, b2)
          [act2] r2 = Relu(c2)
          [point] c3 = Conv<kernel_shape = [1, 1]>(r2, w3)
          [grouped] c4 = Conv<kernel_shape = [3, 3], group = 4>(c3, w4, b4)
          [pool] p = GlobalAveragePool(c4)
          [flat] f = Flatten(p)
          [head] y = Gemm<transB = 1>(f, w5, b5)
        }""",
        {
            "w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 1, 3, 3), "b2": (16,), "w3": (32, 16, 1, 1),
            "w4": (24, 8, 3, 3), "b4": (24,), "w5": (7, 24), "b5": (7,),
        },
        {"x": (3, 3, 12, 12)},
    ),
    "upsampling": _Recipe(
        """g (float[N, 8, 5, 5] x) => (float[N, 6, 11, 11] y) {
          [up] c1 = ConvTranspose<kernel_shape = [3, 3], strides = [2, 2], group = 2>(x, w1, b1)
          [act] r1 = Relu(c1)
          [out] y = ConvTranspose<kernel_shape = [1, 1]>(r1, w2)
        }""",
        {"w1": (8, 6, 3, 3), "b1": (12,), "w2": (12, 6, 1, 1)},
        {"x": (3, 8, 5, 5)},
    ),
    "embedding": _Recipe(
        """g (int64[N, 9] ids) => (float[N, 5] y) {
          [table] e = Gather(words, ids)
          [norm] n = LayerNormalization<axis = -1>(e, gain, shift)
          [mix] m = MatMul(n, w1)
          [pool] p = ReduceMean<keepdims = 0>(m, axis)
          [head] y = MatMul(p, w2)
        }""",
        {"words": (60, 32), "gain": (32,), "shift": (32,), "w1": (32, 32), "w2": (32, 5)},
        {"ids": (4, 9)},
        ids_below=60,
    ),
    "tied_table": _Recipe(
        """g (int64[N, 7] ids) => (float[N, 7, 50] y) {
          [table] e = Gather(words, ids)
          [mix] m = MatMul(e, w1)
          [act] a = Tanh(m)
          [turn] t = Transpose<perm = [1, 0]>(words)
          [decode] y = MatMul(a, t)
        }""",
        {"words": (50, 24), "w1": (24, 24)},
        {"ids": (4, 7)},
        ids_below=50,
    ),
    "recurrent": _Recipe(
        """g (float[S, N, 10] x) => (float[N, 4] y) {
          [lstm] h, h_last, c_last = LSTM<hidden_size = 12, direction = "bidirectional">(x, w1, r1, b1)
          [turn] t = Transpose<perm = [0, 2, 1, 3]>(h)
          [flat] f = Reshape(t, shape)
          [gru] g_all, g_last = GRU<hidden_size = 8, linear_before_reset = 1>(f, w2, r2, b2)
          [last] s = Squeeze(g_last, first)
          [head] y = MatMul(s, w3)
        }""",
        {
            "w1": (2, 48, 10), "r1": (2, 48, 12), "b1": (2, 96), "w2": (1, 24, 24), "r2": (1, 24, 8),
            "b2": (1, 48), "w3": (8, 4),
        },
        {"x": (6, 3, 10)},
    ),
    "odd_layouts": _Recipe(
        """g (float[16, M] x) => (float[1, 12, M] y) {
          [left] a = MatMul(w1, x)
          [act] b = Relu(a)
          [turn] c = Transpose<perm = [1, 0]>(b)
          [unit] d = MatMul(c, w2)
          [back] y = Transpose<perm = [0, 2, 1]>(d)
        }""",
        {"w1": (20, 16), "w2": (1, 20, 12)},
        {"x": (16, 5)},
    ),
    "residuals": _Recipe(
        """g (float[N, 3, 8, 8] x) => (float[N, 5] y) {
          [stem] s = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w1, b1)
          [expand] c1 = Conv<kernel_shape = [1, 1]>(s, w2)
          [act1] r1 = Relu(c1)
          [project] c2 = Conv<kernel_shape = [1, 1]>(r1, w3, b3)
          [sum1] t = Add(c2, s)
          [inner] c3 = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(t, w4)
          [sum2] u = Add(t, c3)
          [pool] p = GlobalAveragePool(u)
          [flat] f = Flatten(p)
          [head] y = MatMul(f, w5)
        }""",
        {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (32, 16, 1, 1), "w3": (16, 32, 1, 1), "b3": (16,),
         "w4": (16, 16, 3, 3), "w5": (16, 5)},
        {"x": (3, 3, 8, 8)},
    ),
    "loop_body": _Recipe(
        """g (float[N, 12] x) => (float[N, 12] y) {
          [repeat] y = Loop(trips, keep, x) <body = turn (int64 i, bool go, float[N, 12] h) =>
            (bool go_out, float[N, 12] h_out) {
              [inner] m = Gemm<transB = 1>(h, w1, b1)
              [squash] h_out = Tanh(m)
              [same] go_out = Identity(go)
            }>
        }""",
        {"w1": (12, 12), "b1": (12,)},
        {"x": (4, 12)},
    ),
}  # fmt: skip

_INTEGERS: dict[str, Array] = {
    "axis": np.array([1], np.int64),
    "shape": np.array([0, 0, -1], np.int64),
    "first": np.array([0], np.int64),
    "trips": np.array(3, np.int64),
    "keep": np.array(True),
}

NAMES: tuple[str, ...] = tuple(_RECIPES)


def build(name: str, *, seed: int = 0) -> Small:
    """The model called `name` (see NAMES) with weights and two feeds made from `seed`.

    Row or channel 1 of every weight of two or more dimensions is exactly zero, as dead channels and padding
    rows are in real models; biases are not.
    """
    recipe = _RECIPES[name]
    rng = np.random.default_rng(seed)
    arrays: dict[str, Array] = {key: _weights(rng, key, shape) for key, shape in recipe.weights.items()}
    arrays |= {key: value for key, value in _INTEGERS.items() if _mentions(recipe.text, key)}
    proto = onnx.parser.parse_model(_HEAD + recipe.text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in arrays.items())
    model = ir.from_proto(proto)
    return Small(name, model, tuple(_feed(rng, recipe) for _ in range(2)))


def _mentions(text: str, name: str) -> bool:
    return any(name in call.replace(")", " ").replace(",", " ").split() for call in text.split("(")[1:])


def _weights(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Heavy-tailed weights of sensible size, one zero slice each."""
    if len(shape) == 1 or name.startswith("b"):
        return (1.0 + 0.1 * rng.normal(size=shape) if name == "gain" else 0.1 * rng.normal(size=shape)).astype(
            np.float32
        )
    w = np.asarray(rng.standard_t(5, shape) / np.sqrt(np.prod(shape[1:])), dtype=np.float32)
    if shape[0] > 1:
        w[1] = 0
    else:
        w[:, 1] = 0
    return w


def _feed(rng: np.random.Generator, recipe: _Recipe) -> dict[str, Array]:
    if recipe.ids_below:
        return {k: rng.integers(0, recipe.ids_below, shape) for k, shape in recipe.inputs.items()}
    # Correlated, shifted inputs: what follows a real layer is never white noise around zero.
    feed: dict[str, Array] = {}
    for key, shape in recipe.inputs.items():
        x = rng.normal(size=shape) + 0.5 * rng.normal(size=(*shape[:1], *[1] * (len(shape) - 1))) + 0.3
        feed[key] = x.astype(np.float32)
    return feed
