"""The console and tables all terminal reports share. Text is never read as markup: names hold brackets."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

MAX_WIDTH = 120
INDENT = 2
GAP = 2
TAILS = (2 / 3, 1 / 2, 1 / 3, 5 / 6, 1 / 6)


def console(*, stderr: bool = False) -> Console:
    """The console of a command: at most MAX_WIDTH wide, colours only on a terminal."""
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if made.width > MAX_WIDTH:
        made.width = MAX_WIDTH
    return made


def to_text(parts: Iterable[RenderableType], *, width: int = 80) -> str:
    """Plain text of renderables at `width` columns, without colour codes or trailing blanks."""
    file = io.StringIO()
    out = Console(
        file=file, width=width, highlight=False, markup=False, emoji=False, color_system=None, legacy_windows=False
    )
    for part in parts:
        out.print(part, soft_wrap=_whole(part))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def show(parts: Iterable[RenderableType]) -> None:
    """Print renderables on stdout; characters the terminal cannot show are replaced, never an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    out = console()
    if not out.is_terminal:
        sys.stdout.write(to_text(parts, width=out.width))
        return
    for part in parts:
        out.print(part, soft_wrap=_whole(part))


def _whole(part: RenderableType) -> bool:
    """True for a line that must not be broken, such as a path to be copied: the terminal may, we do not."""
    return isinstance(part, Text) and bool(part.no_wrap)


def heading(text: str, detail: str = "") -> Text:
    """A section's heading with a blank line above."""
    return Text.assemble("\n", (text, "bold"), (f"  {detail}" if detail else "", "dim"))


def indented(part: RenderableType) -> Padding:
    """`part` moved right of its heading."""
    return Padding(part, (0, 0, 0, INDENT), expand=False)


def lines(texts: Iterable[str], style: str = "") -> list[RenderableType]:
    """Wrapped, indented lines."""
    return [indented(Text(t, style=style)) for t in texts]


def bullets(texts: Iterable[Text]) -> RenderableType:
    """A list whose wrapped lines hang under their text."""
    made = Table.grid(padding=(0, 1, 0, 0))
    made.add_column(style="dim")
    made.add_column()
    for text in texts:
        made.add_row("-", text)
    return indented(made)


@dataclass(frozen=True, slots=True)
class Column:
    """How a column behaves when the table is too wide: first the `optional` ones go, then `cut` ones give way.

    `optional`: 0 stays always, of the others the highest goes first. `cut`: text is shortened at its 'end' or in its
    'middle' (node paths differ at both ends), down to `least` characters.
    """

    name: str
    align: Literal["left", "right"] = "left"
    cut: Literal["", "end", "middle"] = ""
    least: int = 12
    optional: int = 0


@dataclass
class Grid:
    """A table that fits the width it is given without wrapping; a row of None is a rule."""

    columns: Sequence[Column]
    rows: list[tuple[Sequence[str | Text], str] | None] = field(default_factory=list)
    header: bool = True

    def add(self, *cells: str | Text, style: str = "") -> None:
        """Add a row, one cell a column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"a row needs {len(self.columns)} cells, but got {len(cells)}")
        self.rows.append((cells, style))

    def rule(self) -> None:
        """Add a line across."""
        self.rows.append(None)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay out for the width at hand."""
        kept, widths = self._fit(options.max_width)
        line = "─" if not options.ascii_only else "-"
        span = min(sum(widths) + GAP * (len(widths) - 1), options.max_width)
        rule = Text(line * span, style="dim")
        tails = [self._tail(i, width) for i, width in zip(kept, widths, strict=True)]
        if self.header:
            yield self._line(kept, widths, tails, [Text(self.columns[i].name) for i in kept], "dim")
            yield rule
        for row in self.rows:
            yield rule if row is None else self._line(kept, widths, tails, [row[0][i] for i in kept], row[1])

    def _natural(self, i: int) -> int:
        """Widest cell of column i."""
        cells = [cell_len(str(row[0][i])) for row in self.rows if row is not None]
        return max([cell_len(self.columns[i].name) if self.header else 0, *cells])

    def _fit(self, width: int) -> tuple[list[int], list[int]]:
        """The columns that stay and their widths."""
        kept = list(range(len(self.columns)))
        natural = [self._natural(i) for i in kept]
        least = [min(n, c.least) if c.cut else n for n, c in zip(natural, self.columns, strict=True)]
        while sum(least[i] + GAP for i in kept) - GAP > width:
            going = max(kept, key=lambda i: self.columns[i].optional)
            if not self.columns[going].optional:
                break
            kept.remove(going)
        widths = [natural[i] for i in kept]
        excess = sum(widths) + GAP * (len(widths) - 1) - width
        while excess > 0:
            giving = max(range(len(kept)), key=lambda k: widths[k] - least[kept[k]])
            if widths[giving] <= least[kept[giving]]:
                break
            widths[giving] -= 1
            excess -= 1
        return kept, widths

    def _tail(self, i: int, width: int) -> float:
        """How much of a cut cell is its end: the share of TAILS that leaves most cells of column i different."""
        cells = {str(row[0][i]) for row in self.rows if row is not None}
        if self.columns[i].cut != "middle" or all(cell_len(c) <= width for c in cells):
            return TAILS[0]
        return max(TAILS, key=lambda tail: len({shortened(c, width, "middle", tail) for c in cells}))

    def _line(
        self,
        kept: Sequence[int],
        widths: Sequence[int],
        tails: Sequence[float],
        cells: Sequence[str | Text],
        style: str,
    ) -> Text:
        """One row, each cell cut or filled to its width."""
        made = Text(style=style, no_wrap=True, overflow="ellipsis")
        for k, (i, cell) in enumerate(zip(kept, cells, strict=True)):
            text = cell.copy() if isinstance(cell, Text) else Text(cell)
            if cell_len(text.plain) > widths[k]:
                text.plain = shortened(text.plain, widths[k], self.columns[i].cut or "end", tails[k])
            space = " " * (widths[k] - cell_len(text.plain))
            made.append_text(Text.assemble(space, text) if self.columns[i].align == "right" else text)
            if self.columns[i].align == "left" and k < len(kept) - 1:
                made.append(space)
            made.append(" " * GAP if k < len(kept) - 1 else "")
        return made


def shortened(name: str, width: int, where: str = "middle", tail_share: float = TAILS[0]) -> str:
    """`name` in at most `width` columns with a '…' at its end, or in its middle before the last `tail_share` of it."""
    if cell_len(name) <= width:
        return name
    if where == "end" or width < 8:
        return set_cell_size(name, max(width - 1, 0)).rstrip() + "…" * min(width, 1)
    tail = int((width - 1) * tail_share)
    return f"{set_cell_size(name, width - 1 - tail)}…{set_cell_size(name[::-1], tail)[::-1]}"
