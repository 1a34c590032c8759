"""Progress on the terminal: the phase with a bar and times, what is being tried, the best so far. Writes to stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from featherweight.quantities import format_duration
from featherweight.report.terminal import console as default_console


class TerminalProgress:
    """A core.Progress drawn live; a context manager. Finished phases stay above as one line each."""

    def __init__(self, console: Console | None = None) -> None:
        """Draw on `console`, by default stderr."""
        self._console = console or default_console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._trying, self._best = "", ""
        self._phase, self._since = "", 0.0
        self._live = Live(console=self._console, transient=True, refresh_per_second=4, get_renderable=self._draw)

    def __enter__(self) -> TerminalProgress:
        """Begin to draw."""
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Stop drawing; the last phase gets its line unless it was cut short."""
        if kind is None:
            self._finish()
        self._live.stop()

    def start(self, phase: str, total: int | None = None) -> None:
        """A phase begins, of `total` steps if known; the phase before it has ended."""
        self._finish()
        self._phase, self._since, self._trying = phase, time.monotonic(), ""
        self._bars.add_task(phase, total=total)

    def advance(self, steps: int = 1) -> None:
        """Some steps of the current phase are done."""
        if self._bars.task_ids:
            self._bars.advance(self._bars.task_ids[-1], steps)

    def trying(self, what: str) -> None:
        """Show what is being tried now."""
        self._trying = what

    def best(self, what: str) -> None:
        """Show the best result so far; it stays through the phases."""
        self._best = what

    def _finish(self) -> None:
        """Replace the bar of the phase that ended by a line."""
        for task in list(self._bars.task_ids):
            self._bars.remove_task(task)
        if self._phase:
            took = format_duration(time.monotonic() - self._since)
            self._console.print(Text.assemble("  ", self._phase, (f"  {took}", "dim")))
        self._phase = ""

    def _draw(self) -> Group:
        """The bar and up to two lines under it, each cut to the width."""
        rows = [("trying", self._trying), ("best so far", self._best)]
        shown = [
            Text.assemble((f"  {name}  ", "dim"), words, no_wrap=True, overflow="ellipsis")
            for name, words in rows
            if words
        ]
        return Group(self._bars, *shown)
