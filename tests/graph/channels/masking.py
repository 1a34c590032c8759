"""The oracle of a cut: the same model with the removed channels set to zero wherever something sums over them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from featherweight.graph import channels as ch
from featherweight.graph import surgery
from featherweight.graph.channels.follow import CONTRACTIONS, Following

SUMS = ("ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceMax", "ReduceMin")


def masked(model: ir.Model, found: ch.Channels, removed: Iterable[int]) -> ir.Model:
    """A copy of `model` (the one analysed) in which layers and sums read zeros in place of the removed channels."""
    gone = found.gone(removed)
    following = found.following
    own = {v.name: array for v, array in following.at.items()}
    copy = surgery.copy_model(model)
    namer = surgery.Namer(copy)
    for graph in list(copy.graphs()):
        for node in list(graph):
            if node.op_type not in CONTRACTIONS and node.op_type not in SUMS:
                continue
            for index, value in enumerate(node.inputs):
                array = own.get(value.name) if value is not None and not value.is_initializer() else None
                if value is None or array is None or not gone[array].any():
                    continue
                stay = surgery.add_initializer(graph, namer("mask"), (~gone[array]).astype(np.float32))
                zeroed = surgery.make_node(namer, "Mul", [value, stay], "masked")
                surgery.insert_before(node, [zeroed])
                node.replace_input_with(index, zeroed.outputs[0])
            if node.op_type in ("LSTM", "GRU", "RNN"):
                _mask_recurrent(node, following, gone, graph, namer)
    return copy


def _mask_recurrent(
    node: ir.Node, following: Following, gone: np.ndarray, graph: ir.Graph, namer: surgery.Namer
) -> None:
    births = [b.slots for b in following.births if b.node == (node.name or "")]
    if not births:
        return
    stay = ~gone[np.stack(births)]
    r = np.asarray(surgery.constant(node.inputs[2]))
    made = surgery.add_initializer(graph, namer("masked_r"), (r * stay[:, None, :]).astype(r.dtype))
    node.replace_input_with(2, made)


def chosen(found: ch.Channels, ratio: float, rng: np.random.Generator) -> list[int]:
    """Classes of a random `ratio` of each group's units, never all of a floor."""
    removed: list[int] = []
    for group in found.groups:
        n = len(group.units)
        out = list(rng.permutation(n)[: min(round(ratio * n), n - 1)])
        gone = set(out)
        for floor in group.floors:
            if gone.issuperset(floor.tolist()):
                gone.discard(int(floor[0]))
        for u in gone:
            removed.extend(group.units[u].tolist())
    return removed
