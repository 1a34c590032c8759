"""A Comparison in the terminal: two models on the same data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from featherweight.report.text import measured_parts

if TYPE_CHECKING:
    from featherweight.pipeline import Comparison

NAMES = ("original", "candidate")


def comparison_parts(found: Comparison) -> list[RenderableType]:
    """Side by side, the paired test, and how far the outputs are apart."""
    return [
        Text("Two models on the same data", style="bold"),
        *measured_parts(found.original, found.candidate, names=NAMES),
    ]
