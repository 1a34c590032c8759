"""Which channels of a group go first, what each step costs, and how the readers' weights make up for it.

Channels are removed greedily, always the unit whose loss the survivors can make up for best: the structured form of
the optimal brain surgeon (Hassibi 1993; Frantar 2022, arXiv:2208.11580, section 4; Kurtic 2023, ZipLM,
arXiv:2302.04089). Errors are those of the layers that read the channels, in closed form from their inputs' second
moments, after the readers' weights were solved anew by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Site
from featherweight.errors import TechniqueError
from featherweight.graph import channels as ch
from featherweight.graph import surgery
from featherweight.graph.channels import Channels, Group, Reading
from featherweight.graph.weights import Weight, weights
from featherweight.techniques import _absorb, _ends, _obs
from featherweight.techniques._protocol import Context

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
#: Kept widths are multiples of this many channels where a group has at least four times as many.
MULTIPLE = 8
#: Shares of a group's units that options keep, before rounding to multiples.
SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3, 0.2, 0.1)
#: An input whose power is below this share of its neighbours' is taken for one that never comes.
NOTHING = 1e-12


@dataclass(frozen=True)
class Ranked:
    """A group with its units in the order in which they go.

    `noise` (units, tensors): E||dy||^2 / E||y - mean y||^2 at each reader after the first n + 1 units went; where
    channels end without a reader, their share of the power there. `tensors`: readers and makers, one a column;
    `most`: how many units may go without emptying anything.
    """

    group: Group
    order: I64
    noise: F64
    most: int
    tensors: tuple[str, ...]

    def removed(self, keep: int) -> I64:
        """Classes of slots that go when `keep` units stay."""
        gone = self.order[: len(self.group.units) - keep]
        return np.concatenate([np.zeros(0, np.int64), *[self.group.units[int(u)] for u in gone]])

    def noise_at(self, keep: int) -> F64:
        """Noise at each of `tensors` when `keep` units stay."""
        gone = len(self.group.units) - keep
        return self.noise[gone - 1] if gone else np.zeros(self.noise.shape[1])


@dataclass(frozen=True)
class _Consumer:
    """One reading as a matrix (out, k) with the second moments (k, k) of its input, and its signal."""

    matrix: F32
    second: F64
    signal: float


def analysis(model: ir.Model, ctx: Context) -> Channels:
    """The model's channels, followed once a model as long as it does not change."""
    known = ctx.cache.get("channels")
    if known is None or known[0] is not model:
        known = ctx.cache["channels"] = (model, ch.analyse(model))
    found: Channels = known[1]
    return found


def site_of(model: ir.Model, group: Group) -> Site:
    """The group as a place of one choice: all tensors that shrink with it."""
    stored = {v.name: v for g in model.graphs() for v in g.initializers.values()}
    size = sum(_nbytes(stored[name]) for name in group.tensors if name in stored)
    return Site(group.name, "channel_group", group.tensors, group.nodes, size)


def _nbytes(value: ir.Value) -> int:
    return value.const_value.nbytes if value.const_value is not None else 0


def group_of(channels: Channels, name: str) -> Group:
    """The group called `name`. Raises TechniqueError."""
    for group in channels.groups:
        if group.name == name:
            return group
    raise TechniqueError(f"a site must be a group of removable channels of this model, but {name!r} is none")


def ranked(model: ir.Model, group: Group, ctx: Context) -> Ranked:
    """The order of removal and its costs; kept in `ctx.cache`."""
    gains = tuple(_gain(ctx, reading) for reading in group.readings)
    key = ("channel_prune", ctx.stats.key if ctx.stats else "", group.name, gains)
    if key not in ctx.cache:
        ctx.cache[key] = _ranked(analysis(model, ctx), group, model, ctx)
    found: Ranked = ctx.cache[key]
    return found


