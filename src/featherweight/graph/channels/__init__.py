"""The channel-index engine: which channels of a model can be removed, and removing them for real.

Every operator says how the index sets of its inputs' axes map to its outputs' and parameters' (the rules in
`elementwise`, `reshaping`, `selecting`, `summing`, `contracting`, `recurrent`); what is coupled through any composition
of them forms units and groups. What cannot be followed is frozen, with the reason. The idea of dependency groups is
that of DepGraph (Fang 2023, arXiv:2301.12900); here they are found element by element instead of by layer type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from featherweight.graph.channels import contracting, elementwise, recurrent, reshaping, selecting, summing
from featherweight.graph.channels.cutting import KEPT, IllegalCutError, cut_slots, kept
from featherweight.graph.channels.follow import Rule, follow
from featherweight.graph.channels.groups import Channels, Group, Reading, grouped, repaired

RULES: dict[str, Rule] = {
    **elementwise.RULES, **reshaping.RULES, **selecting.RULES, **contracting.RULES, **recurrent.RULES,
    **summing.RULES,
}  # fmt: skip

__all__ = [
    "KEPT",
    "RULES",
    "Channels",
    "Group",
    "IllegalCutError",
    "Reading",
    "analyse",
    "cut",
    "cuttable",
    "kept",
    "repaired",
]


def analyse(model: ir.Model, input_shapes: Mapping[str, tuple[int, ...]] | None = None) -> Channels:
    """Follow all channels of a normalised model (unique names).

    `input_shapes`: concrete sizes at which the graph's shapes are computed; open axes not given count as 2 samples
    and 32 elsewhere. The model is not changed.
    """
    return grouped(follow(model, RULES, input_shapes))


def cut(channels: Channels, removed: Iterable[int]) -> None:
    """Remove classes of slots (as listed in `Group.units`) from the model that was analysed, in place.

    Node, tensor and value names stay; the interface stays. Raises IllegalCutError, the model untouched then.
    """
    cut_slots(channels.following, RULES, channels.gone(removed))


def cuttable(channels: Channels, removed: Iterable[int]) -> str:
    """Why these classes cannot be removed together; empty if they can."""
    try:
        cut_slots(channels.following, RULES, channels.gone(removed), dry=True)
    except IllegalCutError as e:
        return str(e)
    return ""
