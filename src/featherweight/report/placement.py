"""Cuts and halves in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from featherweight.quantities import format_bytes, format_count, format_percent
from featherweight.report.terminal import Column, Grid, heading, indented, lines

if TYPE_CHECKING:
    from featherweight.edge.listing import Check, CutLine, CutList
    from featherweight.edge.split import Split

MOST_CUTS = 24


def cut_parts(found: CutList, *, everything: bool = False) -> list[RenderableType]:
    """The cuts: those no other beats in both bytes and MACs of the head first choice, or all."""
    shown = list(found.cuts) if everything else good_cuts(found)
    made = Grid(
        [
            Column("#", "right"),
            Column("after", cut="middle", least=20),
            Column("wire", "right"),
            Column("int8", "right"),
            Column("of inputs", "right"),
            Column("MACs head", "right"),
            Column("MACs tail", "right"),
            Column("weights head", "right", optional=2),
            Column("tensors", "right", optional=1),
        ]
    )
    for c in shown:
        share = format_percent(c.wire_bytes / found.input_bytes, 0) if found.input_bytes else "-"
        made.add(
            str(c.number), c.after, format_bytes(c.wire_bytes), format_bytes(c.int8_bytes), share,
            format_count(c.head_macs), format_count(c.tail_macs), format_bytes(c.head_weight_bytes), str(len(c.wire)),
        )  # fmt: skip
    sizes = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in found.shapes.items())
    words = [f"bytes and MACs of one call with {sizes}; another size: --shape"]
    if len(shown) < len(found.cuts):
        words.append(
            f"{len(shown)} of {len(found.cuts)} cuts: those that send less than each before them; all: --all-layers"
        )
    if found.unknown:
        words.append(f"the size of {len(found.unknown)} tensors is not known and counted as 0: {found.unknown[0]}, ...")
    title = Text.assemble((found.model, "bold"), f"  {len(found.cuts) + 1} blocks, {format_count(found.macs)} MACs, ")
    title.append(f"inputs {format_bytes(found.input_bytes)}")
    return [title, heading("Cuts"), indented(made), *lines(words, "dim")]


def good_cuts(found: CutList) -> list[CutLine]:
    """Cuts that send fewer bytes than each earlier one; the very first always."""
    kept: list[CutLine] = []
    for c in found.cuts:
        if not kept or c.wire_bytes < kept[-1].wire_bytes:
            kept.append(c)
    return kept[-MOST_CUTS:]


def check_words(check: Check) -> str:
    """How near head and tail come to the whole."""
    words = f"head then tail equal the whole on random inputs: largest difference {check.relative:.1e}"
    if check.as_written is None:
        return words
    return (
        f"{words} with the runtime's fusions, {check.as_written:.1e} without: another rounding may have "
        "moved a value that is quantized at run time"
    )


def split_parts(made: Split, check: Check | None) -> list[RenderableType]:
    """The two files and what passes between them."""
    grid = Grid([Column(""), Column("file", "right"), Column("MACs", "right"), Column("inputs"), Column("outputs")])
    for name, part in zip(("head", "tail"), made.parts, strict=True):
        grid.add(
            name,
            format_bytes(part.size_bytes),
            format_count(part.macs),
            ", ".join(part.inputs),
            ", ".join(part.outputs),
        )
    wire = Grid(
        [Column("tensor", cut="middle", least=20), Column("type"), Column("shape"), Column("bytes", "right"),
         Column("int8", "right"), Column("from")]
    )  # fmt: skip
    for t in made.wire:
        shape = "any" if t.shape is None else "x".join("?" if d is None else str(d) for d in t.shape)
        wire.add(t.name, t.dtype, shape, format_bytes(t.size_bytes), format_bytes(t.int8_bytes), t.source)
    told = []
    if check is not None:
        told = lines([check_words(check)])
    where = Text.assemble("\nwritten to ", (str(made.head.parent), "bold"), ": head.onnx, tail.onnx, split.json")
    return [
        heading("Halves"), indented(grid), heading("On the wire", f"{format_bytes(made.wire_bytes)} a call"),
        indented(wire), *told, where,
    ]  # fmt: skip
