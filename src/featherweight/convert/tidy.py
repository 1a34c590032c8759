"""What the exporter wrote, made the way the rest expects it: readable names, tied weights once, nothing left over."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from featherweight.graph import expressions, fold, repair, surgery

_SCOPES = "pkg.torch.onnx.name_scopes"
_SYMBOL = re.compile(r"[su]\d+")
_UNSAFE = re.compile(r"[^\w.\-/]+")


def tidy(model: ir.Model, *, parameters: Mapping[str, str], prefix: str, outputs: Sequence[str]) -> None:
    """Clean an exported model in place.

    Args:
        model: as `torch.onnx.export(optimize=False)` makes it.
        parameters: exported name of a parameter to its first name in the module; of two tied ones the same name.
        prefix: of parameter and scope names, to be cut off (the name of a wrapper's only child), or "".
        outputs: readable names of the outputs, in order.
    """
    weights = set(model.graph.initializers)
    _name_nodes(model, prefix)
    _fold_small(model, weights)
    fold.lift_constants(model)
    _fix_reshapes(model)
    fold.fold_into_weights(model)
    _join_recurrent(model, weights)
    surgery.remove_unused(model)
    repair.drop_no_ops(model)
    _tie(model, parameters)
    for value in list(model.graph.initializers.values()):
        name = str(value.name)
        if name in weights:
            _rename(model, value, parameters.get(name, name).removeprefix(prefix))
    _name_outputs(model, outputs)
    for node in surgery.walk(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.doc_string = None
    repair.sort_nodes(model)


def _fold_small(model: ir.Model, weights: set[str]) -> None:
    """Fold constant expressions that read no parameter: shapes, ranges, scalars. Parameters keep name and value."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    def may_fold(node: ir.Node) -> bool | None:
        return False if any(v is not None and v.name in weights for v in node.inputs) else None

    if model.functions:
        common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants_ir(model, should_fold=may_fold)
        optimizer.remove_unused_nodes(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)
    common.CommonSubexpressionEliminationPass()(model)


def _fix_reshapes(model: ir.Model) -> None:
    """Targets that are joined from sizes read at run time become constants: a 0 copies an open axis, one -1 is free.

    Exact, as the exporter records which open axis is which; what follows channels through the graph needs no more.
    """
    namer = surgery.Namer(model)
    for node in list(surgery.walk(model.graph)):
        if node.op_type != "Reshape" or surgery.constant(node.inputs[1]) is not None or node.graph is not model.graph:
            continue
        before, after = node.inputs[0], node.outputs[0]
        if before is None or before.shape is None or after.shape is None:
            continue
        source, wanted = list(map(_dimension, before.shape)), list(map(_dimension, after.shape))
        target = [
            d if isinstance(d, int) else 0 if d is not None and i < len(source) and source[i] == d else -1
            for i, d in enumerate(wanted)
        ]
        if target.count(-1) > 1 or 0 in wanted:
            continue
        shape = surgery.add_initializer(model.graph, namer(f"{node.name}/shape"), np.array(target, np.int64))
        surgery.replace_input(node, 1, shape)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _join_recurrent(model: ir.Model, weights: set[str]) -> None:
    """Gates in ONNX's order, computed once: the exporter slices and joins the module's parameters at each call."""
    named: dict[int, tuple[ir.Node, int, str]] = {}
    for node in surgery.walk(model.graph):
        if node.op_type in ("LSTM", "GRU", "RNN"):
            for place in (1, 2, 3):
                read = _parameters(node.inputs[place], weights) if len(node.inputs) > place else []
                if read:
                    named[len(named)] = (node, place, read[0])
    if not named:
        return
    expressions.fold_expressions(model)
    for node, place, name in named.values():
        value = node.inputs[place]
        if value is not None and value.producer() is None and value.name not in weights:
            _rename(model, value, name)


def _parameters(value: ir.Value | None, weights: set[str]) -> list[str]:
    """The parameters a value is computed from, if it is computed from nothing else, in the order they are read."""
    found: list[str] = []
    waiting = [value]
    while waiting:
        now = waiting.pop()
        producer = now.producer() if now is not None else None
        if now is not None and producer is None:
            if now.name in weights and now.name not in found:
                found.append(str(now.name))
        elif producer is not None:
            waiting += [v for v in reversed(producer.inputs) if v is not None]
    return found if value is not None and surgery.is_constant(value) else []


def _name_nodes(model: ir.Model, prefix: str) -> None:
    """Nodes are called by where they stand in the module: `encoder.layer.0.query/MatMul`."""
    taken: dict[str, int] = {}
    for node in surgery.walk(model.graph):
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))[:-1]
        inner = scopes[-1] if scopes and not scopes[-1].startswith("_empty") else ""
        scope = _UNSAFE.sub("_", f"{inner}.").removeprefix(prefix).strip(".")
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        taken[name] = taken.get(name, -1) + 1
        node.name = f"{name}_{taken[name]}" if taken[name] else name