def _ranked(channels: Channels, group: Group, model: ir.Model, ctx: Context) -> Ranked:
    if group.parts is not None:
        group = _paired_by_weight(channels, group, model, ctx)
    consumers = [_consumer(model, r, ctx) for r in group.readings]
    ending = _ends.ending(channels, group)
    if not consumers or ending.any():
        makers, share = _ends.shares(channels, group, ctx)
        share = share if not consumers else np.where(ending, share, 0.0)
    else:
        makers, share = (), np.zeros(len(group.units))
    if not consumers:
        order = np.argsort(share, kind="stable")
        return _within_floors(group, order, _spread(share[order], makers), makers)
    scales = [_gain(ctx, r) / max(c.signal, 1e-30) for r, c in zip(group.readings, consumers, strict=True)]
    silent = [u for u in _silent(group, consumers) if not share[u]]
    rest = [u for u in range(len(group.units)) if u not in silent]
    order, errors = _obs.removal_order(
        [c.matrix for c in consumers],
        [c.second for c in consumers],
        [[r.columns[u] for u in rest] for r in group.readings],
        scales,
        besides=share[rest] * max(_gain_of(ctx, m) for m in makers) if makers else None,
    )
    signals = np.array([max(c.signal, 1e-30) for c in consumers])
    noise = np.concatenate([np.zeros((len(silent), len(consumers))), np.maximum(errors, 0.0) / signals])
    going = np.array([*silent, *(rest[i] for i in order)], np.int64)
    noise = np.concatenate([noise, _spread(share[going], makers)], axis=1)
    return _within_floors(group, going, noise, (*(r.tensor for r in group.readings), *makers))


def _spread(share: F64, makers: Sequence[str]) -> F64:
    """(units, makers): what is gone after each unit, dealt out among the makers."""
    return np.repeat(np.cumsum(share)[:, None], len(makers), axis=1) / max(len(makers), 1)


def _silent(group: Group, consumers: Sequence[_Consumer]) -> list[int]:
    """Units of which no reader sees anything change: dead channels, and constant ones where a bias takes them."""
    quiet = [
        np.abs(np.diag(c.second)) <= NOTHING * max(float(np.trace(c.second)) / len(c.second), 0) for c in consumers
    ]
    return [
        u for u in range(len(group.units))
        if all(q[r.columns[u]].all() for q, r in zip(quiet, group.readings, strict=True))
    ]  # fmt: skip


def _gain(ctx: Context, reading: Reading) -> float:
    return _gain_of(ctx, reading.tensor)


def _gain_of(ctx: Context, tensor: str) -> float:
    return max(ctx.gains.get(tensor, 1.0), 1e-6)


def _consumer(model: ir.Model, reading: Reading, ctx: Context) -> _Consumer:
    weight = ctx.weight(model, reading.tensor)
    found = _absorb.moments(weight, ctx)
    matrix = weight.to_matrix(weight.array())
    part = matrix[reading.part]
    second = in_full(found, part.shape[1], reading.part)
    signal = _absorb.signal(matrix[reading.part : reading.part + 1], _part(found, reading.part), weight, ctx)
    return _Consumer(part, second, signal)


def _part(found: _absorb.Moments, part: int) -> _absorb.Moments:
    return _absorb.Moments(
        None if found.matrix is None else found.matrix[part : part + 1],
        None if found.mean is None else found.mean[part : part + 1],
    )


def in_full(found: _absorb.Moments, k: int, part: int) -> F64:
    """(k, k) second moments of one part; a diagonal is spread out, none at all is the identity."""
    if found.matrix is None:
        return np.eye(k)
    own = found.matrix[part]
    return np.diag(own) if own.ndim == 1 else own


