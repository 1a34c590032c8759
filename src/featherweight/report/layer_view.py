"""A RankView and a PruneView in the terminal: what low rank, and fewer input channels, would leave of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from featherweight.core import Note
from featherweight.quantities import format_bytes, format_count, format_percent
from featherweight.report.terminal import Column, Grid, heading, indented, lines
from featherweight.report.text import note_parts

if TYPE_CHECKING:
    from featherweight.layer_view import PruneLine, PruneView, RankAt, RankLine, RankView

TOP = 30


def rank_parts(view: RankView, *, everything: bool = False) -> list[RenderableType]:
    """Ranks, break-even and what would be saved; `everything` shows all weights."""
    energies = [at.energy for at in view.lines[0].at] if view.lines else []
    made = Grid(
        [
            Column("weight", cut="middle", least=20),
            Column("as a matrix", optional=1),
            *(Column(f"rank {_energy(e)}", "right") for e in energies),
            Column("pays up to", "right"),
            Column("bytes", "right", optional=2),
            Column("MACs", "right", optional=3),
            Column("low rank"),
        ]
    )
    for line in view.lines if everything else view.lines[:TOP]:
        cells = [str(at.rank) for at in line.at]
        macs = "-" if line.macs is None else format_count(line.macs)
        made.add(
            line.name, _matrix(line), *cells, str(line.break_even), format_bytes(line.size_bytes), macs, verdict(line)
        )
    source = f"of the outputs, about the mean, on {view.samples} samples" if view.samples else "of the weights alone"
    words = [
        "Two factors of a rank take fewer bytes and operations up to the rank in `pays up to`.",
        *([] if view.samples else ["With --data the energy is that of the layer's output, which needs fewer ranks."]),
    ]
    title = f"  low rank could pay for {paying_words(view)}"
    head = heading("Rank that keeps a share of the energy", source)
    return _assembled(view.model, title, head, made, words, len(view.lines), view.notes, everything=everything)


def prune_parts(view: PruneView, *, everything: bool = False) -> list[RenderableType]:
    """Errors at each share of removed channels; `everything` shows all weights."""
    shares = [at.share for at in view.lines[0].at] if view.lines else []
    made = Grid(
        [
            Column("weight", cut="middle", least=20),
            Column("used as", optional=2),
            Column("inputs", "right"),
            *(Column(f"-{format_percent(s, 0)}", "right") for s in shares),
            Column("bytes", "right", optional=1),
            Column("MACs", "right", optional=3),
        ]
    )
    for line in view.lines if everything else view.lines[:TOP]:
        cells = [error_words(at.error) for at in line.at]
        macs = "-" if line.macs is None else format_count(line.macs)
        made.add(line.name, line.role, _inputs(line), *cells, format_bytes(line.size_bytes), macs)
    words = [
        "Error: E||dy||^2 / E||y - mean y||^2 of the layer alone, the cheapest channels gone, the others re-solved.",
        "Channels that several layers share go together: --channels shows the groups.",
    ]
    title = f"  sensitivity of {len(view.lines)} weights, {view.samples} samples"
    head = heading("Output error without a share of the input channels", "small: the layer has inputs to spare")
    return _assembled(view.model, title, head, made, words, len(view.lines), view.notes, everything=everything)


def paying_words(view: RankView) -> str:
    """'34 of 50 weights at 90% of the energy, 3 at 99%'."""
    if not view.lines:
        return "no weight: there is none with a rank"
    asked = [at.energy for at in view.lines[0].at]
    (energy, n), *more = [(e, sum(line.pays_at >= e for line in view.lines)) for e in asked]
    first = f"{n} of {len(view.lines)} weights at {_energy(energy)} of the energy"
    return ", ".join([first, *(f"{m} at {_energy(e)}" for e, m in more)])


def verdict(line: RankLine) -> str:
    """'at 99%: 45% left', the most energy at which low rank pays, or 'no'."""
    best = next((at for at in reversed(line.at) if at.energy == line.pays_at), None)
    if best is None:
        return "no"
    return f"at {_energy(best.energy)}: {format_percent(_left(line, best), 0)} left"


def error_words(error: float) -> str:
    """'4.2%', '0.03%', '<0.01%'."""
    if error < 5e-5:
        return "<0.01%" if error > 0 else "0"
    return format_percent(error, 2 if error < 0.01 else 1 if error < 0.1 else 0)


def _left(line: RankLine, at: RankAt) -> float:
    return at.size_bytes / line.size_bytes if line.size_bytes else 0.0


def _energy(share: float) -> str:
    return f"{100 * share:g}%"


def _matrix(line: RankLine) -> str:
    one = f"{line.out}x{line.columns}"
    return one if line.groups == 1 else f"{line.groups} of {one}"


def _inputs(line: PruneLine) -> str:
    return str(line.channels) if line.width == 1 else f"{line.channels} of {line.width}"


def _assembled(
    model: str, title: str, head: RenderableType, made: Grid, words: Sequence[str], count: int, notes: Sequence[Note],
    *, everything: bool,
) -> list[RenderableType]:  # fmt: skip
    parts: list[RenderableType] = [Text.assemble((model, "bold"), title), head, indented(made)]
    if count > TOP and not everything:
        parts.append(Text(f"  and {count - TOP} smaller ones (--all-layers)", style="dim"))
    return [*parts, *lines(list(words), "dim"), *note_parts(notes, everything=everything)]
