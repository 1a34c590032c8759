"""From linked slots to groups: what may be chosen from, and what goes together.

A unit is the least set of slots that can be removed; a group is the units that one layer (or several coupled ones)
makes, among which one chooses.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Note
from featherweight.graph.channels.follow import Birth, Following
from featherweight.graph.channels.slots import I64, joined


@dataclass(frozen=True)
class Reading:
    """One product that sums over the channels of a group: rows of `tensor`'s matrix group `part`.

    `columns[u]`: columns of Weight.to_matrix(...)[part] that unit u owns (often empty, if it has none here).
    """

    tensor: str
    node: str
    part: int
    columns: tuple[I64, ...]


@dataclass(frozen=True)
class Group:
    """Channels one may choose among. `units`: the classes of slots of each unit, all removed together.

    `parts`: where a layer in groups (or a recurrent layer of two directions) needs equally many from each of its
    parts: classes (parts, n), of which units may be put together anew, one of each part; else None.
    `floors`: sets of units of which one at least must stay.
    """

    name: str
    units: tuple[I64, ...]
    makers: tuple[str, ...]
    readings: tuple[Reading, ...]
    tensors: tuple[str, ...]
    nodes: tuple[str, ...]
    parts: I64 | None
    floors: tuple[I64, ...]


@dataclass
class Channels:
    """All groups of one model, and what is frozen. Belongs to that model object as it is; analyse again after a cut."""

    following: Following
    classes: I64
    groups: tuple[Group, ...]
    frozen: tuple[Note, ...]

    def gone(self, removed: Iterable[int]) -> npt.NDArray[np.bool_]:
        """(slots,) True where a slot belongs to one of the classes."""
        return np.isin(self.classes, np.fromiter(removed, np.int64))

    def width(self, group: Group) -> int:
        """Channels that one unit of the group has in the widest of its makers."""
        members = group.units[0]
        made = [b.slots for b in self.following.births if b.node in group.makers]
        return max((int(np.isin(self.classes[s], members).sum()) for s in made), default=1) or 1

    def work_left(self, node: ir.Node, gone: npt.NDArray[np.bool_]) -> float:
        """Share of a layer's multiply-accumulates that is left."""
        terms = self.following.work.get(node)
        if not terms:
            return 1.0
        return float(sum(share * np.prod([1 - gone[a].mean() for a in arrays]) for share, arrays in terms))

    def bytes_left(self, gone: npt.NDArray[np.bool_]) -> dict[str, float]:
        """Share that is left of each stored tensor that would be cut, by name."""
        found: dict[str, float] = {}
        for base in {**self.following.stored, **self.following.shares}:
            axes = self.following.shares.get(base) or list(self.following.stored.get(base, {}).values())
            share = float(np.prod([1 - gone[s].mean() for s in axes]))
            if share < 1:
                found[base.name or ""] = share
        for base, slots in self.following.whole.items():
            if gone[slots].any():
                found[base.name or ""] = 1 - float(gone[slots].mean())
        return found


def grouped(f: Following) -> Channels:
    """Find units and groups of what was followed."""
    atoms = f.slots.classes()
    frozen = np.zeros(f.slots.count, bool)
    for reason in f.slots.reasons:
        frozen[atoms[reason.slots]] = True
    units = _closed(f, atoms)
    held = np.zeros(f.slots.count, bool)
    held[units[np.flatnonzero(frozen[atoms])]] = True
    birthed = [np.unique(units[b.slots]) for b in f.births]
    free = [u[~held[u]] for u in birthed]
    a = np.concatenate([np.zeros(0, np.int64), *free])
    b = np.concatenate([np.zeros(0, np.int64), *[np.full(len(u), u[0]) for u in free if len(u)]])
    groups = joined(f.slots.count, a, b)
    by_group: dict[int, list[int]] = defaultdict(list)
    for i, u in enumerate(free):
        if len(u):
            by_group[int(groups[u[0]])].append(i)
    made = _Maker(f, atoms, units, held, groups)
    found: list[tuple[Group, list[int]]] = []
    single: list[tuple[Group, list[int]]] = []
    for births in by_group.values():
        group = made.group([f.births[i] for i in births])
        (found if len(group.units) > 1 else single).append((group, births))
    notes = _frozen_notes(f, atoms, free, single)
    return Channels(f, atoms, tuple(g for g, _ in found), notes)


def _closed(f: Following, atoms: I64) -> I64:
    """Classes joined further so that every rectangle stays one: (slots,) representative atoms."""
    pairs: list[tuple[I64, I64]] = [(np.arange(len(atoms)), atoms)]
    for constraint in f.constraints:
        rows = atoms[constraint.rows]
        whole_rows = (rows == rows[:, :1]).all()
        whole_columns = (rows == rows[:1]).all()
        if whole_columns or (whole_rows and not constraint.equal):
            continue
        pairs.append((rows.reshape(-1), np.broadcast_to(rows[:1], rows.shape).reshape(-1)))
    return joined(len(atoms), np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs]))