def _paired_by_weight(channels: Channels, group: Group, model: ir.Model, ctx: Context) -> Group:
    """Units put together from the least important of each part, where the graph can stand that; else as they lie."""
    if group.parts is None:
        return group
    atoms = np.unique(group.parts)
    alone = ch.repaired(channels, group, atoms[None])
    score = np.zeros(len(atoms))
    for reading in alone.readings:
        c = _consumer(model, reading, ctx)
        scale = _gain(ctx, reading) / max(c.signal, 1e-30)
        for u, columns in enumerate(reading.columns):
            block = c.matrix[:, columns].astype(np.float64)
            score[u] += scale * float(np.einsum("ok,kl,ol->", block, c.second[np.ix_(columns, columns)], block))
    by_atom = dict(zip(atoms.tolist(), score.tolist(), strict=True))
    rows = np.array([sorted(row.tolist(), key=lambda a: (by_atom[a], a)) for row in group.parts])
    paired = ch.repaired(channels, group, rows)
    half = np.concatenate(paired.units[: max(len(paired.units) // 2, 1)])
    one = paired.units[0]
    return group if ch.cuttable(channels, half) or ch.cuttable(channels, one) else paired


def _within_floors(group: Group, order: I64, noise: F64, tensors: tuple[str, ...]) -> Ranked:
    """Units that a floor needs go to the end."""
    left = [len(f) for f in group.floors]
    where = [[i for i, f in enumerate(group.floors) if u in f] for u in range(len(order))]
    going: list[int] = []
    for u in order.tolist():
        if len(going) < len(order) - 1 and all(left[i] > 1 for i in where[u]):
            going.append(u)
            for i in where[u]:
                left[i] -= 1
    staying = [u for u in order.tolist() if u not in set(going)]
    return Ranked(group, np.array([*going, *staying], np.int64), noise, len(going), tensors)


def widths(group: Group, channels: Channels, found: Ranked, *, thorough: bool) -> list[int]:
    """Unit counts worth offering, falling: multiples that kernels like where the group is wide, and all dead ones."""
    n = len(group.units)
    each = channels.width(group)
    step = MULTIPLE // math.gcd(MULTIPLE, each)
    if n < 4 * step:
        step = 1 if n < 16 else max(1, step // 2)
    shares = SHARES if thorough else SHARES[::2]
    wanted = {max(step, round(share * n / step) * step) for share in shares} if n > step else set()
    if n >= 8 * step:  # integer kernels like twice the multiple
        wanted |= {max(2 * step, round(share * n / (2 * step)) * 2 * step) for share in shares}
    if n <= 16:
        wanted |= set(range(1, n))
    dead = int((found.noise.sum(axis=1) == 0).sum()) if found.noise.shape[1] else 0
    if dead:
        wanted |= {n - dead, -(-(n - dead) // step) * step}
    least = n - found.most
    return sorted((k for k in wanted if least <= k < n and k >= 1), reverse=True)


def macs(model: ir.Model, ctx: Context) -> dict[str, int]:
    """Multiply-accumulates by node name (dotted in sub-graphs), counted once a model."""
    return {n.name: n.macs or 0 for n in ctx.costs(model).nodes}


def compensate(model: ir.Model, removed: Sequence[tuple[Ranked, int]], ctx: Context) -> None:
    """Solve the readers' weights anew for what will be left, in place; removed columns become zero.

    `removed`: each group with the number of units kept. Biases take the mean of what is lost.
    """
    lost: dict[str, dict[int, set[int]]] = {}
    for found, keep in removed:
        for reading in found.group.readings:
            for u in found.order[: len(found.group.units) - keep]:
                lost.setdefault(reading.tensor, {}).setdefault(reading.part, set()).update(
                    reading.columns[int(u)].tolist()
                )
    known = {w.name: w for w in weights(model)}
    for name, parts in lost.items():
        if name in known:
            _solve_anew(model, known[name], parts, ctx)


def _solve_anew(model: ir.Model, weight: Weight, parts: dict[int, set[int]], ctx: Context) -> None:
    found = _absorb.moments(weight, ctx)
    matrix = weight.to_matrix(weight.array())
    solved = matrix.copy()
    for part, gone in parts.items():
        columns = np.array(sorted(gone), np.int64)
        stay = np.setdiff1d(np.arange(matrix.shape[2]), columns)
        solved[part][:, columns] = 0
        if found.matrix is None or not stay.size:
            continue
        second = in_full(found, matrix.shape[2], part)
        if np.abs(np.diag(second)[columns]).max(initial=0) <= NOTHING * float(np.trace(second)) / len(second):
            continue  # nothing ever comes in there: the rest stays bit by bit
        solved[part][:, stay] = _obs.resolved(matrix[part], second, stay)[:, : len(stay)]
    if not np.isfinite(solved).all():
        return
    shift, place = _absorb.mean_shift(matrix - solved, found), _absorb.slot(weight)
    surgery.set_initializer(weight.value, weight.from_matrix(solved).astype(weight.dtype), dtype=weight.value.dtype)
    if shift is not None and place is not None and np.abs(shift).max(initial=0) > 0:
        _absorb.absorb(model, place, shift, weight.name)