def _tie(model: ir.Model, parameters: Mapping[str, str]) -> None:
    """Initialisers that are one parameter in the module become one again."""
    first: dict[str, ir.Value] = {}
    for value in list(model.graph.initializers.values()):
        name = parameters.get(str(value.name))
        if name is None:
            continue
        kept = first.setdefault(name, value)
        if kept is not value and _same(kept, value):
            surgery.replace_uses(value, kept)
            surgery.remove_initializer(value)


def _same(a: ir.Value, b: ir.Value) -> bool:
    """One may have been transposed into place and the other not."""
    x, y = surgery.constant(a), surgery.constant(b)
    return x is not None and y is not None and x.shape == y.shape and x.dtype == y.dtype and bool((x == y).all())


def _rename(model: ir.Model, value: ir.Value, name: str) -> None:
    name = _UNSAFE.sub("_", name)
    if value.name == name:
        return
    if name in model.graph.initializers or name in surgery.names(model):
        return  # clashes stay as the exporter named them
    del model.graph.initializers[str(value.name)]
    value.name = name
    model.graph.initializers.add(value)


def _name_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Outputs get their names; one that is an input, a weight or a second name of another gets a node of its own."""
    seen: set[int] = set()
    graph = model.graph
    for i, (value, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        name = _UNSAFE.sub("_", name)
        holder = _holder(model, name)
        if holder is not None and holder is not value:
            holder.name = surgery.fresh_name(model, f"{name}_inner")
        if value.producer() is None or id(value) in seen:
            node = ir.Node("", "Identity", [value], name=surgery.fresh_name(model, f"{name}/Identity"))
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, value.shape
            graph.append(node)
            graph.outputs[i] = node.outputs[0]
        else:
            value.name = name
        seen.add(id(value))


def _holder(model: ir.Model, name: str) -> ir.Value | None:
    """The result of a node that has this name already."""
    return next((o for n in surgery.walk(model.graph) for o in n.outputs if o.name == name), None)


def input_symbols(model: ir.Model) -> dict[str, tuple[int | str | None, ...]]:
    """Shapes of the inputs; sizes are numbers, open axes the exporter's symbols (s77), unknown ones None."""
    return {str(v.name): tuple(_dimension(d) for d in v.shape or ()) for v in model.graph.inputs}


def _dimension(d: int | ir.SymbolicDim) -> int | str | None:
    if isinstance(d, int):
        return d
    text = d.value
    return int(text) if text is not None and text.isdigit() else text


def name_axes(model: ir.Model, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Call the open axes of the inputs as asked, and their symbols everywhere else; other sizes become numbers."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, symbol in enumerate(input_symbols(model)[str(value.name)]):
            label = axes.get(str(value.name), {}).get(axis)
            if isinstance(symbol, str) and label is not None:
                names.setdefault(symbol, label)
    every = [o for n in surgery.walk(model.graph) for o in n.outputs]
    for value in {id(v): v for v in (*model.graph.inputs, *every)}.values():
        if value.shape is not None:
            value.shape = ir.Shape([_named(d, names) for d in value.shape])
    for value in model.graph.inputs:
        dims = list(value.shape or ())
        for axis, label in axes.get(str(value.name), {}).items():
            dims[axis] = ir.SymbolicDim(label)
        value.shape = ir.Shape(dims)


def name_output_axes(
    model: ir.Model, sizes: Sequence[Mapping[str, int]], shapes: Mapping[str, Sequence[tuple[int, ...]]]
) -> bool:
    """Correct axes of outputs that were recorded as numbers but changed between the checks; True if there were any."""
    changed = False
    for value in model.graph.outputs:
        seen = shapes.get(str(value.name), ())
        dims = list(value.shape or ())
        for axis, dim in enumerate(dims):
            observed = [s[axis] for s in seen]
            if isinstance(dim, int) and any(size != dim for size in observed):
                same = [k for k in sizes[0] if [s.get(k) for s in sizes] == observed]
                dims[axis] = ir.SymbolicDim(same[0] if same else None)
                changed = True
        if dims:
            value.shape = ir.Shape(dims)
    return changed


def _named(d: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | ir.SymbolicDim:
    size = _dimension(d)
    if not isinstance(size, str):
        return size if size is not None else ir.SymbolicDim(None)
    return ir.SymbolicDim(_SYMBOL.sub(lambda m: names.get(m[0], m[0]), size))
