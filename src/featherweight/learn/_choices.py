"""What may be asked of a training, in words; known without torch."""

from __future__ import annotations

from typing import Literal, get_args

Scales = Literal["none", "weights", "all"]
"""Which scales are trained: of weights, with their codebooks, or of activations too."""
Rounding = Literal["straight", "learned"]
"""How blocks learn weights on grids: straight through the rounding, or by moves of codes."""
SCALES: tuple[str, ...] = get_args(Scales)
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
