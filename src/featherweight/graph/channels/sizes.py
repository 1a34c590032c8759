"""Concrete sizes of all values: those at which channels are followed, and others that show which axes are open."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import onnx_ir as ir

from featherweight.graph import shapes


def concrete(
    model: ir.Model, given: Mapping[str, tuple[int, ...]] | None, *, other: Hashable = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of all values at concrete input sizes: those given, else 2 samples and 32 for other open axes.

    `other`: an axis of `open_axes` that gets another size: one sample more, or half the length (what fits a length
    mostly fits a shorter one).
    """
    inputs = dict(given or {})
    changed: int | None = None
    for value in _open_inputs(model):
        name, dims = value.name or "", list(value.shape or ())
        sizes = list(
            inputs.get(name) or [d if isinstance(d, int) else (2 if a == 0 else 32) for a, d in enumerate(dims)]
        )
        for a, d in enumerate(dims[: len(sizes)]):
            if other is not None and _axis_key(name, a, d) == other:
                n = sizes[a]
                changed = (n + 1 if a == 0 or n < 2 else n // 2) if changed is None else changed
                sizes[a] = changed
        inputs[name] = tuple(sizes)
    return {name: k.sizes for name, k in shapes.infer(model, inputs).items() if k.sizes is not None}


def open_axes(model: ir.Model) -> list[Hashable]:
    """The model's open axes: names, and where an axis has none its input and number."""
    return list(
        dict.fromkeys(
            key
            for value in _open_inputs(model)
            for a, d in enumerate(value.shape or ())
            if (key := _axis_key(value.name or "", a, d)) is not None
        )
    )


def _open_inputs(model: ir.Model) -> list[ir.Value]:
    return [v for v in model.graph.inputs if v.name and v.shape is not None and not v.is_initializer()]


def _axis_key(name: str, axis: int, dim: int | ir.SymbolicDim) -> Hashable:
    return None if isinstance(dim, int) else dim.value or (name, axis)
