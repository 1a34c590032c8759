"""Channels that end where no stored weight reads them: in a sum or mean over channels, or in a product of activations.

There is no reader whose error could be taken, and none that could make up for what goes. What a unit is worth is then
its share of the power that comes in there; where two values are multiplied with each other (queries and keys of one
head, two towers), of the product of both.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.graph.channels import Channels, Group
from featherweight.techniques._protocol import Context

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


def ending(channels: Channels, group: Group) -> npt.NDArray[np.bool_]:
    """(units,) True where channels of a unit end in a sum or in a product of activations."""
    owners, following = _owners(channels, group), channels.following
    found = np.zeros(len(group.units), bool)
    for node, index in following.ends:
        here = owners[channels.classes[following.at[node.inputs[index]]]]  # type: ignore[index]  # what ends is carried
        found[here[here >= 0]] = True
    return found


def shares(channels: Channels, group: Group, ctx: Context) -> tuple[tuple[str, ...], F64]:
    """Tensors that make the group, and each unit's share of the power where it ends, (units,), 1 together.

    Of a product it is the share of the product of both sides. Where nothing was measured all shares are equal; 0
    where nothing ever comes.
    """
    owners, following = _owners(channels, group), channels.following
    makers = tuple(dict.fromkeys(b.tensor for b in following.births if b.node in group.makers))
    products: dict[ir.Node, F64] = {}
    for node, index in following.ends:
        power = _powers(channels, node.inputs[index], owners, len(group.units), ctx)
        if power is not None:
            products[node] = products.get(node, 1.0) * power
    at_ends = [p / p.sum() if p.sum() > 0 else p for p in products.values()]
    if not at_ends:
        return makers, np.full(len(group.units), 1 / len(group.units))
    return makers, np.asarray(np.mean(at_ends, axis=0))


def _owners(channels: Channels, group: Group) -> I64:
    """(slots,) the unit of the group that each class of slots belongs to, -1 for none."""
    owners = np.full(len(channels.classes), -1, np.int64)
    for unit, members in enumerate(group.units):
        owners[members] = unit
    return owners


def _powers(channels: Channels, value: ir.Value | None, owners: I64, units: int, ctx: Context) -> F64 | None:
    """E a^2 of a value summed over each unit's channels, (units,); None if it carries none of them."""
    at = channels.following.at
    while value is not None and (maker := value.producer()) is not None and maker.op_type == "Transpose":
        value = maker.inputs[0]  # summaries know the axis of channels where layers make them
    if value is None or value not in at:
        return None
    slots = at[value].reshape(-1)
    owner = owners[channels.classes[slots]]
    if (owner < 0).all():
        return None
    axes = [a for a, n in enumerate(at[value].shape) if n > 1]
    found = ctx.stats.values.get(value.name or "") if ctx.stats is not None else None
    each = np.ones(slots.size)
    if found is not None and [found.axis % at[value].ndim] == axes and found.rows.shape[1:] == each.shape:
        each = np.asarray((found.rows.astype(np.float64) ** 2).mean(axis=0)) if len(found.rows) else each
    return np.bincount(owner[owner >= 0], each[owner >= 0], minlength=units).astype(np.float64)
