"""Slots: one number for each place on a channel axis, and which of them must go together.

Operators link slots while the graph is followed; what is linked, directly or through others, is removed together
or not at all. Linking only collects pairs; the classes are found once at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reason:
    """Why some slots cannot be removed: the node (dotted path) and the sentence."""

    slots: I64
    where: str
    text: str


class Slots:
    """All slots of one model. `reasons` say why some are frozen, `remarks` why some move only together."""

    def __init__(self) -> None:
        self.count = 0
        self.reasons: list[Reason] = []
        self.remarks: list[Reason] = []
        self._pairs: list[tuple[I64, I64]] = []

    def new(self, shape: tuple[int, ...]) -> I64:
        """Fresh slots in an array of `shape`."""
        size = int(np.prod(shape, dtype=np.int64))
        made = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self.count += size
        return made

    def link(self, a: I64, b: I64) -> None:
        """Slots at the same place of the two arrays (after broadcasting) go together."""
        x, y = np.broadcast_arrays(a, b)
        self._pairs.append((x.reshape(-1), y.reshape(-1)))

    def freeze(self, slots: I64, where: str, text: str) -> None:
        """These slots must stay."""
        self.reasons.append(Reason(np.unique(slots), where, text))

    def tie(self, slots: I64, where: str, text: str) -> None:
        """Slots in one row of (rows, n) go only together; the remark is shown if that leaves nothing to remove."""
        self.link(slots, slots[:, :1])
        self.remarks.append(Reason(np.unique(slots), where, text))

    def classes(self) -> I64:
        """(count,) the least slot of the class that each slot belongs to."""
        pairs = self._pairs or [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        return joined(self.count, np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs]))


def joined(count: int, a: I64, b: I64) -> I64:
    """Connected components of `count` things joined in pairs: (count,) the least member of each one's component.

    Labels are hooked onto smaller ones and paths halved until nothing changes (Shiloach and Vishkin 1982).
    """
    root = np.arange(count, dtype=np.int64)
    while True:
        x, y = root[a], root[b]
        differ = x != y
        if not differ.any():
            return root
        np.minimum.at(root, np.maximum(x, y)[differ], np.minimum(x, y)[differ])
        while True:
            jumped = root[root]
            if np.array_equal(jumped, root):
                break
            root = jumped


def positions(old: I64, wanted: I64) -> I64:
    """Flat place in `old` (all different) of each slot of `wanted`, in the shape of `wanted`."""
    flat = old.reshape(-1)
    order = np.argsort(flat, kind="stable")
    at = np.searchsorted(flat[order], wanted.reshape(-1))
    return order[at].reshape(wanted.shape)


def varying(array: I64) -> tuple[int, ...]:
    """Axes along which an array of labels has more than one entry."""
    return tuple(a for a, n in enumerate(array.shape) if n > 1)


def lined_up(array: I64, rank: int) -> I64:
    """`array` with leading axes of size 1 up to `rank`, as broadcasting does."""
    return array.reshape((1,) * (rank - array.ndim) + array.shape)
