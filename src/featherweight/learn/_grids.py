"""Grids that a trained weight stays on: the values its stored codes can stand for.

Each is a module from the latent float (and the scales or codebook, which may be trained too) to the rounded weight,
with a straight-through gradient; `codes` gives what is stored. A grid also works on a part of the rows of a table,
with the part of the scales that belongs to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.learn.ops.quantizing import along, fake_quantize, round_clip

Around = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Grid:
    """Where a trained weight is rounded at each use.

    `step`: distance between neighbouring values of the grid, broadcasts against the weight (of a codebook: its mean
    gap). `value`: name of the rounded weight in the graph; feed that one to `Executor.segment` to round it yourself.
    `around`: the value of the grid each weight is rounded to, how far it is to the next below and to the next above
    (0 at an end); None where `step` says it.
    """

    step: Tensor
    value: str
    around: Around | None = None


class Affine(nn.Module):
    """(code - zero) * scale with codes in low..high; scales per tensor, channel of `axis`, or block along it."""

    zero: Tensor | None

    def __init__(self, low: int, high: int, axis: int = 0, block: int = 0, zero: Tensor | None = None) -> None:
        super().__init__()
        self.low, self.high, self.axis, self.block = low, high, axis, block
        if zero is not None and not bool(zero.any()):
            zero = None
        self.register_buffer("zero", None if zero is None else zero.float(), persistent=False)

    def forward(self, latent: Tensor, scale: Tensor) -> Tensor:
        """The latent weight rounded to its grid."""
        step = along(scale.to(latent.dtype), latent, self.axis, self.block)
        return fake_quantize(latent, step, self._offset(latent), self.low, self.high)

    def _offset(self, latent: Tensor) -> Tensor | float:
        return 0.0 if self.zero is None else along(self.zero.to(latent.dtype), latent, self.axis, self.block)

    def spacing(self, latent: Tensor, scale: Tensor) -> Tensor:
        """Distance between neighbours: the scale, broadcast against the weight."""
        return along(scale.to(latent.dtype), latent, self.axis, self.block)

    def around(self, latent: Tensor, scale: Tensor) -> Around:
        """A step down and up, within the codes in use and within what the type holds."""
        step, codes = self.spacing(latent, scale), self.codes(latent, scale)
        offset = self._offset(latent)
        used = codes - offset
        low, high = (codes > self.low) & (used > used.min()), (codes < self.high) & (used < used.max())
        return used * step, step * low, step * high

    def codes(self, latent: Tensor, scale: Tensor) -> Tensor:
        """Integer codes in low..high."""
        step = along(scale.to(latent.dtype), latent, self.axis, self.block)
        steps = torch.nan_to_num(latent / step)  # a scale of 0 stands for 0 with any code
        return (torch.round(steps) + self._offset(latent)).clamp(self.low, self.high).to(torch.int32)


class Bias(nn.Module):
    """Codes of a bias in steps of its input's scale times its weight's, which integer kernels take for granted."""

    def __init__(self, grid: Affine) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, latent: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """The bias (channels,) rounded; scales `x` and `w` of one number or (channels,)."""
        value: Tensor = self.grid(latent, product(x, w))
        return value

    def spacing(self, latent: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """Distance between neighbours."""
        return self.grid.spacing(latent, product(x, w))

    def codes(self, latent: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """Integer codes."""
        return self.grid.codes(latent, product(x, w))


def product(x: Tensor, w: Tensor) -> Tensor:
    """The scale of a bias: flat, or one number."""
    made = x.reshape(-1).float() * w.reshape(-1).float()
    return made.reshape(()) if made.numel() == 1 else made


class Whole(nn.Module):
    """Codes themselves, read by an integer product: the weight in units of its scale, which stands elsewhere."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, latent: Tensor) -> Tensor:
        """Rounded to integers in low..high."""
        return round_clip(latent, self.low, self.high)

    def spacing(self, latent: Tensor) -> Tensor:
        """One."""
        return torch.ones((), dtype=latent.dtype, device=latent.device)

    def codes(self, latent: Tensor) -> Tensor:
        """The integers."""
        return torch.round(latent).clamp(self.low, self.high).to(torch.int32)


