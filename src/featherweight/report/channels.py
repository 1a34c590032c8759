"""A ChannelView in the terminal: the groups one may choose among, then what stays and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from featherweight.quantities import format_bytes, format_count, format_percent
from featherweight.report.terminal import Column, Grid, heading, indented, lines

if TYPE_CHECKING:
    from featherweight.channel_view import ChannelView, GroupLine

TOP = 30


def channel_parts(view: ChannelView, *, everything: bool = False) -> list[RenderableType]:
    """The sections in reading order; `everything` shows all groups and all that stays."""
    shown = view.groups if everything else view.groups[:TOP]
    made = Grid(
        [
            Column("channels of", cut="middle"),
            Column("units", "right"),
            Column("each", "right"),
            Column("made by", "right", optional=1),
            Column("read by", "right", optional=1),
            Column("weights", "right"),
            Column("MACs", "right"),
        ]
    )
    for group in shown:
        made.add(*_cells(view, group))
    more = len(view.groups) - len(shown)
    detail = "what is in one group is chosen among; a unit goes as a whole" if view.groups else "nothing can go"
    parts: list[RenderableType] = [
        Text.assemble((view.model, "bold"), f"  {len(view.groups)} groups of removable channels"),
        heading("Groups", detail),
        indented(made),
    ]
    if more > 0:
        parts.append(Text(f"  and {more} more (--all-layers)"))
    if view.frozen:
        stays = reasons(view)
        parts.append(heading("What stays", "and why"))
        parts.extend(lines(stays if everything else stays[:TOP]))
        if len(stays) > TOP and not everything:
            parts.append(Text(f"  and {len(stays) - TOP} more (--all-layers)"))
    return parts


def reasons(view: ChannelView) -> list[str]:
    """One line a reason, with the layers it holds for."""
    places: dict[str, list[str]] = {}
    for note in view.frozen:
        places.setdefault(note.text, []).append(note.where)
    return [
        f"{where[0]}{f' and {len(where) - 1} layers more' if len(where) > 1 else ''}: {text}"
        for text, where in places.items()
    ]


def _cells(view: ChannelView, group: GroupLine) -> tuple[str, ...]:
    share = format_percent(group.macs / view.macs, 0) if view.macs else ""
    return (
        group.name.removeprefix("channels of "),
        str(group.units),
        str(group.width),
        str(len(group.makers)),
        str(len(group.readers)),
        format_bytes(group.weight_bytes),
        f"{format_count(group.macs)} {share}".strip(),
    )
