"""Cut students: whole blocks left out, channels and heads thinned. No data are needed, and no torch.

What is cut was trained to be there: a cut student is a start for distillation, not a model to use as it is.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Note
from featherweight.errors import ModelError
from featherweight.graph import channels as ch
from featherweight.graph import surgery
from featherweight.learn.repeats import Block

MULTIPLE = 8
"""Widths stay multiples of this many channels where a layer has at least four times as many: kernels like that."""
Pairs = tuple[tuple[str, str], ...]


def share_of(text: str) -> float:
    """0.5 of `50%` or `0.5`. Raises ModelError unless it lies between 0 and 1, ends excluded."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ModelError(
            f"a student's share must lie between 0 and 1, ends excluded, but got {text!r}; write it like 50%"
        )
    return share


def spread(n: int, keep: int) -> tuple[int, ...]:
    """`keep` of `n` numbers from 0, evenly spread, the first and the last among them; of one, the first.

    Raises ModelError unless 1 <= keep <= n.
    """
    if not 1 <= keep <= n:
        raise ModelError(f"a student must keep 1 to {n} of the teacher's {n} repeated blocks, but {keep} were asked")
    return tuple(int(i) for i in np.rint(np.linspace(0, n - 1, keep)))


def keep_blocks(blocks: Sequence[Block], kept: Collection[int]) -> Pairs:
    """Leave out, in place, every block whose number is not in `kept`. All other names stay.

    Returns (teacher tensor, student tensor): a kept block stands for itself and those left out behind it, so its
    result corresponds to what the last of them made (TinyBERT's uniform map, Jiao 2020, arXiv:1909.10351).
    Raises ModelError, the model then being half cut, if something else reads the inside of a block.
    """
    wrong = sorted(i for i in kept if not 0 <= i < len(blocks))
    if wrong or not kept:
        raise ModelError(
            f"blocks are numbered 0 to {len(blocks) - 1}, but layers={','.join(map(str, wrong))} was asked"
        )
    wanted = []
    for i in sorted(kept):
        behind = [j for j in kept if j > i and blocks[j].stack == blocks[i].stack]
        last = min(behind) - 1 if behind else max(j for j, b in enumerate(blocks) if b.stack == blocks[i].stack)
        wanted.append((blocks[last].end.name or "", blocks[i].end))
    # Last to first, so that the start of each is still what the block before it made.
    for i in reversed(range(len(blocks))):
        if i not in kept:
            surgery.replace_uses(blocks[i].end, blocks[i].start)
    return tuple((teacher, value.name or "") for teacher, value in wanted)


def still_there(model: ir.Model, blocks: Sequence[Block], kept: Collection[int]) -> str:
    """After the unused parts are gone: which node of a block left out is still needed, and by whom; else empty."""
    left = set(model.graph)
    for i, block in enumerate(blocks):
        sizes: set[ir.Node] = set()
        for node in block.nodes if i not in kept else ():
            if node not in left:
                continue
            inner = [p for p in node.predecessors() if p in block.nodes]
            if node.op_type in ("Shape", "Size") or (inner and sizes.issuperset(inner)):
                sizes.add(node)  # sizes alone, which are those of any block
                continue
            readers = {r.name for o in node.outputs for r in o.consumers() if r not in block.nodes}
            who = ", ".join(sorted(filter(None, readers))[:3]) or "an output of the model"
            return f"block {i} cannot be left out: {node.name!r} inside it is read by {who}"
    return ""


def thin(model: ir.Model, share: float, pattern: str = "*") -> tuple[Note, ...]:
    """Keep `share` (0 to 1) of the channels or heads of every group whose name matches, in place.

    Those with the smallest weights go: the mean over a group's tensors of a unit's share of their squared norm
    (group norm: Fang 2023, arXiv:2301.12900). Returns what was thinned. Raises ModelError if nothing could be.
    """
    channels = ch.analyse(model)
    chosen = [g for g in channels.groups if fnmatch.fnmatchcase(g.name.removeprefix("channels of "), pattern)]
    removed: list[int] = []
    notes: list[Note] = []
    for group in chosen:
        gone = _least(channels, group, share)
        classes = [int(c) for u in gone for c in group.units[u]]
        why = ch.cuttable(channels, [*removed, *classes]) if classes else ""
        if classes and not why:
            removed += classes
            notes.append(Note(group.name, f"{len(group.units) - len(gone)} of {len(group.units)} kept"))
        elif why:
            notes.append(Note(group.name, f"left whole: {why}"))
    if not removed:
        names = ", ".join(g.name.removeprefix("channels of ") for g in channels.groups[:5]) or "none"
        raise ModelError(
            f"width={share:g}:{pattern} must name channels that can be removed, but none could; groups: {names}"
        )
    ch.cut(channels, removed)
    return tuple(notes)


def _least(channels: ch.Channels, group: ch.Group, share: float) -> list[int]:
    """Units of least norm that go, so many that a `share` of the units stays, rounded up to what kernels like."""
    n, each = len(group.units), channels.width(group)
    step = MULTIPLE // math.gcd(MULTIPLE, each)
    step = step if n >= 4 * step else 1
    keep = min(n, max(step, math.ceil(round(share * n / step, 6)) * step))
    order = np.argsort(_norms(channels, group), kind="stable")
    needed = [set(f.tolist()) for f in group.floors]
    gone: set[int] = set()
    for u in order.tolist():
        if len(gone) == n - keep:
            break
        if not any(f <= gone | {u} for f in needed):
            gone.add(u)
    return sorted(gone)


def _norms(channels: ch.Channels, group: ch.Group) -> npt.NDArray[np.float64]:
    """(units,) mean over the group's tensors of the squared norm of what a unit owns, each tensor's mean being 1."""
    number = {int(c): u for u, members in enumerate(group.units) for c in members}
    stored: Mapping[ir.Value, Mapping[int, npt.NDArray[np.int64]]] = channels.following.stored
    found, counted = np.zeros(len(group.units)), np.zeros(len(group.units))
    for base, axes in stored.items():
        array = surgery.constant(base)
        if base.name not in group.tensors or array is None or array.dtype.kind != "f" or array.ndim < 2:
            continue
        for axis, slots in axes.items():
            owner = np.array([number.get(int(c), -1) for c in channels.classes[slots]])
            if owner.max(initial=-1) < 0 or len(owner) != array.shape[axis]:
                continue
            rest = tuple(a for a in range(array.ndim) if a != axis)
            norms = np.square(array, dtype=np.float64).mean(axis=rest)
            own = owner >= 0
            np.add.at(found, owner[own], norms[own] / max(float(norms[own].mean()), 1e-30))
            np.add.at(counted, owner[own], 1)
    return found / np.maximum(counted, 1)
