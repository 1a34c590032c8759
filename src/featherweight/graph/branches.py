"""Residual branches: what lies between a tensor and the addition that brings it back, found from the graph alone.

`y = x + f(x)` computes something without `f` too, so `f` can be left out (Huang 2016, arXiv:1603.09382, section 3;
Fan 2020, arXiv:1909.11556). No pattern of a block type is looked for: any addition of two tensors of equal shape counts
where one of them is read by what makes the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph.channels.follow import concrete

#: Readers that see a tensor's shape alone.
_METADATA = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class Branch:
    """`skip` is added to what `nodes` make of it, giving `end`; without the branch `skip` stands in the place of `end`.

    `nodes`: those that nothing needs any more then, the addition last among them; `tensors`: stored ones read by them
    alone.
    """

    skip: ir.Value
    end: ir.Value
    nodes: tuple[ir.Node, ...]
    tensors: tuple[ir.Value, ...]

    @property
    def name(self) -> str:
        """What the branch is called as a place of choice, after the addition at its end."""
        return f"branch into {self.nodes[-1].name}"


def residual(model: ir.Model, input_shapes: Mapping[str, tuple[int, ...]] | None = None) -> tuple[Branch, ...]:
    """Every residual branch of a sorted model that holds a stored tensor, in order. The model is not changed.

    `input_shapes` as in `graph.channels.analyse`. Only additions of the main graph whose result is not an output.
    """
    sizes = concrete(model, dict(input_shapes) if input_shapes else None)
    order = {node: i for i, node in enumerate(model.graph)}
    found = []
    for node in order:
        if node.op_type != "Add" or node.domain not in ("", "ai.onnx") or node.outputs[0].is_graph_output():
            continue
        for skip, made in (tuple(node.inputs), tuple(reversed(node.inputs))):
            branch = _branch(node, skip, made, order, sizes)
            if branch is not None:
                found.append(branch)
                break
    return tuple(found)


def leave_out(branches: Iterable[Branch]) -> None:
    """Rewire, in place, so that nothing reads the branches; `surgery.remove_unused` then removes them."""
    # Last to first, so that the skip of each is still what the branch before it made.
    for branch in reversed(list(branches)):
        surgery.replace_uses(branch.end, branch.skip)


def _branch(
    add: ir.Node,
    skip: ir.Value | None,
    made: ir.Value | None,
    order: Mapping[ir.Node, int],
    sizes: Mapping[str, tuple[int, ...]],
) -> Branch | None:
    """The branch that ends in `add` beside `skip`; None if it does not begin at `skip` or holds no stored tensor."""
    if skip is None or made is None or skip is made or surgery.is_constant(skip):
        return None
    shape = sizes.get(skip.name or "")
    if shape is None or shape != sizes.get(add.outputs[0].name or ""):
        return None
    unused = _only_for(add, skip, order)
    if not any(skip in tuple(surgery.reads(node)) for node in unused if node is not add):
        return None
    if not any(node.op_type not in _METADATA for node in skip.consumers() if node in unused and node is not add):
        return None
    nodes = tuple(sorted(unused, key=order.__getitem__))
    stored = {
        v: None
        for node in nodes
        for v in surgery.reads(node)
        if v.is_initializer() and all(reader in unused for reader in v.consumers())
    }
    return Branch(skip, add.outputs[0], nodes, tuple(stored)) if stored else None


def _only_for(add: ir.Node, skip: ir.Value, order: Mapping[ir.Node, int]) -> set[ir.Node]:
    """Nodes of the main graph whose results reach nothing but `add`, and `add`; none of those that make `skip`."""
    unused, waiting = {add}, [add]
    while waiting:
        for value in surgery.reads(waiting.pop()):
            node = value.producer()
            if value is skip or node is None or node in unused or node not in order:
                continue
            if all(not o.is_graph_output() and all(r in unused for r in o.consumers()) for o in node.outputs):
                unused.add(node)
                waiting.append(node)
    return unused
