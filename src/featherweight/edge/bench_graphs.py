"""The tiny models `featherweight profile` times: chains of one operator, short and long, whose difference is its cost.

Each operator of a chain has weights of its own, as in a real network. A chain that widens narrows again, so that it can
go on; its two products have the same multiply-accumulates and bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from featherweight.edge.bench_writing import Array, Chain, Graph


def chains(*, integer: bool = True) -> Iterator[Chain]:
    """Every chain there is to time."""
    for precision in ("float32", "int8") if integer else ("float32",):
        yield from _convolutions(precision)
        yield from _products(precision)
    if integer:
        yield from _dynamic_products()
        yield from _nbits_products()
    yield from _attention()
    yield from _recurrent()
    yield from _elementwise()
    yield from _integer_elementwise()
    yield from _by_rows()


def _image(shape: tuple[int, ...], seed: int = 1) -> dict[str, Array]:
    return {"x": (np.random.default_rng(seed).normal(size=shape) * 0.5).astype(np.float32)}


def _conv(g: Graph, x: str, shape: tuple[int, ...], precision: str, **attributes: Any) -> str:
    if precision == "float32":
        y = g.node("Conv", x, g.weight(shape), g.store(np.zeros(shape[0], np.float32)), **attributes)
        return g.node("Relu", y)
    w, scales = g.weight_int8(shape, 0)
    bias = g.node("DequantizeLinear", g.store(np.zeros(shape[0], np.int32)), g.store(scales * np.float32(0.05)), axis=0)
    return g.qdq(g.node("Conv", x, w, bias, **attributes))


POINTWISE = ((16, 96, 12544), (24, 96, 3136), (768, 384, 100), (112, 672, 196), (8, 16, 2304), (32, 32, 784),
             (48, 240, 196), (128, 128, 196), (192, 192, 49), (320, 1280, 49), (24, 144, 784), (64, 64, 12544),
             (480, 80, 196), (96, 24, 1), (512, 128, 1), (256, 256, 1024))  # fmt: skip
SPATIAL = ((32, 32, 784, 9), (64, 64, 3136, 9), (128, 128, 196, 9), (16, 16, 12544, 9), (256, 256, 49, 9),
           (32, 32, 784, 25), (96, 96, 400, 9), (24, 24, 25600, 9))  # fmt: skip
DEPTHWISE = ((32, 12544, 9), (144, 784, 9), (240, 196, 25), (480, 196, 9), (1152, 49, 25), (96, 12544, 9), (64, 16, 9))
STRIDED = ((96, 12544), (144, 3136), (240, 784))
LINES = ((128, 128, 8, 3), (64, 64, 128, 3), (256, 256, 64, 3), (128, 128, 256, 1), (32, 32, 1024, 5))


def _convolutions(precision: str) -> Iterator[Chain]:
    for c, d, pixels in POINTWISE:
        yield _image_chain("conv1x1", precision, (c, d, pixels), (c, d), 1, pixels, c * d * pixels)
    for c, d, pixels, taps in SPATIAL:
        dims = (c, d, pixels, pixels, taps)
        yield _image_chain("conv", precision, dims, (c, d), round(taps**0.5), pixels, c * d * pixels * taps)
    for c, pixels, taps in DEPTHWISE:
        shape = (c, pixels, pixels, taps)
        yield _image_chain("depthwise", precision, shape, (c, c), round(taps**0.5), pixels, c * pixels * taps, groups=c)
    for c, pixels in STRIDED:
        yield _strided_chain(c, pixels, precision)
    for c, d, size, taps in LINES if precision == "float32" else ():
        yield _line_chain(c, d, size, taps)
    if precision == "float32":
        yield from (_first_chain(d, side) for d, side in ((32, 224), (16, 96), (32, 320)))


def _image_chain(
    kind: str, precision: str, dims: tuple[int, ...], widths: tuple[int, int], k: int, pixels: int, macs: int,
    *, groups: int = 1,
) -> Chain:  # fmt: skip
    side = round(pixels**0.5)
    pads = [k // 2] * 4

    def build(n: int) -> bytes:
        g = Graph()
        x = g.input("x", (1, widths[0], side, side))
        x = g.qdq(x) if precision == "int8" else g.node("Relu", x)
        for _ in range(n):
            for a, b in (widths, widths[::-1]):
                shape = (b, a // groups, k, k)
                x = _conv(g, x, shape, precision, kernel_shape=[k, k], pads=pads, group=groups)
        return g.finish(x)

    return Chain(kind, precision, dims, build, _image((1, widths[0], side, side)), per_link=2, macs=macs)


def _line_chain(c: int, d: int, size: int, taps: int) -> Chain:
    """One-dimensional convolutions run on the general kernel, as do images with odd numbers of channels."""

    def build(n: int) -> bytes:
        g = Graph()
        x = g.input("x", (1, c, size))
        for _ in range(n):
            for a, b in ((c, d), (d, c)):
                x = _conv(g, x, (b, a, taps), "float32", kernel_shape=[taps], pads=[taps // 2] * 2)
        return g.finish(x)

    dims = (c, d, size, size, taps)
    return Chain("conv_plain", "float32", dims, build, _image((1, c, size)), per_link=2, macs=c * d * size * taps)


def _strided_chain(c: int, pixels: int, precision: str) -> Chain:
    """Depthwise with stride 2 shrinks, so links stand side by side; their sum is one with the convolution."""
    side = round(pixels**0.5)

    def build(n: int) -> bytes:
        g = Graph()
        x = g.input("x", (1, 16, side, side))
        x = g.qdq(x) if precision == "int8" else x
        x = _conv(g, x, (c, 16, 1, 1), precision, kernel_shape=[1, 1])
        total = ""
        for _ in range(n):
            y = _conv(g, x, (c, 1, 3, 3), precision, kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2], group=c)
            total = y if not total else g.node("Add", total, y)
            total = g.qdq(total) if precision == "int8" else total
        return g.finish(g.node("GlobalAveragePool", total))

    dims, macs = (c, pixels, pixels // 4, 9), c * pixels // 4 * 9
    return Chain("depthwise", precision, dims, build, _image((1, 16, side, side)), macs=macs)


def _first_chain(outs: int, side: int) -> Chain:
    """A first layer: 3 channels in and stride 2; its output is no image, so there is no chain but one and none."""
    half = side // 2

    def build(n: int) -> bytes:
        g = Graph()
        x = g.input("x", (1, 3, side, side))
        if n > 1:
            bias = g.store(np.zeros(outs, np.float32))
            x = g.node("Conv", x, g.weight((outs, 3, 3, 3)), bias, kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])
        return g.finish(g.node("GlobalAveragePool", x))

    dims, macs = (3, outs, side * side, half * half, 9), 27 * outs * half * half
    return Chain("conv_first", "float32", dims, build, _image((1, 3, side, side)), macs=macs, once=True)


MATRICES = ((1, 384, 384), (1, 1280, 1000), (16, 384, 384), (128, 384, 384), (128, 384, 1536), (16, 384, 1536),
            (64, 256, 256), (8, 768, 768), (256, 128, 512), (1, 128, 64), (32, 64, 64), (24, 768, 6144))  # fmt: skip


def _products(precision: str) -> Iterator[Chain]:
    def link(g: Graph, x: str, k: int, n: int) -> str:
        if precision == "float32":
            return g.node("MatMul", x, g.weight((k, n), k**-0.5))
        w, _ = g.weight_int8((k, n), 1)
        return g.qdq(g.node("MatMul", x, w))

    for m, k, n in MATRICES:
        yield _matrix_chain("matmul", precision, (m, k, n), link, start=precision == "int8")


def _matrix_chain(
    kind: str, precision: str, dims: tuple[int, int, int], link: Callable[[Graph, str, int, int], str],
    *, start: bool = False,
) -> Chain:  # fmt: skip
    m, k, n = dims

    def build(count: int) -> bytes:
        g = Graph()
        x = g.input("x", (1, m, k))
        x = g.qdq(x) if start else x
        for _ in range(count):
            for a, b in ((k, n), (n, k)):
                x = link(g, x, a, b)
        return g.finish(x)

    return Chain(kind, precision, dims, build, _image((1, m, k)), per_link=2, macs=m * k * n)


def _dynamic_products() -> Iterator[Chain]:
    def link(g: Graph, x: str, k: int, n: int) -> str:
        codes = g.store(g.rng.integers(-63, 64, (k, n)).astype(np.int8))
        scale, zero = g.store(np.full(n, 0.02 * k**-0.5, np.float32)), g.store(np.zeros(n, np.int8))
        return g.node("DynamicQuantizeMatMul", x, codes, scale, zero, domain="com.microsoft")

    for dims in ((1, 384, 384), (16, 384, 384), (128, 384, 384), (128, 384, 1536), (1, 512, 1000), (64, 256, 256)):
        yield _matrix_chain("matmul", "int8_dynamic", dims, link)


def _nbits_products() -> Iterator[Chain]:
    def link(g: Graph, x: str, k: int, n: int) -> str:
        packed = g.store(g.rng.integers(0, 256, (n, k // 32, 16)).astype(np.uint8))
        scales = g.store(np.full(n * (k // 32), 0.1 * k**-0.5, np.float32))
        return g.node(
            "MatMulNBits", x, packed, scales, domain="com.microsoft", K=k, N=n, bits=4, block_size=32, accuracy_level=4
        )

    for dims in ((1, 384, 384), (16, 384, 384), (128, 384, 1536), (1, 1024, 1024), (64, 256, 256)):
        yield _matrix_chain("matmul", "int4", dims, link)


def _attention() -> Iterator[Chain]:
    for batch, m, d, other in (
        (12, 16, 32, 16),
        (12, 128, 32, 128),
        (8, 64, 64, 64),
        (1, 256, 64, 256),
        (8, 40, 15, 40),
    ):
        yield _attention_chain(batch, m, d, other)


def _attention_chain(batch: int, m: int, d: int, other: int) -> Chain:
    keys, values = (1, batch, d, other), (1, batch, other, d)

    def build(n: int) -> bytes:
        g = Graph()
        x, k, v = g.input("x", (1, batch, m, d)), g.input("k", keys), g.input("v", values)
        for _ in range(n):
            x = g.node("MatMul", g.node("MatMul", x, k), v)
        return g.finish(x)

    feeds = _image((1, batch, m, d))
    feeds |= {"k": _image(keys)["x"] * np.float32(d**-0.5), "v": _image(values)["x"] * np.float32(other**-0.5)}
    macs = batch * m * d * other
    return Chain("attention", "float32", (batch, m, d, other), build, feeds, per_link=2, macs=macs)


def _recurrent() -> Iterator[Chain]:
    for op, gates in (("LSTM", 4), ("GRU", 3)):
        for steps, hidden in (
            ((16, 64), (64, 256), (1, 128), (32, 128), (10, 512), (40, 512)) if op == "LSTM" else ((16, 64), (64, 128))
        ):
            yield _recurrent_chain(op, gates, steps, hidden)


def _recurrent_chain(op: str, gates: int, steps: int, hidden: int) -> Chain:
    def build(n: int) -> bytes:
        g = Graph()
        x = g.input("x", (steps, 1, hidden))
        axis = g.store(np.array([1], np.int64))
        for _ in range(n):
            w = (1, gates * hidden, hidden)
            y = g.node(op, x, g.weight(w, hidden**-0.5), g.weight(w, hidden**-0.5), hidden_size=hidden)
            x = g.node("Squeeze", y, axis)
        return g.finish(x)

    macs = steps * 2 * gates * hidden * hidden
    return Chain(op.lower(), "float32", (steps, 1, hidden, hidden), build, _image((steps, 1, hidden)), macs=macs)


SIZES = (64, 2048, 65536, 1048576)
_UNARY = {"sigmoid": "Sigmoid", "tanh": "Tanh", "erf": "Erf", "exp": "Exp"}


def _elementwise() -> Iterator[Chain]:
    for size in SIZES:
        yield _flat("add", size, lambda g, x: g.node("Add", x, "x"))
        yield _flat("mul", size, lambda g, x: g.node("Relu", x))
        for kind, op in _UNARY.items():
            yield _flat(kind, size, _unary(op))
        yield _flat("pow", size, lambda g, x: g.node("Pow", x, g.scalar(2.0)))
        yield _flat("copy", size, _copied, per_link=2, extra=1)
        yield _flat("transpose", size, lambda g, x: g.node("Transpose", x, perm=[1, 0]), square=True)
        yield _flat("transpose_rows", size, lambda g, x: g.node("Transpose", x, perm=[1, 0, 2]), rows=True)
        # Outputs that nobody reads are computed all the same, as these sessions do not optimise.
        yield _flat("reduce", size, lambda g, _: g.node("ReduceMean", "x", axes=[-1], keepdims=1))
        yield _flat("reduce_columns", size, lambda g, _: g.node("ReduceMean", "x", axes=[0], keepdims=1), rows=True)
        yield _flat("cast", size, lambda g, x: g.node("Cast", g.node("Cast", x, to=7), to=1), per_link=2)
        yield _flat("quantize", size, _quantized, per_link=2)
        yield _flat("quantize_dynamic", size, _dynamic)
        yield _pooled(size)
        yield _resized(size)


def _unary(op: str) -> Callable[[Graph, str], str]:
    return lambda g, x: g.node(op, x)


def _copied(g: Graph, x: str) -> str:
    return g.node("Concat", g.node("Slice", x, *_half(g, 0)), g.node("Slice", x, *_half(g, 1)), axis=0)


def _half(g: Graph, which: int) -> tuple[str, str, str]:
    rows = 8
    at = (0, rows // 2) if which == 0 else (rows // 2, rows)
    return g.store(np.array([at[0]], np.int64)), g.store(np.array([at[1]], np.int64)), g.store(np.array([0], np.int64))


def _dynamic(g: Graph, _: str) -> str:
    from onnx import helper

    names = [f"v{len(g.nodes)}{part}" for part in "qsz"]
    g.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], names, f"n{len(g.nodes)}"))
    return names[1]


def _quantized(g: Graph, x: str) -> str:
    scale, zero = g.scalar(0.05), g.scalar(128, "uint8")
    return g.node("DequantizeLinear", g.node("QuantizeLinear", x, scale, zero), scale, zero)


def _flat(
    kind: str, size: int, link: Callable[[Graph, str], str], *, square: bool = False, rows: bool = False,
    per_link: int = 1, extra: int = 0,
) -> Chain:  # fmt: skip
    side = round(size**0.5)
    shape = (side, size // side) if square else (8, max(size // 256, 1), min(32, size // 8)) if rows else (8, size // 8)

    def build(n: int) -> bytes:
        g = Graph()
        x = g.input("x", shape)
        for _ in range(n):
            x = link(g, x)
        return g.finish(x)

    return Chain(kind, "float32", (size,), build, _image(shape), optimize=False, per_link=per_link, extra=extra)


def _pooled(size: int) -> Chain:
    side = max(round((size / 16) ** 0.5), 1)

    def build(n: int) -> bytes:
        g = Graph()
        x = g.input("x", (1, 16, side, side))
        for _ in range(n):
            x = g.node("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1])
        return g.finish(x)

    count = 16 * side * side
    return Chain("pool", "float32", (count * 10,), build, _image((1, 16, side, side)), optimize=True)


def _resized(size: int) -> Chain:
    side = max(round((size / 64) ** 0.5), 1)

    def build(n: int) -> bytes:
        g = Graph()
        x = g.input("x", (1, 16, side, side))
        for _ in range(n):
            y = g.node("Resize", x, "", g.store(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
        return g.finish(y)

    return Chain("resize", "float32", (16 * side * side * 4,), build, _image((1, 16, side, side)), optimize=False)


def _integer_elementwise() -> Iterator[Chain]:
    for size in SIZES:
        shape = (1, 16, 4, size // 64)

        def add(n: int, shape: tuple[int, ...] = shape) -> bytes:
            g = Graph()
            first = x = g.qdq(g.input("x", shape))
            for _ in range(n):
                x = g.qdq(g.node("Add", x, first))
            return g.finish(x)

        def sigmoid(n: int, shape: tuple[int, ...] = shape) -> bytes:
            g = Graph()
            x = g.qdq(g.input("x", shape))
            for _ in range(n):
                x = g.qdq(g.node("Sigmoid", x))
            return g.finish(x)

        yield Chain("add", "int8", (size,), add, _image(shape))
        yield Chain("sigmoid", "int8", (size,), sigmoid, _image(shape))


def _by_rows() -> Iterator[Chain]:
    for rows, cols in ((16, 64), (1, 384), (128, 384), (1024, 96), (16, 384)):
        yield _row_chain("layernorm", rows, cols, _normed)
    for rows, cols in ((12, 16), (192, 16), (1536, 128), (1, 1000), (256, 40)):
        yield _row_chain("softmax", rows, cols, lambda g, x, cols: g.node("Softmax", x, axis=-1))  # noqa: ARG005
    for rows, cols in ((16, 384), (128, 384), (1024, 32)):
        yield _row_chain("gather", rows, cols, _gathered)


def _normed(g: Graph, x: str, cols: int) -> str:
    one, zero = g.store(np.ones(cols, np.float32)), g.store(np.zeros(cols, np.float32))
    return g.node("LayerNormalization", x, one, zero, axis=-1)


def _gathered(g: Graph, x: str, cols: int) -> str:  # noqa: ARG001
    """Rows of a table, in an order that comes in; summed up so that each is wanted."""
    return g.node("Gather", x, "order", axis=0)


def _row_chain(kind: str, rows: int, cols: int, link: Callable[[Graph, str, int], str]) -> Chain:
    feeds = _image((rows, cols))

    def build(n: int) -> bytes:
        g = Graph()
        x = g.input("x", (rows, cols))
        if kind == "gather":
            g.input("order", (rows,), "int64")
        for _ in range(n):
            x = link(g, x, cols)
        return g.finish(x)

    if kind == "gather":
        feeds["order"] = np.random.default_rng(2).permutation(rows).astype(np.int64)
    return Chain(kind, "float32", (rows, cols), build, feeds)
