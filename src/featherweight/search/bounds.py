"""Bounds: proving "no" before searching.

A bound holds over the whole decision space: every site at its cheapest, plus what cannot be touched. Only size and
peak memory can be proved out of reach; accuracy and latency are found by measuring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from featherweight.core import Budget, Site
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
                f"{b.what}: no plan reaches {b.limit:.0f} B; the lower bound is {b.reachable:.0f} B, set by {b.binding}"
            )
    return None
