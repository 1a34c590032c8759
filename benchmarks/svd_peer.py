"""Plain truncated SVD: `python -m benchmarks.svd_peer TOOL NAME MODEL FOLDER OUTPUT`; TOOL: `svd-30`, `svd-50`.

Every dense layer and 1 x 1 convolution becomes two at the rank that leaves the same share of each layer's MACs, so that
the percentage asked for is gone from the whole. No data, no compensation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks import feeds, floors


def factor(model: onnx.ModelProto, gone: float, feed: dict[str, np.ndarray]) -> None:
    """Replace layers in place. Raises RuntimeError if the layers that can be factored have too few MACs."""
    arrays = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    sites = [n for n in model.graph.node if _matrix(n, arrays) is not None]
    counted = floors.macs_by_node(model, feed)
    total, dense = sum(counted.values()), sum(counted[n.output[0]] for n in sites)
    share = 1 - gone * total / dense if dense else 0.0
    if share <= 0:
        raise RuntimeError(f"dense layers have {dense} of {total} MACs; {gone:.0%} cannot go")
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        w = _matrix(node, arrays)
        rank = 0 if w is None else int(share * w.size / sum(w.shape))
        nodes += [node] if w is None or rank < 1 else _pair(model, node, w, rank)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {i for n in nodes for i in n.input}
    kept = [w for w in model.graph.initializer if w.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _matrix(node: onnx.NodeProto, arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    """(in, out) weight of a layer that is one matrix product, None for others."""
    w = arrays.get(node.input[1]) if len(node.input) > 1 else None
    if w is None:
        return None
    if node.op_type == "Conv" and w.ndim == 4 and w.shape[2:] == (1, 1) and _attribute(node, "group", 1) == 1:
        return w[:, :, 0, 0].T
    if node.op_type == "Gemm":
        return w.T if _attribute(node, "transB", 0) else w
    return w if node.op_type == "MatMul" and w.ndim == 2 else None


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _pair(model: onnx.ModelProto, node: onnx.NodeProto, w: np.ndarray, rank: int) -> list[onnx.NodeProto]:
    u, s, v = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    left, right = (u[:, :rank] * root).astype(np.float32), (root[:, None] * v[:rank]).astype(np.float32)
    first, second, between = f"{node.output[0]}::in", f"{node.output[0]}::out", f"{node.output[0]}::rank"
    if node.op_type == "Conv":
        left, right = left.T[:, :, None, None], right.T[:, :, None, None]
        strides = [a for a in node.attribute if a.name == "strides"]
        a = helper.make_node("Conv", [node.input[0], first], [between], name=first, kernel_shape=[1, 1])
        a.attribute.extend(strides)
        b = helper.make_node("Conv", [between, second, *node.input[2:]], node.output, name=second, kernel_shape=[1, 1])
    elif node.op_type == "Gemm":
        a = helper.make_node("Gemm", [node.input[0], first], [between], name=first)
        b = helper.make_node("Gemm", [between, second, *node.input[2:]], node.output, name=second)
    else:
        a = helper.make_node("MatMul", [node.input[0], first], [between], name=first)
        b = helper.make_node("MatMul", [between, second], node.output, name=second)
    for name, array in ((first, left), (second, right)):
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    return [a, b]


def main(tool: str, name: str, path: Path, folder: Path, out: Path) -> None:
    """Write OUTPUT."""
    model = onnx.load(path)
    factor(model, int(tool.split("-")[1]) / 100, next(feeds.read(folder, name)))
    onnx.save(model, out)


if __name__ == "__main__":
    if len(sys.argv) != 6:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(Path, sys.argv[3:]))
