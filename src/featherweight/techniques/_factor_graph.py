"""One layer replaced by a chain of layers: attributes of each link, operations and bytes, and the edit itself.

The last link is the layer's own node, so that the names of the node and of its output, its bias and whatever reads
it stay. No link before it has a bias: padding with zeros then means the same in front of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Site
from featherweight.graph import shapes, surgery
from featherweight.graph.weights import STORED_DTYPE, Weight, WeightUse
from featherweight.stats.reads import window_of
from featherweight.stats.windows import Window
from featherweight.techniques import _place
from featherweight.techniques._protocol import Context

F32 = npt.NDArray[np.float32]
Shape = tuple[int, ...]
#: Size of a spatial axis that nothing tells.
USUAL_SIZE = 56


@dataclass(frozen=True)
class Link:
    """One layer of the chain. `left`: its weight is the left operand; `axes`: spatial axes it takes to their output
    size; `keeps`: attributes of the original node that stay on it.
    """

    op_type: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    left: bool = False
    axes: tuple[int, ...] = ()
    keeps: tuple[str, ...] = ()


def window(use: WeightUse, weight: Weight) -> Window:
    """The geometry of a convolution; the kernel is in the layout that the node reads."""
    return window_of(use.node, weight.seen_shape(use)[2:], use.role == "conv_transpose")


def point_link(rank: int, group: int) -> Link:
    """A convolution of kernel 1 with `rank` spatial axes."""
    return Link("Conv", {"kernel_shape": [1] * rank, "group": group})


def conv_link(of: Window, group: int, axes: Sequence[int], keeps: tuple[str, ...] = ()) -> Link:
    """The part of a convolution that acts along some of its spatial axes: their kernel, stride, padding, dilation."""
    rank = len(of.kernel)

    def along(values: Sequence[int], other: int) -> list[int]:
        return [values[a] if a in axes else other for a in range(rank)]

    attributes: dict[str, Any] = {"kernel_shape": along(of.kernel, 1), "group": group}
    if any(s != 1 for s in along(of.strides, 1)):
        attributes["strides"] = along(of.strides, 1)
    if any(d != 1 for d in along(of.dilations, 1)):
        attributes["dilations"] = along(of.dilations, 1)
    if of.auto_pad not in ("NOTSET", ""):
        attributes["auto_pad"] = of.auto_pad
    elif any(of.pads):
        attributes["pads"] = along(of.pads[:rank], 0) + along(of.pads[rank:], 0)
    if of.transposed and of.output_padding:
        attributes["output_padding"] = list(of.output_padding)
    if of.transposed and of.output_shape:
        attributes["output_shape"] = list(of.output_shape)
    return Link("ConvTranspose" if of.transposed else "Conv", attributes, axes=tuple(axes), keeps=keeps)


def input_sizes(model: ir.Model, use: WeightUse, rank: int, of: Window, ctx: Context) -> Shape:
    """Spatial sizes of a convolution's input: inferred, else observed, else USUAL_SIZE times the stride."""
    known = ctx.cache.get("factor shapes")
    if known is None or known[0] is not model:
        known = ctx.cache["factor shapes"] = (model, shapes.infer(model, dict(ctx.input_shapes) or None))
    value = use.input_value
    name = (value.name or "") if value is not None else ""
    inferred = known[1].get(name)
    listed: list[Any] = [
        inferred.shape if inferred is not None else None,
        ctx.input_shapes.get(name),
        ctx.stats.values[name].shape if ctx.stats is not None and name in ctx.stats.values else None,
        value.shape if value is not None else None,
    ]
    for shape in listed:
        sizes = tuple(d for d in (shape or ())[2:] if isinstance(d, int))
        if len(sizes) == rank:
            return sizes
    return tuple(USUAL_SIZE * s for s in of.strides)


def work(
    model: ir.Model,
    weight: Weight,
    arrays: Sequence[Shape],
    links: Callable[[WeightUse], Sequence[Link]],
    ctx: Context,
) -> float:
    """Multiply-accumulates of the chains over those of the nodes they replace, all uses together."""
    before = after = 0
    for use in weight.uses:
        if use.role not in ("conv", "conv_transpose"):
            before += math.prod(weight.shape)
            after += sum(map(math.prod, arrays))
            continue
        of = window(use, weight)
        start = input_sizes(model, use, len(of.kernel), of, ctx)
        sizes, end = list(start), of.layout(start)[1]
        own = math.prod(start if use.role == "conv_transpose" else end)
        before += own * math.prod(weight.shape)
        for shape, link in zip(arrays, links(use), strict=True):
            if link.op_type == "ConvTranspose":
                after += math.prod(sizes) * math.prod(shape)
            for a in link.axes:
                sizes[a] = end[a]
            if link.op_type == "Conv":
                after += math.prod(sizes) * math.prod(shape)
    return after / before if before else 1.0


