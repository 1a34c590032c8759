"""Repairs that change no number: names, opset imports, order, inputs, stale shapes, functions, no-ops.

Each function edits the model it is given and returns what it did in words, '' if nothing.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from featherweight.errors import ModelError
from featherweight.graph import shapes, surgery

_STANDARD = ("", "ai.onnx")


def fix_names(model: ir.Model) -> str:
    """Give every node and every tensor of the whole model its own name; inputs and outputs keep theirs."""
    values = _fix_value_names(model)
    nodes = 0
    used = {n.name for g in model.graphs() for n in g if n.name}
    seen: set[str] = set()
    for graph in model.graphs():
        for node in graph:
            if node.name and node.name not in seen:
                seen.add(node.name)
                continue
            # An unnamed node is known by what it makes, which stays the same from run to run.
            hint = node.name or next((o.name for o in node.outputs if o.name), node.op_type)
            name, i = hint, 1
            while name in used or name in seen:
                i += 1
                name = f"{hint}_{i}"
            node.name = name
            seen.add(name)
            nodes += 1
    return ", ".join(f"{n} {what}" for n, what in ((nodes, "nodes"), (values, "tensors")) if n)


def _fix_value_names(model: ir.Model) -> int:
    namer = surgery.Namer(model)
    seen: set[str] = set()
    changed = 0
    for graph in model.graphs():
        made = [*graph.inputs, *(v for v in graph.initializers.values() if not v.is_graph_input())]
        made += [o for node in graph for o in node.outputs]
        for value in made:
            if not value.name and not list(value.uses()) and not value.is_graph_output():
                continue
            if not value.name or value.name in seen:
                value.name = namer(value.name or "value")
                changed += 1
            seen.add(value.name)
    return changed


def merge_opsets(model: ir.Model) -> str:
    """Write the default domain only as '', in the imports and on the nodes."""
    changed = 0
    holders: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for holder in holders:
        imports = holder.opset_imports
        if "ai.onnx" in imports:
            version = imports.pop("ai.onnx")
            if imports.setdefault("", version) != version:
                raise ModelError(
                    f"one opset version per domain is allowed, but the default one is imported as {imports['']} and "
                    f"{version}; export the model again"
                )
            changed += 1
        for node in surgery.walk(holder):
            if node.domain == "ai.onnx":
                node.domain = ""
                changed += 1
    return "written as ''" if changed else ""


def sort_nodes(model: ir.Model) -> str:
    """Order nodes topologically. Raises ModelError on a cycle."""
    before = [list(g) for g in model.graphs()]
    surgery.sort(model)
    after = [list(g) for g in model.graphs()]
    return "sorted" if before != after else ""


def demote_inputs(model: ir.Model) -> str:
    """Initializers that are also listed as inputs (IR version 3) become plain constants."""
    listed = [v for v in model.graph.inputs if v.is_initializer()]
    if listed:
        common.RemoveInitializersFromInputsPass()(model)
        model.ir_version = max(model.ir_version or 4, 4)
    return f"{len(listed)} weights are no longer inputs" if listed else ""


def inline_functions(model: ir.Model) -> str:
    """Put the bodies of model-local functions where they are called."""
    if not model.functions:
        return ""
    n = len(model.functions)
    for function in model.functions.values():
        _adopt_opset(model, function)
    try:
        common.InlinePass()(model)
    except (ValueError, ir.passes.PassError, ir.passes.InvariantError) as e:
        raise ModelError(f"the model's functions cannot be inlined ({e}); export it with inlined functions") from e
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    return f"{n} inlined"


def _adopt_opset(model: ir.Model, function: ir.Function) -> None:
    """Let a function import the model's opset where its operators mean the same there."""
    theirs, ours = function.opset_imports.get(""), model.opset_imports.get("")
    if theirs is None or ours is None or theirs == ours:
        return
    for node in surgery.walk(function):
        if node.domain in _STANDARD and not _means_the_same(node.op_type, theirs, ours):
            return
    function.opset_imports[""] = ours


def _means_the_same(op_type: str, a: int, b: int) -> bool:
    """Same definition, or both with the same inputs and attributes (newer versions then only add types)."""
    try:
        old, new = (onnx.defs.get_schema(op_type, version, "") for version in (a, b))
    except onnx.defs.SchemaError:
        return False
    if old.since_version == new.since_version:
        return True
    same_form = [i.name for i in old.inputs] == [i.name for i in new.inputs] and set(old.attributes) == set(
        new.attributes
    )
    return same_form and min(a, b) >= 13 and op_type != "GroupNormalization"


def renew_shapes(model: ir.Model) -> str:
    """Forget recorded types and shapes of inner tensors and infer them again; they may be stale.

    The interface (inputs and outputs of the model) and the formal parameters of sub-graphs are kept as declared.
    """
    inner = [o for g in model.graphs() for n in g for o in n.outputs if not o.is_graph_output()]
    before = [(v, v.type, v.shape) for v in inner]
    for value in inner:
        value.type, value.shape = None, None
    known = shapes.infer(model)
    stale = 0
    for value, type_, shape in before:
        found = known.get(value.name or "")
        if found is not None:
            value.type, value.shape = found.type, found.shape
        producer = value.producer()
        if value.type is None and producer is not None and producer.domain not in _STANDARD:
            value.type = type_
        stale += shape is not None and value.shape != shape
    return f"{stale} recorded shapes replaced or dropped" if stale else ""


def drop_no_ops(model: ir.Model) -> str:
    """Take out Identity and inference-time Dropout; the interface keeps its names."""
    dropped = 0
    for graph in model.graphs():
        for node in list(graph):
            if _is_no_op(node) and _bypass(node, graph):
                dropped += 1
    return f"{dropped} taken out" if dropped else ""


def _is_no_op(node: ir.Node) -> bool:
    if node.domain not in _STANDARD or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type == "Dropout":
        training = node.inputs[2] if len(node.inputs) > 2 else None
        off = training is None or ((a := surgery.constant(training)) is not None and not a.any())
        return off and not any(list(o.uses()) or o.is_graph_output() for o in node.outputs[1:])
    return node.op_type == "Identity"


def _bypass(node: ir.Node, graph: ir.Graph) -> bool:
    source, output = node.inputs[0], node.outputs[0]
    if source is None:
        return False
    if output.is_graph_output():
        # The output's name must survive: only a tensor made here and not yet an output can take it.
        if source.producer() is None or source.graph is not graph or source.is_graph_output():
            return False
        if source.type is not None and output.type is not None and source.type != output.type:
            return False
    surgery.replace_uses(output, source, keep=[node])
    surgery.remove_node(node)
    return True


def drop_unused(model: ir.Model) -> str:
    """Drop what no output depends on, and opset imports nobody uses."""
    n = surgery.remove_unused(model)
    common.RemoveUnusedOpsetsPass()(model)
    return f"{n} nodes and weights dropped" if n else ""