class _Maker:
    """Builds one group after another from the same arrays."""

    def __init__(self, f: Following, atoms: I64, units: I64, held: npt.NDArray[np.bool_], groups: I64) -> None:
        self.f, self.atoms, self.units, self.held = f, atoms, units, held
        order = np.argsort(units, kind="stable")
        self._sorted, self._by_unit = units[order], order
        self._groups = groups
        self._arrays = self._label_arrays()

    def _label_arrays(self) -> list[I64]:
        """Units on each array of labels that could be emptied."""
        seen: dict[bytes, I64] = {}
        arrays = [*self.f.at.values(), *[s for axes in self.f.stored.values() for s in axes.values()]]
        for array in arrays:
            found = np.unique(self.units[array])
            if not self.held[found].any():
                seen[found.tobytes()] = found
        return list(seen.values())

    def atoms_of(self, unit: int) -> I64:
        """Classes of slots that make up one unit."""
        first, last = np.searchsorted(self._sorted, [unit, unit + 1])
        return np.unique(self.atoms[self._by_unit[first:last]])

    def group(self, births: list[Birth]) -> Group:
        """The group of these births' free units."""
        ids = np.unique(np.concatenate([self.units[b.slots] for b in births]))
        ids = ids[~self.held[ids]]
        number = {int(u): i for i, u in enumerate(ids)}
        units = tuple(self.atoms_of(int(u)) for u in ids)
        tensors, nodes = self._touched(ids)
        floors = []
        for array in self._arrays:
            inside = array[np.isin(array, ids)]
            if len(inside) == len(array) < len(ids):
                floors.append(np.array([number[int(u)] for u in inside], np.int64))
        makers = tuple(dict.fromkeys(b.node for b in births))
        return Group(
            f"channels of {makers[0]}",
            units,
            makers,
            readings(self.f, self.atoms, units),
            tensors,
            nodes,
            self._parts(ids),
            tuple(floors),
        )

    def _touched(self, ids: I64) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Stored tensors that would shrink, and layers that would work less."""
        tensors: dict[str, None] = {}
        for base in {**self.f.stored, **self.f.shares}:
            axes = self.f.shares.get(base) or list(self.f.stored.get(base, {}).values())
            if any(np.isin(self.units[s], ids).any() for s in axes):
                tensors[base.name or ""] = None
        for base, slots in self.f.whole.items():
            if np.isin(self.units[slots], ids).any():
                tensors[base.name or ""] = None
        nodes = [
            self.f.where(node)
            for node, terms in self.f.work.items()
            if any(np.isin(self.units[a], ids).any() for _, arrays in terms for a in arrays)
        ]
        return tuple(tensors), tuple(nodes)

    def _parts(self, ids: I64) -> I64 | None:
        """The rows of the one kind of constraint that bears on these units, if pairing anew is possible at all."""
        own = np.unique(np.concatenate([self.atoms_of(int(u)) for u in ids]))
        rows: I64 | None = None
        for constraint in self.f.constraints:
            found = self.atoms[constraint.rows]
            if not np.isin(found, own).any() or (found == found[:1]).all():
                continue
            if rows is not None and {tuple(np.sort(r)) for r in rows} != {tuple(np.sort(r)) for r in found}:
                return None
            rows = found if rows is None else rows
        if rows is None or len(np.unique(rows)) != rows.size or not np.array_equal(np.unique(rows), own):
            return None
        return rows


def readings(f: Following, atoms: I64, units: Sequence[I64]) -> tuple[Reading, ...]:
    """Which columns of which weights each unit (its classes of slots) owns."""
    number = {int(a): u for u, members in enumerate(units) for a in members}
    found = []
    for reader in f.readers:
        for part, slots in enumerate(reader.slots):
            owners = [number.get(int(a), -1) for a in atoms[slots]]
            if max(owners) < 0:
                continue
            columns: list[list[int]] = [[] for _ in units]
            for channel, unit in enumerate(owners):
                if unit >= 0:
                    columns[unit].extend(range(channel * reader.width, (channel + 1) * reader.width))
            found.append(Reading(reader.tensor, reader.node, part, tuple(np.array(c, np.int64) for c in columns)))
    return tuple(found)


def repaired(channels: Channels, group: Group, order: I64) -> Group:
    """The group with its parts' classes put together anew: unit u has the classes order[:, u] (parts, n)."""
    units = tuple(np.unique(column) for column in order.T)
    return dataclasses.replace(group, units=units, readings=readings(channels.following, channels.classes, units))


def _frozen_notes(f: Following, atoms: I64, free: list[I64], single: list[tuple[Group, list[int]]]) -> tuple[Note, ...]:
    """For every birth nothing can be removed from: the reasons."""
    alone = {i: g for g, births in single for i in births}
    notes = []
    for i, birth in enumerate(f.births):
        if len(free[i]) and i not in alone:
            continue
        own = np.unique(atoms[birth.slots])
        pool = f.slots.reasons if not len(free[i]) else [*f.slots.remarks, *f.slots.reasons]
        texts = dict.fromkeys(
            f"{r.where}: {r.text}" if r.where else r.text for r in pool if np.isin(atoms[r.slots], own).any()
        )
        listed = list(texts)
        more = f", and {len(listed) - 1} places more" if len(listed) > 1 else ""
        why = "".join(listed[:1]) + more or (
            "it makes one channel" if len(birth.slots) == 1 else "they go only together"
        )
        note = Note(birth.node, f"its {len(birth.slots)} channels stay: {why}")
        if note not in notes:
            notes.append(note)
    return tuple(notes)