def value_bytes(weight: Weight) -> int:
    """Bytes of one stored value of the weight."""
    return max(1, weight.size_bytes // max(math.prod(weight.shape), 1))


def size_bytes(weight: Weight, arrays: Sequence[Shape]) -> int:
    """Bytes of the factors, their names and the extra nodes."""
    values = sum(map(math.prod, arrays)) * value_bytes(weight)
    names = sum(len(weight.name) + 2 * len(shape) + 22 for shape in arrays) - len(weight.name) - 16
    nodes = 0
    for use in weight.uses:
        made = len(use.node.outputs[0].name or "")
        nodes += (len(arrays) - 1) * (len(weight.name) + len(use.node.name or "") + 4 * made + 90)
    return values + names + nodes


def replace(
    model: ir.Model, weight: Weight, arrays: Sequence[F32], links: Callable[[WeightUse], Sequence[Link]]
) -> tuple[Site, ...]:
    """Put the chain in the place of every use, in place of the graph; one site a factor that is worth encoding."""
    namer = surgery.Namer(model)
    stored = [_store(weight, array, namer(f"{weight.name}.factor{i}")) for i, array in enumerate(arrays)]
    nodes: list[list[str]] = [[] for _ in arrays]
    read = [use.node.inputs[use.index] for use in weight.uses]
    for use in weight.uses:
        prefix = use.path.removesuffix(use.node.name or use.node.op_type)
        for i, path in enumerate(_rewire(use, stored, links(use), namer)):
            nodes[i].append(prefix + path)
    for value in read:
        _drop(value)
    return tuple(
        Site(value.name or "", "weight", (value.name or "",), tuple(where), array.size * value_bytes(weight))
        for value, where, array in zip(stored, nodes, arrays, strict=True)
        if array.size >= _place.MIN_ELEMENTS
    )


def _drop(value: ir.Value | None) -> None:
    """Remove a value that nobody reads any more, and what only it was made from."""
    while value is not None and not list(value.uses()) and not value.is_graph_output():
        node = value.producer()
        if node is None:
            if value.is_initializer():
                surgery.remove_initializer(value)
            return
        if node.graph is None:
            return
        source = node.inputs[0] if node.inputs else None
        surgery.remove_node(node)
        value = source


def _store(weight: Weight, array: F32, name: str) -> ir.Value:
    narrow = weight.value.metadata_props.get(STORED_DTYPE)
    if narrow:
        # The file will hold the narrower type: round now, so that what is measured is what is stored.
        array = array.astype(ir.DataType[narrow].numpy()).astype(np.float32)
    value = surgery.add_initializer(weight.graph, name, array.astype(weight.dtype), dtype=weight.value.dtype)
    if narrow:
        value.metadata_props[STORED_DTYPE] = narrow
    return value


def _rewire(use: WeightUse, stored: Sequence[ir.Value], links: Sequence[Link], namer: surgery.Namer) -> list[str]:
    """Insert all links but the last before the node and make the node the last; names of the nodes in order."""
    node, x = use.node, use.input_value
    own = dict(node.attributes)
    made = node.outputs[0]
    where = []
    for i, (value, link) in enumerate(zip(stored[:-1], links[:-1], strict=True)):
        fresh = surgery.make_node(
            namer,
            link.op_type,
            [value, x] if link.left else [x, value],
            f"{made.name}.factor{i}",
            attributes=_attributes(link, own),
        )
        if x is not None and x.dtype is not None:
            fresh.outputs[0].type = ir.TensorType(x.dtype)
        surgery.insert_before(node, [fresh])
        where.append(fresh.name or "")
        x = fresh.outputs[0]
    last = links[-1]
    node.op_type = last.op_type
    node.attributes.clear()
    for name, attribute in _attributes(last, own).items():
        node.attributes[name] = (
            attribute if isinstance(attribute, ir.Attr) else ir.convenience.convert_attribute(name, attribute)
        )
    surgery.replace_input(node, 0, stored[-1] if last.left else x)
    surgery.replace_input(node, 1, x if last.left else stored[-1])
    return [*where, node.name or node.op_type]


def _attributes(link: Link, own: Mapping[str, ir.Attr]) -> dict[str, Any]:
    kept = {name: own[name] for name in link.keeps if name in own}
    return {**kept, **link.attributes}
