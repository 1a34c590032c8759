"""A Comparison in the terminal: two models on the same data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from featherweight.report import wording
from featherweight.report.terminal import lines
from featherweight.report.text import measured_parts, note_parts

if TYPE_CHECKING:
    from featherweight.pipeline import Comparison

NAMES = ("original", "candidate")


def comparison_parts(found: Comparison) -> list[RenderableType]:
    """What the candidate gains and loses, both side by side, notes."""
    return [
        Text(wording.headline(found.original, found.candidate), style="bold"),
        *lines([f"metric {found.candidate.metric_name}: {found.metric_reason}"], "dim"),
        *measured_parts(found.original, found.candidate, names=NAMES, samples="sample"),
        *note_parts(found.notes),
    ]
