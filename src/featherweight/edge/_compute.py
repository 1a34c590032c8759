"""How long each block of a model takes on a device, and what the model needs there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from featherweight.core import Profile
from featherweight.edge import cuts, predict
from featherweight.edge.cuts import CutGraph
from featherweight.edge.planned import planned
from featherweight.edge.work import Executed
from featherweight.graph import cost, io

_NOMINAL_RATE = 10.0
"""GMAC/s (and GB/s) that share a measured time out over blocks where a profile knows none; only their ratio matters."""


@dataclass(frozen=True)
class Work:
    """One form of the model that may be placed. Bytes of one call; `upload_bytes` is what an app sends to a server."""

    name: str
    path: Path
    graph: CutGraph
    operators: tuple[Executed, ...]
    file_bytes: int
    activation_bytes: int
    upload_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Times:
    """Milliseconds of each block and of one call beside its blocks; `source`: "predicted" or "measured"."""

    blocks: tuple[float, ...]
    call_ms: float
    source: str = predict.PREDICTED

    @property
    def total_ms(self) -> float:
        """One call of the whole model."""
        return self.call_ms + sum(self.blocks)


def read_work(
    name: str, path: Path, *, input_shapes: Mapping[str, tuple[int, ...]], upload_bytes: int | None = None
) -> Work:
    """Read one model file. Raises ModelError for an unusable file."""
    prepared = cuts.prepare(io.load(path))
    graph = cuts.cut_graph(prepared, input_shapes=input_shapes)
    shapes = cuts.concrete_inputs(prepared, input_shapes)
    inputs = sum(t.nbytes for t in graph.tensors if t.is_input)
    return Work(
        name=name,
        path=path,
        graph=graph,
        operators=tuple(planned(prepared, shapes)[0]),
        file_bytes=io.size_bytes(path),
        activation_bytes=cost.costs(prepared, input_shapes=shapes).peak_activation_bytes,
        upload_bytes=inputs if upload_bytes is None else upload_bytes,
        output_bytes=sum(t.nbytes for t in graph.tensors if t.is_output),
    )


def times(work: Work, profile: Profile, measured_ms: float | None = None) -> Times:
    """Times on a device, predicted node by node; a measured time of the whole scales them all alike.

    Raises BudgetError where the profile can predict nothing and nothing was measured.
    """
    if measured_ms is not None and not profile.predicts:
        profile = dataclasses.replace(profile, rates={"float32": _NOMINAL_RATE}, memory_gb_per_s=_NOMINAL_RATE)
    found = predict.predict_operators(work.operators, profile)
    owner = {name: i for i, block in enumerate(work.graph.blocks) for name in block.nodes}
    blocks = [0.0] * len(work.graph.blocks)
    beside = found.call_ms
    for name, ms in found.per_node.items():
        i = owner.get(name)
        while i is None and "." in name:
            name = name.rpartition(".")[0]  # a node of a body counts for the node that holds it
            i = owner.get(name)
        if i is None:
            beside += ms  # what depends on no input
        else:
            blocks[i] += ms
    if measured_ms is None:
        return Times(tuple(blocks), beside)
    whole = beside + sum(blocks)
    scale = measured_ms / whole if whole > 0 else 0.0
    return Times(tuple(b * scale for b in blocks), beside * scale if whole > 0 else measured_ms, "measured")
