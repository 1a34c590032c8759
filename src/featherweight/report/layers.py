"""The per-layer table: which rows are shown, how the rest is summed. Pure: mappings in, rows out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featherweight.report.wording import decision_words

TOP_LAYERS = 12


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, or `count` layers summed. Costs are None where not known."""

    name: str
    op: str
    shape: str
    decision: str
    before_bytes: int
    after_bytes: int
    macs: int
    int8: bool | None
    float_cost_ms: float | None
    why: str
    count: int = 1
    macs_after: int | None = None


def read_layers(raw: Sequence[Mapping[str, Any]]) -> list[Layer]:
    """Report.layers as typed rows; absent keys are unknown, not zero, where that can be said."""
    return [
        Layer(
            str(item.get("layer", "")),
            str(item.get("op", "")),
            _shape_words(item.get("shape", "")),
            decision_words(str(item.get("decision", ""))),
            int(item.get("before_bytes") or 0),
            int(item.get("after_bytes") or 0),
            int(item.get("macs") or 0),
            None if item.get("int8") is None else bool(item["int8"]),
            None if item.get("float_cost_ms") is None else float(item["float_cost_ms"]),
            str(item.get("why") or ""),
            macs_after=None if item.get("macs_after") is None else int(item["macs_after"]),
        )
        for item in raw
        if item.get("kind") not in ("channels", "model")
    ]


@dataclass(frozen=True, slots=True)
class Group:
    """A group of channels that go together, and how many of them stay."""

    name: str
    channels: int
    after: int


def read_whole(raw: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What of Report.layers was decided about the whole model: (what it is about, the decision in words)."""
    return [
        (str(item.get("layer", "")), decision_words(str(item.get("decision", ""))))
        for item in raw
        if item.get("kind") == "model"
    ]


def read_groups(raw: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The groups of Report.layers that were narrowed."""
    return [
        Group(str(item.get("layer", "")), int(item.get("channels") or 0), int(item.get("channels_after") or 0))
        for item in raw
        if item.get("kind") == "channels"
    ]


def chosen(layers: Sequence[Layer], *, everything: bool = False, top: int = TOP_LAYERS) -> list[Layer]:
    """The rows to show: all in order, or the `top` by bytes before and one row that sums the rest.

    A rest of one or two is shown in full: a sum of them would save nothing.
    """
    if everything or len(layers) <= top + 2:
        return list(layers)
    ranked = sorted(range(len(layers)), key=lambda i: (-layers[i].before_bytes, i))
    kept = set(ranked[:top])
    shown = [layer for i, layer in enumerate(layers) if i in kept]
    rest = [layer for i, layer in enumerate(layers) if i not in kept]
    return [*shown, summed(rest, f"{len(rest)} smaller layers")]


def summed(layers: Sequence[Layer], name: str) -> Layer:
    """One row for all of `layers`."""
    costs = [c for layer in layers if (c := layer.float_cost_ms) is not None]
    decisions = dict.fromkeys(layer.decision for layer in layers)
    return Layer(
        name,
        "",
        "",
        next(iter(decisions)) if len(decisions) == 1 else f"{len(decisions)} different" if decisions else "",
        sum(layer.before_bytes for layer in layers),
        sum(layer.after_bytes for layer in layers),
        sum(layer.macs for layer in layers),
        None,
        sum(costs) if costs else None,
        "",
        sum(layer.count for layer in layers),
    )


def by_decision(layers: Sequence[Layer]) -> list[Layer]:
    """One row a decision, by falling bytes before: the model at a glance."""
    return _grouped(layers, lambda layer: layer.decision)


def _grouped(layers: Iterable[Layer], key: Callable[[Layer], str]) -> list[Layer]:
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return sorted((summed(rows, name) for name, rows in groups.items()), key=lambda g: (-g.before_bytes, g.name))


def runs_as(layer: Layer) -> str:
    """'int8', 'float' or '' where unknown."""
    return "" if layer.int8 is None else "int8" if layer.int8 else "float"


def _shape_words(shape: Any) -> str:
    """'32x3x3x3' of a list; text as it is."""
    if isinstance(shape, (list, tuple)):
        return "x".join(str(d) for d in shape)
    return str(shape)
