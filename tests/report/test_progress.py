"""Progress on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from featherweight.core import Progress
from featherweight.report.progress import TerminalProgress


def screen() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None, legacy_windows=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_phases_leave_a_line_and_the_live_part_shows_what_is_tried() -> None:
    console = screen()
    with TerminalProgress(console) as progress:
        shown: Progress = progress
        shown.start("statistics", 10)
        shown.advance(3)
        shown.trying("static_int8 with [brackets] and a very long description that is wider than the screen")
        shown.best("4.74 MB, drop 0.20 points")
        progress._live.refresh()
        shown.start("search")
    text = written(console)
    assert "3/10" in text
    assert "trying  static_int8 with [brackets]" in text
    assert "best so far  4.74 MB, drop 0.20 points" in text
    assert re.search(r"  statistics  0\.\d s", text)
    assert re.search(r"  search  0\.\d s", text)


def test_phase_cut_short_gets_no_line() -> None:
    console = screen()

    def interrupted() -> None:
        with TerminalProgress(console) as progress:
            progress.start("search", 5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not re.search(r"search  \d\.\d s", written(console))
