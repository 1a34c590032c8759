"""How long the best cut of a large graph takes: `python benchmarks/cuts.py [NODES]`.

A network of residual blocks (five nodes each, every block's input jumps over it, and some tensors jump far) with sizes
that shrink with depth, so that the best cut lies inside. Times are of one thread; the target is 2 s for 10,000 nodes.
"""

from __future__ import annotations

import random
import sys
import time

import numpy as np
import onnx_ir as ir

from featherweight.edge import cuts, mincut
from featherweight.edge.mincut import CutCosts

RUNS = 3


def network(nodes: int, seed: int = 0) -> ir.Model:
    """A graph of about `nodes` nodes on (n, 64) tensors."""
    rng = random.Random(seed)
    shape = ir.Shape((8, 64))
    weight = ir.Value(
        name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((64, 64)),
        const_value=ir.Tensor(np.eye(64, dtype=np.float32), name="w"),
    )  # fmt: skip
    first = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    made: list[ir.Node] = []
    last = first
    skips = [first]

    def add(op: str, *inputs: ir.Value) -> ir.Value:
        k = len(made)
        out = ir.Value(name=f"t{k}", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
        made.append(ir.node(op, inputs, outputs=[out], name=f"n{k}"))
        return out

    while len(made) < nodes:
        inner = add("MatMul", add("Relu", add("MatMul", last, weight)), weight)
        last = add("Add", inner, last)
        last = add("Add", last, rng.choice(skips[-40:])) if rng.random() < 0.3 else add("Relu", last)
        skips.append(last)
    graph = ir.Graph([first], [last], nodes=made, initializers=[weight], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def costs(graph: cuts.CutGraph, seed: int = 0) -> CutCosts:
    """A slow device, a fast server, and a link that makes sending dear at first and cheap from the middle on."""
    rng = random.Random(seed)
    n = len(graph.tensors)
    return CutCosts(
        device={i: 10 ** rng.uniform(-2, 0) for i in range(len(graph.blocks))},
        server={i: 10 ** rng.uniform(-3, -1) for i in range(len(graph.blocks))},
        send={t: 10 ** (4 - 5 * min(1.0, 2 * t / n) + rng.uniform(0, 1)) for t in range(n)},
        back=dict.fromkeys(range(n), 1.0),
    )


def main() -> None:
    """Print the time of each step."""
    nodes = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    begun = time.perf_counter()
    model = cuts.prepare(network(nodes))
    prepared = time.perf_counter()
    graph = cuts.cut_graph(model)
    read = time.perf_counter()
    print(f"{len(graph.blocks)} blocks; prepare {prepared - begun:.2f} s, blocks and tensors {read - prepared:.2f} s")
    for seed in range(RUNS):
        priced = costs(graph, seed)
        begun = time.perf_counter()
        cut = mincut.best(graph, priced)
        took = time.perf_counter() - begun
        print(
            f"best cut, costs {seed}: {took:.2f} s; {len(cut.head)} blocks in the head, {len(cut.wire)} tensors cross"
        )


if __name__ == "__main__":
    main()
