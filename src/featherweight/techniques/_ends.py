"""Channels that end where no stored weight reads them: in a sum or mean over channels, or in a product of activations.

There is no reader whose error could be taken, and none that could make up for what goes. What a unit is worth is then
its share of the power that comes in there; where two values are multiplied with each other (queries and keys of one
head, two towers), of the product of both.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph.channels import Channels, Group
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


def shares(channels: Channels, group: Group, ctx: Context) -> tuple[tuple[str, ...], F64]:
    """Tensors that make the group, and each unit's share of the power where it ends, (units,), 1 together.

    Of a product it is the share of the product of both sides. Where nothing was measured all shares are equal; 0
    where nothing ever comes.
    """
    following = channels.following
    makers = tuple(dict.fromkeys(b.tensor for b in following.births if b.node in group.makers))
    of_unit = {int(c): u for u, members in enumerate(group.units) for c in members}
    products: dict[ir.Node, F64] = {}
    for node, index in following.ends:
        value = node.inputs[index]
        power = None if value is None else _powers(channels, value, of_unit, len(group.units), ctx)
        if power is not None:
            products[node] = products[node] * power if node in products else power
    at_ends = [p / p.sum() if p.sum() > 0 else p for p in products.values()]
    if not at_ends:
        return makers, np.full(len(group.units), 1 / len(group.units))
    return makers, np.asarray(np.mean(at_ends, axis=0))


def _powers(channels: Channels, value: ir.Value, of_unit: dict[int, int], units: int, ctx: Context) -> F64 | None:
    """E a^2 of a value summed over each unit's channels, (units,); None if it carries none of them."""
    following = channels.following
    array = following.at.get(value)
    if array is None or not any(int(c) in of_unit for c in channels.classes[array].reshape(-1)):
        return None
    while (maker := value.producer()) is not None and maker.op_type == "Transpose" and maker.inputs[0] in following.at:
        value = maker.inputs[0]
    array = following.at[value]
    axes = [a for a, n in enumerate(array.shape) if n > 1]
    found = ctx.stats.values.get(value.name or "") if ctx.stats is not None else None
    measured = found is not None and len(axes) == 1 and found.axis % array.ndim == axes[0]
    slots = array.reshape(-1)
    each = np.ones(slots.size)
    if (
        measured
        and found is not None
        and found.rows.ndim == 2
        and found.rows.shape[1] == slots.size
        and len(found.rows)
    ):
        each = np.asarray((found.rows.astype(np.float64) ** 2).mean(axis=0))
    power = np.zeros(units)
    for slot, worth in zip(channels.classes[slots].tolist(), each.tolist(), strict=True):
        if slot in of_unit:
            power[of_unit[slot]] += worth
    return power


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
