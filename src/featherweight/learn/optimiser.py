"""Adam whose step is a share of what each weight is made of, with its state by name so that it can be kept.

A network whose normalisations are folded has channels that differ in size by orders of magnitude; an equal step for all
would throw small ones about and leave large ones in place. So the step of each output channel is relative to its size
(as in Adafactor, Shazeer 2018, arXiv:1804.04235), and that of each scale of a quantizer to itself. Of codes what
counts there is how soon a code changes. (Adam: Kingma 2015, arXiv:1412.6980; decay: Loshchilov 2019, arXiv:1711.05101.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.99)
_TINY = 1e-12
#: A channel's step is at least this share of the whole weight's.
LEAST_SHARE = 0.1


class Adam:
    """Over named parameters. `units`: what a rate of 1 moves each weight by, broadcastable to it."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], units: Mapping[str, Tensor], *, decay: float = 0
    ) -> None:
        self._parameters = dict(parameters)
        self._units = {n: units[n] for n in self._parameters}
        self._decay = decay
        self.first = {n: torch.zeros_like(p) for n, p in self._parameters.items()}
        self.second = {n: torch.zeros_like(p) for n, p in self._parameters.items()}
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step with the gradients that are there; parameters without one stay."""
        self.steps += 1
        a, b = BETAS
        fix = (1 - b**self.steps) ** 0.5 / (1 - a**self.steps)
        for name, p in self._parameters.items():
            if p.grad is None:
                continue
            first, second, unit = self.first[name], self.second[name], self._units[name]
            first.lerp_(p.grad, 1 - a)
            second.mul_(b).addcmul_(p.grad, p.grad, value=1 - b)
            if self._decay:
                p.mul_(1 - rate * self._decay)
            p.sub_(first / second.sqrt().add_(_TINY) * unit, alpha=rate * fix)

    def zero(self) -> None:
        """Forget the gradients."""
        for p in self._parameters.values():
            p.grad = None

    def clip(self, most: float) -> float:
        """Scale all gradients down together so that their norm is at most `most`; the norm before."""
        with_gradient = [p for p in self._parameters.values() if p.grad is not None]
        return float(nn.utils.clip_grad_norm_(with_gradient, most)) if with_gradient else 0.0

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {f"first/{n}": x for n, x in self.first.items()} | {f"second/{n}": x for n, x in self.second.items()}

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take `state`'s tensors back. Raises KeyError if one is missing."""
        self.steps = steps
        for kind, mine in (("first", self.first), ("second", self.second)):
            for name, x in mine.items():
                x.copy_(tensors[f"{kind}/{name}"])


def unit_of(weight: Tensor) -> Tensor:
    """The size of each output channel (first axis) of a matrix or filter; that of the whole for other shapes."""
    whole = weight.detach().square().mean().sqrt().clamp_min(1e-8)
    if weight.ndim < 2:
        return whole.clamp_min(1e-3)
    rows = weight.detach().flatten(1).square().mean(1).sqrt()
    return torch.maximum(rows, LEAST_SHARE * whole).reshape(-1, *[1] * (weight.ndim - 1))