class _Nearest(torch.autograd.Function):
    """book[index]; the gradient goes to the latent weight as it is, and to the entries of the book that were read."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, book: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = book.shape
        return torch.gather(book, 1, index).reshape(latent.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        to_book = None
        if ctx.needs_input_grad[1]:
            to_book = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
            to_book.scatter_add_(1, index, grad.reshape(index.shape))
        return grad if ctx.needs_input_grad[0] else None, to_book, None


def nearest(latent: Tensor, book: Tensor) -> Tensor:
    """Index of the nearest entry: latent (groups, n), book (groups, levels) in any order -> (groups, n) int64."""
    ordered, order = torch.sort(book.detach(), dim=1)
    middles = ((ordered[:, 1:] + ordered[:, :-1]) / 2).contiguous()
    place = torch.searchsorted(middles, latent.detach().contiguous())
    return torch.gather(order, 1, place)


class Book(nn.Module):
    """Entries of a codebook, one for each of `groups` equal runs along axis 0 (Han 2016, Deep Compression)."""

    def __init__(self, groups: int, levels: int) -> None:
        super().__init__()
        self.groups, self.levels = groups, levels

    def _book(self, book: Tensor, latent: Tensor) -> Tensor:
        # What pads a codebook to a power of two repeats its last entry; indices must stay below `levels`.
        return book.reshape(self.groups, -1)[:, : self.levels].to(latent.dtype)

    def forward(self, latent: Tensor, book: Tensor) -> Tensor:
        """The latent weight moved to the nearest entries."""
        entries = self._book(book, latent)
        index = nearest(latent.reshape(self.groups, -1), entries)
        value: Tensor = _Nearest.apply(latent, entries, index)  # type: ignore[no-untyped-call]
        return value

    def spacing(self, latent: Tensor, book: Tensor) -> Tensor:
        """Mean gap of each group's entries, broadcast against the weight."""
        entries = self._book(book, latent)
        gap = (entries.amax(1) - entries.amin(1)) / max(self.levels - 1, 1)
        if self.groups == 1:
            return gap.reshape(())
        return gap.repeat_interleave(latent.shape[0] // self.groups).reshape(-1, *(1,) * (latent.ndim - 1))

    def around(self, latent: Tensor, book: Tensor) -> Around:
        """The nearest entries, and how far it is from them to the entries below and above."""
        entries = self._book(book, latent)
        ordered, _ = torch.sort(entries.detach(), dim=1)
        place = nearest(latent.reshape(self.groups, -1), ordered)
        here = torch.gather(ordered, 1, place)
        below = torch.gather(ordered, 1, (place - 1).clamp_min(0))
        above = torch.gather(ordered, 1, (place + 1).clamp_max(ordered.shape[1] - 1))
        shape = latent.shape
        return here.reshape(shape), (here - below).reshape(shape), (above - here).reshape(shape)

    def codes(self, latent: Tensor, book: Tensor) -> Tensor:
        """Indices into the book."""
        return nearest(latent.reshape(self.groups, -1), self._book(book, latent)).reshape(latent.shape)


class Vectors(nn.Module):
    """Runs of columns as vectors of a codebook (Jegou 2011): latent (..., groups * width)."""

    def __init__(self, groups: int, levels: int) -> None:
        super().__init__()
        self.groups, self.levels = groups, levels

    def spacing(self, latent: Tensor, book: Tensor) -> Tensor:
        """Spread of the vectors over the count of levels that one column would need: a scale, no exact distance."""
        along_a_column = float(self.levels) ** (1.0 / max(book.shape[-1], 1))
        spread: Tensor = book.detach().to(latent.dtype).std()
        return spread.mul(2.0 / along_a_column)

    def codes(self, latent: Tensor, book: Tensor) -> Tensor:
        """Index of the nearest vector of each run: (rows, groups)."""
        with torch.no_grad():
            entries = book.detach().to(latent.dtype).reshape(self.groups, self.levels, -1)
            runs = latent.detach().reshape(-1, self.groups, entries.shape[-1])
            found = [torch.cdist(runs[:, g], entries[g]).argmin(1) for g in range(self.groups)]
        return torch.stack(found, 1)

    def forward(self, latent: Tensor, book: Tensor) -> Tensor:
        """The latent table moved to the nearest vectors."""
        flat = book.to(latent.dtype).reshape(self.groups * self.levels, -1)
        first = torch.arange(self.groups, device=latent.device) * self.levels
        picked = flat[self.codes(latent, book) + first].reshape(latent.shape)
        return picked + (latent - latent.detach())


class Levels(nn.Module):
    """Integer codes out of a few allowed ones (an int8 codebook), scaled by a DequantizeLinear behind."""

    zero: Tensor | None

    def __init__(self, book: Book, axis: int, block: int, zero: Tensor | None) -> None:
        super().__init__()
        self.book, self.axis, self.block = book, axis, block
        self.register_buffer("zero", None if zero is None else zero.float(), persistent=False)

    def _steps(self, latent: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        step = along(scale.to(latent.dtype), latent, self.axis, self.block)
        zero = 0.0 if self.zero is None else along(self.zero.to(latent.dtype), latent, self.axis, self.block)
        return torch.nan_to_num(latent / step) + zero, step, zero

    def forward(self, latent: Tensor, scale: Tensor, book: Tensor) -> Tensor:
        """The latent weight moved to the nearest allowed codes."""
        steps, step, zero = self._steps(latent, scale)
        value: Tensor = (self.book(steps, book) - zero) * step
        return value

    def spacing(self, latent: Tensor, scale: Tensor, book: Tensor) -> Tensor:
        """Mean gap of the allowed codes times the scale."""
        steps, step, _ = self._steps(latent, scale)
        return self.book.spacing(steps, book) * step

    def around(self, latent: Tensor, scale: Tensor, book: Tensor) -> Around:
        """As of the book, in the weight's own units."""
        steps, step, zero = self._steps(latent, scale)
        here, below, above = self.book.around(steps, book)
        return (here - zero) * step, below * step, above * step

    def codes(self, latent: Tensor, scale: Tensor, book: Tensor) -> Tensor:
        """Indices into the book of allowed codes."""
        return self.book.codes(self._steps(latent, scale)[0], book)


class Masked(nn.Module):
    """A grid, or plain floats, of which some places are always 0 (pruned)."""

    mask: Tensor

    def __init__(self, mask: Tensor, inner: Affine | None) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self.inner = inner

    def forward(self, latent: Tensor, *parts: Tensor) -> Tensor:
        """The rounded weight, zeros kept."""
        value: Tensor = latent if self.inner is None else self.inner(latent, *parts)
        return value * self.mask

    def spacing(self, latent: Tensor, *parts: Tensor) -> Tensor | None:
        """That of the grid inside; None for plain floats."""
        return None if self.inner is None else self.inner.spacing(latent, *parts)

    def around(self, latent: Tensor, *parts: Tensor) -> Around | None:
        """That of the grid inside; what is always 0 has no neighbours. None for plain floats."""
        if self.inner is None:
            return None
        step, codes = self.inner.spacing(latent, *parts) * self.mask, self.inner.codes(latent, *parts)
        return self.forward(latent, *parts), step * (codes > self.inner.low), step * (codes < self.inner.high)

    def codes(self, latent: Tensor, *parts: Tensor) -> Tensor:
        """Codes everywhere; those behind the mask mean nothing."""
        return latent if self.inner is None else self.inner.codes(latent, *parts)


class Half(nn.Module):
    """Floats stored in a narrower type."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, latent: Tensor) -> Tensor:
        """Rounded to the narrow type, in the type of the latent weight."""
        return latent.to(self.kind).to(latent.dtype)

    def codes(self, latent: Tensor) -> Tensor:
        """The narrow values."""
        return latent.to(self.kind)


class Rows(nn.Module):
    """Rows of a table that stays coded: taken first, rounded after. `scaled_rows`: each row has scales of its own."""

    def __init__(self, grid: Affine | Book | Vectors, scaled_rows: bool) -> None:
        super().__init__()
        self.grid, self.scaled_rows = grid, scaled_rows

    def forward(self, latent: Tensor, index: Tensor, part: Tensor) -> Tensor:
        """Rows `index` (any shape, negative from the end) of the rounded table: index shape + (columns,)."""
        index = index.long()
        index = torch.where(index < 0, index + latent.shape[0], index)
        rows = nn.functional.embedding(index, latent)
        value: Tensor = self.grid(rows, self._of_rows(part, index, rows))
        return value

    def _of_rows(self, part: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        if not self.scaled_rows:
            return part
        scale = part[index]  # (..., 1) a row, (..., blocks, 1) blocks of a row
        if scale.ndim > rows.ndim:
            blocks = scale.squeeze(-1)
            return blocks.repeat_interleave(rows.shape[-1] // blocks.shape[-1], -1)
        return scale

    def spacing(self, latent: Tensor, part: Tensor) -> Tensor:
        """That of the whole table."""
        index = torch.arange(latent.shape[0], device=latent.device)
        return self.grid.spacing(latent, self._of_rows(part, index, latent))

    def codes(self, latent: Tensor, part: Tensor) -> Tensor:
        """Codes of the whole table."""
        index = torch.arange(latent.shape[0], device=latent.device)
        return self.grid.codes(latent, self._of_rows(part, index, latent))
