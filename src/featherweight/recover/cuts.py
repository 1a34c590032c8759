"""Where the pass keeps values, so that it fits into memory and runs little twice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.errors import DataError
from featherweight.graph import io, shapes

Array = npt.NDArray[Any]

LONGEST = 8  # layers in a segment before fewer samples are taken
LEAST_SAMPLES = 32
CUT_COST = 1.0 / (200 << 20)  # of keeping a byte at a cut, in layers run again


def plan_cuts(held: Sequence[float], n: int, samples: int, max_bytes: int) -> tuple[list[int], int, str]:
    """Cuts between layers, how many samples to take, and a note if these are not all.

    `held[i]`: bytes of what must be kept before layer i for `n` samples; `samples`: how many there are. The first cut
    is 0, the last the number of layers.
    """
    taken = samples
    while True:
        cuts = _best_cuts([b * taken / n for b in held], max_bytes)
        longest = max(b - a for a, b in itertools.pairwise(cuts))
        if taken <= LEAST_SAMPLES or (longest <= LONGEST and held[0] * taken / n <= max_bytes):
            break
        taken = max(taken // 2, LEAST_SAMPLES)
    note = ""
    if taken < samples:
        note = f"weights were solved anew from {taken} of {samples} samples: more do not fit into {max_bytes} B"
    return cuts, taken, note


def _best_cuts(held: Sequence[float], max_bytes: int) -> list[int]:
    """Cuts with the least work: a segment of n layers costs n (n + 1) / 2, a byte kept before a layer little."""
    count = len(held)
    cost, back = [0.0] + [float("inf")] * count, [0] * (count + 1)
    for b in range(1, count + 1):
        price = held[b] * CUT_COST if b < count else 0.0
        if b < count and held[b] > max_bytes:
            continue
        for a in range(b):
            length = b - a
            new = cost[a] + length * (length + 1) / 2 + price
            if new < cost[b]:
                cost[b], back[b] = new, a
    cuts = [count]
    while cuts[-1]:
        cuts.append(back[cuts[-1]])
    return cuts[::-1]


@dataclass(frozen=True)
class Sizes:
    """Bytes of every value of both models for the first batch of `n` samples; `samples`: of the whole dataset."""

    theirs: Mapping[str, int]
    ours: Mapping[str, int]
    n: int
    samples: int

    def of(self, theirs: Sequence[str], ours: Sequence[str]) -> float:
        """Bytes of these values together; one of unknown size counts as the largest that is known."""
        most = max(*self.theirs.values(), *self.ours.values())
        return float(sum(self.theirs.get(n, most) for n in theirs) + sum(self.ours.get(n, most) for n in ours))


def sizes_of(original_path: str, reduced_path: str, dataset: Any) -> Sizes:
    """Count the dataset and infer the sizes for its first batch. Raises DataError if there is none."""
    first, n, samples = None, 0, 0
    for feeds, count in batches_of(dataset):
        if first is None:
            first, n = feeds, count
        samples += count
    if first is None:
        raise DataError("solving weights anew needs at least one batch, but the dataset is empty; give it data")
    given = {name: tuple(int(d) for d in np.shape(x)) for name, x in first.items()}
    sizes = []
    for path in (original_path, reduced_path):
        known = shapes.infer(io.load(path), given)
        found = {name: int(np.asarray(x).nbytes) for name, x in first.items()}
        for name, k in known.items():
            size = _bytes(k)
            if size is not None:
                found.setdefault(name, size)
        sizes.append(found)
    return Sizes(sizes[0], sizes[1], max(n, 1), samples)


def _bytes(known: shapes.Known) -> int | None:
    sizes = known.sizes
    return None if sizes is None else int(np.prod(sizes, dtype=np.int64)) * 4


def batches_of(dataset: Any) -> Iterator[tuple[Mapping[str, Array], int]]:
    """Feeds by input name and samples of each batch."""
    items = dataset.batches() if hasattr(dataset, "batches") else dataset
    for item in items:
        if isinstance(item, Mapping):
            yield item, max((int(np.shape(v)[0]) for v in item.values() if np.ndim(v)), default=1)
        else:
            yield item.feeds, item.n
