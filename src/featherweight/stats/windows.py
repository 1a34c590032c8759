"""Which input positions an output position of a convolution reads: the index arithmetic of im2col, any rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Window:
    """The geometry of one Conv or ConvTranspose; every tuple has one entry a spatial axis.

    `pads` is None where `auto_pad` decides. `output_padding`/`output_shape` belong to ConvTranspose only.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()

    def layout(self, sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Spatial input sizes -> (pad in front of each axis, output sizes), as in the ONNX operator text."""
        rank = len(self.kernel)
        begins, outs = [], []
        for a in range(rank):
            reach = (self.kernel[a] - 1) * self.dilations[a] + 1
            if self.transposed:
                begin, out = self._transposed_axis(a, sizes[a], reach)
            elif self.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
                out = -(-sizes[a] // self.strides[a])
                total = max((out - 1) * self.strides[a] + reach - sizes[a], 0)
                begin = total // 2 if self.auto_pad == "SAME_UPPER" else total - total // 2
            else:
                begin, end = (self.pads[a], self.pads[a + rank]) if self.auto_pad != "VALID" else (0, 0)
                out = (sizes[a] + begin + end - reach) // self.strides[a] + 1
            begins.append(begin)
            outs.append(max(out, 0))
        return tuple(begins), tuple(outs)

    def _transposed_axis(self, a: int, size: int, reach: int) -> tuple[int, int]:
        rank = len(self.kernel)
        extra = self.output_padding[a] if self.output_padding else 0
        full = self.strides[a] * (size - 1) + extra + reach
        if self.output_shape or self.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            out = self.output_shape[-rank:][a] if self.output_shape else size * self.strides[a]
            total = max(full - out, 0)
            small = total // 2
            return (small if self.auto_pad == "SAME_UPPER" else total - small), out
        if self.auto_pad == "VALID":
            return 0, full
        return self.pads[a], full - self.pads[a] - self.pads[a + rank]

    def positions(self, sizes: Sequence[int], *, limit: int, rng: np.random.Generator) -> I64:
        """Output positions (p, rank), all of them or `limit` drawn without replacement."""
        outs = self.layout(sizes)[1]
        count = int(np.prod(outs))
        flat = np.arange(count) if count <= limit else np.sort(rng.choice(count, limit, replace=False))
        return np.stack(np.unravel_index(flat, outs), axis=1).astype(np.int64).reshape(-1, len(outs))

    def sources(self, sizes: Sequence[int], positions: I64) -> I64:
        """Flat input position read at each (position, kernel offset), (p, prod kernel); -1 is padding.

        Kernel offsets are in C order of the stored kernel, also for a ConvTranspose (not flipped).
        """
        begins, _ = self.layout(sizes)
        flat = np.zeros((len(positions), 1), np.int64)
        valid = np.ones((len(positions), 1), bool)
        for a, size in enumerate(sizes):
            offset = np.arange(self.kernel[a]) * self.dilations[a]
            if self.transposed:
                stuffed = positions[:, a, None] + begins[a] - offset
                at, fits = stuffed // self.strides[a], stuffed % self.strides[a] == 0
            else:
                at = positions[:, a, None] * self.strides[a] - begins[a] + offset
                fits = np.ones_like(at, bool)
            fits &= (at >= 0) & (at < size)
            flat = (flat[:, :, None] * size + at[:, None, :]).reshape(len(positions), -1)
            valid = (valid[:, :, None] & fits[:, None, :]).reshape(len(positions), -1)
        return np.where(valid, flat, -1)


def columns(x: F32, window: Window, *, groups: int, limit: int, rng: np.random.Generator) -> F32:
    """Array x (n, c, *spatial) -> rows (groups, n * p, c / groups * prod kernel) in order (in_channel, *kernel).

    At most `limit` output positions a sample are drawn. Padding reads 0.
    """
    n, c = x.shape[:2]
    sizes = x.shape[2:]
    sources = window.sources(sizes, window.positions(sizes, limit=limit, rng=rng))
    p, k = sources.shape
    flat = x.reshape(n, c, -1)
    if k == 1 and p == flat.shape[2] and np.array_equal(sources[:, 0], np.arange(p)):
        taken = flat[..., None]
    else:
        taken = flat[:, :, np.maximum(sources, 0)]
        if (sources < 0).any():
            taken *= (sources >= 0).astype(np.float32)
    grouped = taken.reshape(n, groups, c // groups, p, k)
    return grouped.transpose(1, 0, 3, 2, 4).reshape(groups, n * p, c // groups * k)
