"""Which sizes a front is measured at, and which of its points is worth a headline.

The interesting part of the trade-off is its bend: above it nothing is lost, below it everything. So the two ends are
measured first, and then always the middle of the neighbours between which the drop changes most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from featherweight.core import Attempt
from featherweight.search.solve import Choice, Table

WIDEST_BITS, NARROWEST_BITS = 8, 2
# A step in size counts too, so that a front without any loss is still spread over sizes.
SIZE_SHARE = 0.25
SLACK = 1.02


def size_at(bits: int, base_bytes: int, table: Table) -> int:
    """Bytes of the smallest file whose weights all keep at least `bits` bits, with a little room for rounding up."""
    saved = sum(min((c.effect.size_bytes for c in cs if _bits(c) >= bits), default=0) for cs in table.values())
    return math.ceil(SLACK * (base_bytes + saved))


def _bits(choice: Choice) -> int:
    """Bits of a stored weight; 16 for decisions that do not say."""
    return min((int(a.get("weight_bits", a.get("bits", 16))) for a in choice.decision.actions), default=32)


def next_size(measured: Sequence[tuple[int, float]]) -> int:
    """The geometric middle of the neighbouring (bytes, drop) between which most happens; at least two are needed."""
    points = sorted(measured)
    known = [d for _, d in points if math.isfinite(d)]
    worst = max(known, default=0.0) + 1.0
    drops = [d if math.isfinite(d) else worst for _, d in points]
    sizes = [math.log(s) for s, _ in points]
    high = max(max(drops) - min(drops), 1e-12)
    wide = max(sizes[-1] - sizes[0], 1e-12)

    def interest(i: int) -> float:
        return abs(drops[i] - drops[i + 1]) / high + SIZE_SHARE * (sizes[i + 1] - sizes[i]) / wide

    i = max(range(len(points) - 1), key=interest)
    return math.ceil(math.exp((sizes[i] + sizes[i + 1]) / 2))


def headline(front: Sequence[Attempt], max_drop: float) -> Attempt | None:
    """The smallest point that loses at most `max_drop`; if none does, the one that loses least."""
    measured = [a for a in front if a.measured is not None]
    good = [a for a in measured if a.judged_drop <= max_drop]
    if good:
        return min(good, key=lambda a: a.measured.size_bytes if a.measured else 0)
    return min(measured, key=lambda a: a.judged_drop, default=None)
