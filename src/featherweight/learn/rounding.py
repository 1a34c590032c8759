"""Learned rounding: which codes of a weight move by one step is learned together, not decided weight by weight.

AdaRound (Nagel 2020, arXiv:2004.10568) learns for each weight whether to round down or up. Here the codes come from
error-compensated rounding already, so each may go one step down, stay, or go one step up: a soft move in -1..1 that a
growing penalty drives to a whole number while the block's answer is fitted.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from featherweight.learn._grids import Around, Grid
from featherweight.learn.execute import Executor

#: The soft move is tanh stretched by this and cut off, so that whole moves are reached (as AdaRound's sigmoid).
STRETCH = 1.2
#: Exponent of the penalty: it begins blunt and ends sharp.
FIRST_POWER, LAST_POWER = 20.0, 2.0
#: Share of the training before the penalty begins.
FREE = 0.4
#: What a learning rate of 1 moves the variable behind a soft move by.
UNIT = 50.0
#: A weight lies on its grid if it is this share of a step near to it.
EVEN = 1e-2


class Moves(nn.Module):
    """Values of one weight and their soft moves. `down`, `up`: how far the next values are; 0 where there is none."""

    def __init__(self, here: Tensor, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.here, self.down, self.up = here, down, up
        self.variable = nn.Parameter(torch.zeros_like(here))

    def moves(self) -> Tensor:
        """Soft moves in -1..1."""
        return (STRETCH * torch.tanh(self.variable)).clamp(-1, 1)

    def weight(self, *, hard: bool) -> Tensor:
        """The weight with its codes moved; `hard`: by whole steps, as a file will have it."""
        move = torch.round(self.moves()) if hard else self.moves()
        return self.here + move.clamp_min(0) * self.up + move.clamp_max(0) * self.down

    def penalty(self, done: float) -> Tensor:
        """Mean of 1 - |2|m| - 1|^power over the moves m: 0 where all are whole; none before `FREE`."""
        if done < FREE:
            return self.variable.new_zeros(())
        power = FIRST_POWER + (LAST_POWER - FIRST_POWER) * (done - FREE) / (1 - FREE)
        return (1 - (2 * self.moves().abs() - 1).abs() ** power).mean()


class Rounding:
    """Learned moves of those weights that lie on a grid of codes; the others are left to straight-through steps."""

    def __init__(self, executor: Executor, names: Iterable[str]) -> None:
        self._parameters = executor.parameters_by_name()
        self._moves: dict[str, Moves] = {}
        self._values: dict[str, str] = {}
        grids = executor.grids()
        for name in names:
            if name not in grids or name not in self._parameters:
                continue
            around = _around(self._parameters[name].detach(), grids[name])
            if around is not None:
                self._moves[name] = Moves(*around)
                self._values[name] = grids[name].value

    def __bool__(self) -> bool:
        return bool(self._moves)

    @property
    def names(self) -> tuple[str, ...]:
        """The weights whose moves are learned."""
        return tuple(self._moves)

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the rounded weights in the graph, to be fed."""
        return tuple(self._values.values())

    def weights(self, *, hard: bool = False) -> dict[str, Tensor]:
        """The moved weights by these names."""
        return {self._values[n]: m.weight(hard=hard) for n, m in self._moves.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by `NAME#moves`."""
        return {f"{n}#moves": m.variable for n, m in self._moves.items()}

    def units(self) -> dict[str, Tensor]:
        """Learning-rate units of the parameters."""
        return {f"{n}#moves": torch.tensor(UNIT) for n in self._moves}

    def penalty(self, done: float) -> Tensor:
        """Mean penalty over the weights."""
        return torch.stack([m.penalty(done) for m in self._moves.values()]).mean()

    @torch.no_grad()
    def settle(self) -> None:
        """Give the executor the weights with their codes moved by whole steps."""
        for name, m in self._moves.items():
            self._parameters[name].copy_(m.weight(hard=True))


def _around(latent: Tensor, grid: Grid) -> Around | None:
    """Value, distance down and distance up of a matrix or filter that lies on its grid; None for any other.

    Codes on even steps stay within those in use.
    """
    if latent.ndim < 2:
        return None
    if grid.around is not None:
        here, down, up = (x.detach().expand_as(latent).contiguous() for x in grid.around)
        on_grid = float(((here - latent).abs() - EVEN * grid.step).max()) < 0
        return (here, down, up) if on_grid else None
    step = grid.step.detach().expand_as(latent)
    steps = torch.nan_to_num(latent / step)
    base = steps.round()
    if float((steps - base).abs().max()) >= EVEN:
        return None
    zero = torch.zeros_like(step)
    down, up = torch.where(base > base.min(), step, zero), torch.where(base < base.max(), step, zero)
    return base * step, down, up
