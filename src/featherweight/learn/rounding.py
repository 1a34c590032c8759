"""Learned rounding: which codes of a weight move by one step is learned together, not decided weight by weight.

AdaRound (Nagel 2020, arXiv:2004.10568) learns for each weight whether to round down or up. Here the codes come from
error-compensated rounding already, so each may go one step down, stay, or go one step up: a soft move in -1..1 that a
growing penalty drives to a whole number while the block's answer is fitted.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from featherweight.learn.execute import Executor

#: The soft move is tanh stretched by this and cut off, so that whole moves are reached (as AdaRound's sigmoid).
STRETCH = 1.2
#: Exponent of the penalty: it begins blunt and ends sharp.
FIRST_POWER, LAST_POWER = 20.0, 2.0
#: Share of the training before the penalty begins.
FREE = 0.4
#: What a learning rate of 1 moves the variable behind a soft move by.
UNIT = 50.0
#: A weight lies on an even grid if it is this near to whole steps.
EVEN = 1e-2


class Moves(nn.Module):
    """Codes of one weight and their soft moves; `base` in steps, whole numbers that stay within those in use."""

    def __init__(self, base: Tensor, step: Tensor) -> None:
        super().__init__()
        self.base, self.step = base, step
        self.low, self.high = float(base.min()), float(base.max())
        self.variable = nn.Parameter(torch.zeros_like(base))

    def moves(self) -> Tensor:
        """Soft moves in -1..1."""
        return (STRETCH * torch.tanh(self.variable)).clamp(-1, 1)

    def weight(self, *, hard: bool) -> Tensor:
        """The weight with its codes moved; `hard`: by whole steps, as a file will have it."""
        move = self.moves()
        codes = self.base + (torch.round(move) if hard else move)
        return codes.clamp(self.low, self.high) * self.step

    def penalty(self, done: float) -> Tensor:
        """Mean of 1 - |2|m| - 1|^power over the moves m: 0 where all are whole; none before `FREE`."""
        if done < FREE:
            return self.variable.new_zeros(())
        power = FIRST_POWER + (LAST_POWER - FIRST_POWER) * (done - FREE) / (1 - FREE)
        return (1 - (2 * self.moves().abs() - 1).abs() ** power).mean()


class Rounding:
    """Learned moves of those weights that lie on an even grid; the others are left to straight-through steps."""

    def __init__(self, executor: Executor, names: Iterable[str]) -> None:
        self._parameters = executor.parameters_by_name()
        self._moves: dict[str, Moves] = {}
        self._values: dict[str, str] = {}
        grids = executor.grids()
        for name in names:
            if name not in grids or name not in self._parameters:
                continue
            latent, grid = self._parameters[name].detach(), grids[name]
            steps = torch.nan_to_num(latent / grid.step)
            if latent.ndim > 1 and float((steps - steps.round()).abs().max()) < EVEN:
                self._moves[name] = Moves(steps.round(), grid.step.detach())
                self._values[name] = grid.value

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
