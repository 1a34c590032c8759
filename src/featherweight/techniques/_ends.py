"""Channels that end where no stored weight reads them: in a sum or mean over channels, or in a product of activations.

There is no reader whose error could be taken, and none that could make up for what goes. What a unit is worth is then
its share of the power of the layers that make it; where two layers are multiplied with each other (queries and keys of
one head, two towers), of the product of both.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph.channels import Channels, Group
from featherweight.graph.weights import weights
from featherweight.techniques import _absorb
from featherweight.techniques._protocol import Context

F64 = npt.NDArray[np.float64]


def ending(channels: Channels, group: Group) -> npt.NDArray[np.bool_]:
    """(units,) True where channels of a unit end in a sum or in a product of activations."""
    following = channels.following
    ended = [following.at[v] for node, i in following.ends if (v := node.inputs[i]) is not None and v in following.at]
    if not ended:
        return np.zeros(len(group.units), bool)
    classes = np.unique(np.concatenate([channels.classes[array].reshape(-1) for array in ended]))
    return np.array([bool(np.isin(members, classes).any()) for members in group.units])


def shares(channels: Channels, group: Group, model: ir.Model, ctx: Context) -> tuple[tuple[str, ...], F64]:
    """Tensors that make the group, and each unit's share of what they give, (units,), 1 together (0 if nothing comes).

    Equal shares where a maker is no layer with a matrix (a table, a recurrent layer).
    """
    known = {w.name: w for w in weights(model)}
    of_unit = {int(c): u for u, members in enumerate(group.units) for c in members}
    powers = []
    for tensor in dict.fromkeys(b.tensor for b in channels.following.births if b.node in group.makers):
        power = np.zeros(len(group.units))
        weight = known.get(tensor)
        for birth in channels.following.births:
            if birth.tensor != tensor or birth.node not in group.makers:
                continue
            each = np.ones(len(birth.slots))
            if weight is not None and weight.matrix_shape[0] * weight.matrix_shape[1] == len(birth.slots):
                second = _absorb.moments(weight, ctx)
                each = _row_powers(weight.to_matrix(weight.array()).astype(np.float64), second)
            for slot, value in zip(channels.classes[birth.slots].tolist(), each.tolist(), strict=True):
                if slot in of_unit:
                    power[of_unit[slot]] += value
        powers.append((tensor, power))
    together = np.prod([p / p.sum() if p.sum() > 0 else p for _, p in powers], axis=0)
    total = float(np.sum(together))
    return tuple(t for t, _ in powers), together / total if total > 0 else np.zeros(len(group.units))


def _row_powers(matrix: F64, found: _absorb.Moments) -> F64:
    """E(w x)^2 of every row of (groups, out, k), as (groups * out,)."""
    if found.matrix is None:
        return np.asarray((matrix**2).sum(axis=2).reshape(-1))
    if found.matrix.ndim == 2:
        return np.asarray(np.einsum("gok,gk->go", matrix**2, found.matrix).reshape(-1))
    return np.asarray(np.einsum("gok,gok->go", matrix @ found.matrix, matrix).reshape(-1))


def silence(model: ir.Model, channels: Channels, removed: Iterable[int]) -> None:
    """Put zeros in place of the removed channels where they end, in a copy of the model that was followed."""
    gone, following = channels.gone(removed), channels.following
    ends = {(following.where(node), i): node.inputs[i] for node, i in following.ends}
    names = surgery.paths(model)
    namer = surgery.Namer(model)
    for node in [n for graph in model.graphs() for n in graph]:
        for index, value in enumerate(node.inputs):
            source = ends.get((names.get(node, node.name or ""), index))
            array = following.at.get(source) if source is not None else None
            graph = node.graph
            if value is None or source is None or array is None or not isinstance(graph, ir.Graph):
                continue
            stays = _narrow(~gone[array])
            if stays.all() or any(following.is_open(source, a) for a, n in enumerate(stays.shape) if n > 1):
                continue
            dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
            mask = surgery.add_initializer(graph, namer(f"{value.name}.stay"), stays.astype(dtype))
            zeroed = surgery.make_node(namer, "Mul", [value, mask], f"{value.name}.left")
            surgery.insert_before(node, [zeroed])
            node.replace_input_with(index, zeroed.outputs[0])


def _narrow(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The mask with size 1 on every axis along which it says the same."""
    for axis in range(mask.ndim):
        first = mask.take([0], axis=axis)
        mask = first if (mask == first).all() else mask
    return mask
