"""Device profiles in the terminal: one measured, or all side by side for a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from featherweight.core import Profile
from featherweight.quantities import format_bytes, format_ms
from featherweight.report.terminal import Column, Grid, bullets, heading, indented
from featherweight.report.text import note_parts, pairs

if TYPE_CHECKING:
    from featherweight.target_view import TargetView

BEST = 3


def profile_parts(profile: Profile) -> list[RenderableType]:
    """What was measured, in short: the file has all of it."""
    return [
        Text.assemble((profile.name, "bold"), f"  {profile.cpu or profile.arch}"),
        pairs(profile_rows(profile)),
        *_kernel_parts(profile),
    ]


def profile_rows(profile: Profile) -> Mapping[str, str]:
    """Names and values."""
    watts = " idle, ".join(f"{w:g} W" for w in (profile.idle_w, profile.busy_w) if w is not None)
    rows = {
        "threads": f"{profile.threads} of {profile.cores or '?'} cores",
        "memory": format_bytes(profile.memory_bytes),
        "bandwidth": "" if profile.memory_gb_per_s is None else f"{profile.memory_gb_per_s:.3g} GB/s read",
        "large products": ", ".join(f"{rate:.3g} GMAC/s {name}" for name, rate in profile.rates.items()),
        "a call": ""
        if profile.call_us is None
        else f"{profile.call_us:.3g} us, and {profile.node_us or 0:.3g} us a node",
        "more threads": ", ".join(f"{n}: {speed:.3g}x" for n, speed in profile.thread_scaling if n > 1),
        "power": f"{watts} busy" if profile.idle_w is not None and profile.busy_w is not None else watts,
        "int8": "dot products" if profile.int8_dot else "no dot products: weights are kept pair-safe",
    }
    return {key: value for key, value in rows.items() if value}


def _kernel_parts(profile: Profile) -> list[RenderableType]:
    """How many operators of each kind, and the fastest and slowest of those with products."""
    groups: dict[tuple[str, str], int] = {}
    for kernel in profile.kernels:
        groups[kernel.kind, kernel.precision] = groups.get((kernel.kind, kernel.precision), 0) + 1
    if not groups:
        return []
    made = Grid([Column("kind"), Column("precision"), Column("sizes", "right")])
    for (kind, precision), count in groups.items():
        made.add(kind, precision, str(count))
    return [heading("Operators", f"{len(profile.kernels)} measured"), indented(made)]


def target_parts(view: TargetView) -> list[RenderableType]:
    """Every device side by side."""
    made = Grid(
        [Column("device"), Column("fits"), Column("latency", "right"), Column("memory", "right"), Column("of", "right"),
         Column("power", "right", optional=1)]
    )  # fmt: skip
    for line in view.lines:
        made.add(
            line.name,
            "yes" if line.fits else "no",
            "-" if line.latency_ms is None else format_ms(line.latency_ms),
            format_bytes(line.memory_bytes),
            format_bytes(line.device_memory_bytes),
            "-" if line.busy_w is None else f"{line.busy_w:g} W",
            style="" if line.fits else "dim",
        )
    head = Text.assemble((view.model, "bold"), f"  {format_bytes(view.lines[0].storage_bytes)}" if view.lines else "")
    detail = "latency predicted from each device's profile, not measured"
    why = [Text.assemble((line.name, "bold"), f": {'; '.join(line.reasons)}") for line in view.lines if line.reasons]
    reasons = [heading("Why not"), bullets(why)] if why else []
    return [head, heading("Devices", detail), indented(made), *reasons, *note_parts(view.notes, everything=False)]
