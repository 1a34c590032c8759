"""Every shipped device side by side for one model: does it fit, how fast is it there, and why not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.core import Note, Profile


@dataclass(frozen=True, slots=True)
class TargetLine:
    """One device. `latency_ms` is predicted, None where the device cannot run the model or cannot be predicted for."""

    name: str
    description: str
    fits: bool
    latency_ms: float | None
    memory_bytes: int
    device_memory_bytes: int
    storage_bytes: int
    busy_w: float | None
    reasons: tuple[str, ...]
    label: str = "predicted"


@dataclass(frozen=True)
class TargetView:
    """All devices, and what a reader should know."""

    model: str
    lines: tuple[TargetLine, ...]
    notes: tuple[Note, ...] = ()


def target_view(
    model: str | Path,
    *,
    profiles: tuple[Profile, ...] | None = None,
    also: str | Path | None = None,
    data: Any = None,
    preprocess: Any = None,
    tokenizer: Path | None = None,
    batch: int = 1,
) -> TargetView:
    """Compare devices: `profiles` (default: all shipped ones) and the name or file `also`.

    The model is run here once, in a child, to see what it executes.

    Raises ModelError for an unusable file, DataError where the data does not fit it or `also` is no profile.
    """
    from featherweight.edge import observe
    from featherweight.edge.predict import denormal_notes, fits, latency, predict_operators
    from featherweight.errors import RunError
    from featherweight.graph import io
    from featherweight.graph.normalise import normalise
    from featherweight.inspection import input_shapes
    from featherweight.runtime.targets import load_profile, shipped_profiles

    path = Path(model)
    original = io.load(path)
    graph = normalise(original, run=None).model
    shapes, feeds, notes = input_shapes(original, graph, data, preprocess, tokenizer, batch)
    try:
        ops = observe.executed(path, feeds or observe.random_feeds(path, shapes))
    except RunError as e:
        ops = None
        notes.append(Note(path.name, f"does not run here ({e}): predicted from its graph alone"))
    lines = []
    devices = list(shipped_profiles() if profiles is None else profiles)
    for profile in devices if also is None else [load_profile(also), *devices]:
        fit = fits(graph, profile, shapes=shapes, file_bytes=io.size_bytes(path))
        ms = None
        if profile.predicts and fit.memory:
            found = predict_operators(ops, profile) if ops is not None else latency(graph, profile, shapes)
            ms = found.ms
        lines.append(
            TargetLine(
                profile.name, profile.description, fit.ok, ms, fit.memory_bytes, profile.memory_bytes,
                fit.storage_bytes, profile.busy_w, fit.reasons,
            )
        )  # fmt: skip
    return TargetView(path.name, tuple(lines), (*notes, *denormal_notes(graph)))
