"""Which channels of a model can be removed, in which groups they hang together, and why the others stay."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.core import Note

if TYPE_CHECKING:
    from featherweight.graph.channels import Channels, Group


@dataclass(frozen=True, slots=True)
class GroupLine:
    """One group: `units` that may go, each of `width` channels in the layers that make them.

    `weight_bytes` of all tensors that shrink with it, `macs` a call of all layers that work less.
    """

    name: str
    units: int
    width: int
    makers: tuple[str, ...]
    readers: tuple[str, ...]
    tensors: int
    weight_bytes: int
    macs: int


@dataclass(frozen=True, slots=True)
class ChannelView:
    """All groups of a model, and the layers whose channels stay, with the reason."""

    model: str
    groups: tuple[GroupLine, ...]
    frozen: tuple[Note, ...]
    weight_bytes: int
    macs: int


def channel_view(model: str | Path) -> ChannelView:
    """Follow the channels of a model file; open input sizes count as 2 samples and 32 elsewhere.

    Raises ModelError for an unusable file.
    """
    from featherweight.graph import channels as ch
    from featherweight.graph import cost, io
    from featherweight.graph.normalise import normalise

    path = Path(model)
    graph = normalise(io.load(path), run=None).model
    found = ch.analyse(graph)
    counted = cost.costs(graph)
    macs = {n.name: n.macs or 0 for n in counted.nodes}
    sizes = {
        v.name or "": v.const_value.nbytes
        for g in graph.graphs()
        for v in g.initializers.values()
        if v.const_value is not None
    }
    groups = tuple(_line(found, group, sizes, macs) for group in found.groups)
    return ChannelView(path.name, groups, found.frozen, counted.weight_bytes, counted.macs)


def _line(found: Channels, group: Group, sizes: dict[str, int], macs: dict[str, int]) -> GroupLine:
    return GroupLine(
        name=group.name,
        units=len(group.units),
        width=found.width(group),
        makers=group.makers,
        readers=tuple(dict.fromkeys(r.node for r in group.readings)),
        tensors=len(group.tensors),
        weight_bytes=sum(sizes.get(t, 0) for t in group.tensors),
        macs=sum(macs.get(n, 0) for n in group.nodes),
    )
