"""Bounds: proving "no" before searching.

A bound holds over the whole decision space: every site at its cheapest, plus what cannot be touched. Only size and
peak memory can be proved out of reach; accuracy and latency are found by measuring.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from featherweight.core import Budget, Decision, Site
from featherweight.graph import cost
from featherweight.graph.weights import stored_size_bytes
from featherweight.search.joint import Joint
from featherweight.search.loop import Base
from featherweight.search.solve import Table, cheapest

# File bytes the estimates of one site may be off by (names, alignment); a proof must not rest on them.
SLACK_BYTES_PER_SITE = 256


@dataclass(frozen=True, slots=True)
class Bound:
    """The lowest reachable value of one quantity, what makes it up, and whether a limit lies below it."""

    what: str
    reachable: float
    limit: float | None
    binding: str
    unit: str = "B"

    @property
    def proves_no(self) -> bool:
        """True if the limit cannot be met by any plan."""
        return self.limit is not None and self.reachable > self.limit


def size_bound(budget: Budget, table: Table, sites: Mapping[str, Site], base_bytes: int) -> Bound:
    """Bytes of the file with every site at its cheapest. Names the untouchable rest or the largest site."""
    least = base_bytes + cheapest(table, "size_bytes").size_bytes - SLACK_BYTES_PER_SITE * len(table)
    touched = sum(sites[s].size_bytes for s in table)
    rest = max(base_bytes - touched, 0)
    lowest = {s: sites[s].size_bytes + min(c.effect.size_bytes for c in choices) for s, choices in table.items()}
    name = max(lowest, key=lambda s: lowest[s], default="")
    if rest >= max(lowest.values(), default=0):
        binding = f"{rest} B that no technique may touch (graph, biases, small or frozen tensors)"
    else:
        binding = f"{name!r}, {lowest[name]} B at its cheapest"
    return Bound("size", max(least, rest, 1), budget.max_size_bytes, binding)


@dataclass(frozen=True)
class Floor:
    """The model with every group of channels at its narrowest: bytes by tensor, MACs by node, and what was decided."""

    tensor_bytes: Mapping[str, int]
    node_macs: Mapping[str, int]
    decisions: Mapping[str, Decision]


def floor_of(model: ir.Model, shapes: Mapping[str, tuple[int, ...]], decisions: Iterable[Decision]) -> Floor:
    """Count a model that was cut to the narrowest widths."""
    stored = {v.name or "": v for g in model.graphs() for v in g.initializers.values()}
    sizes = {name: stored_size_bytes(value) for name, value in stored.items()}
    macs = {n.name: n.macs or 0 for n in cost.costs(model, input_shapes=shapes).nodes}
    return Floor(sizes, macs, {d.site: d for d in decisions})


def structure_bounds(budget: Budget, joint: Joint, base: Base, floor: Floor | None) -> list[Bound]:
    """The least bytes and MACs of any plan: every group at its narrowest, every weight at its cheapest there.

    A weight that shrinks is stored in no smaller share of its bytes than before, as codebooks and scales do not
    shrink with it. Without a floor (the groups cannot all be cut) nothing is proved.
    """
    if floor is None:
        return [
            Bound("size", 1, budget.max_size_bytes, "nothing that could be proved"),
            Bound("MACs", 0, budget.max_macs, "nothing that could be proved", "a call"),
        ]
    before = sum(joint.facts[g].resident_bytes for g in joint.groups)
    before += sum(joint.sites[w].size_bytes for w in joint.weights)
    least = {
        name: floor.tensor_bytes.get(name, 0)
        * min(o.size_bytes for o in options)
        / max(joint.sites[name].size_bytes, 1)
        for name, options in joint.weights.items()
    }
    rest = max(base.size_bytes - before, 0)
    slack = SLACK_BYTES_PER_SITE * (len(joint.weights) + len(joint.groups))
    reachable = max(rest + sum(least.values()) - slack, rest, 1)
    size = Bound("size", reachable, budget.max_size_bytes, _binding(joint, floor, least, "B", rest))
    work: dict[str, float] = {}
    counted: set[str] = set()
    for name, options in joint.weights.items():
        share = min(o.macs for o in options) / max(joint.facts[name].macs, 1)
        work[name] = share * sum(floor.node_macs.get(n, 0) for n in joint.sites[name].nodes)
        counted.update(joint.sites[name].nodes)
    others = sum(m for n, m in floor.node_macs.items() if n not in counted)
    macs = Bound(
        "MACs", sum(work.values()) + others, budget.max_macs, _binding(joint, floor, work, "MACs", others), "a call"
    )
    return [size, macs]


def _binding(joint: Joint, floor: Floor, least: Mapping[str, float], unit: str, rest: float) -> str:
    """The weight that costs most at its least, and the narrowest group around it; or the untouchable rest."""
    name = max(least, key=lambda w: least[w], default="")
    if not name or rest >= least[name]:
        return f"{rest:.0f} {unit} that no technique may touch"
    around = [floor.decisions[g] for g in joint.sized_by[name] if g in floor.decisions]
    words = f"{name!r}, {least[name]:.0f} {unit} at its least"
    return f"{words}, with {around[0].site!r} at its narrowest ({around[0]})" if around else words


def memory_bound(budget: Budget, interface: Mapping[str, tuple[tuple[int, ...], int]]) -> Bound:
    """Peak bytes from the graph's inputs and outputs alone: {name: (shape, bytes an element)}.

    They live outside the model, so no plan shrinks them; weights and inner activations come on top.
    """
    sizes = {name: math.prod(shape) * item for name, (shape, item) in interface.items()}
    largest = max(sizes, key=lambda n: sizes[n], default="")
    binding = f"inputs and outputs alone; the largest is {largest!r} of {sizes.get(largest, 0)} B"
    return Bound("peak memory", sum(sizes.values()), budget.max_peak_bytes, binding)


def refusal(bounds: list[Bound]) -> str | None:
    """The sentence behind "no, proved", or None if nothing is proved."""
    for b in bounds:
        if b.proves_no and b.limit is not None:
            return (
                f"{b.what}: no plan reaches {b.limit:.0f} {b.unit}; "
                f"the lower bound is {b.reachable:.0f} {b.unit}, set by {b.binding}"
            )
    return None
