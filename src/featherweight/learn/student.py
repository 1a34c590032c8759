"""The student while it learns: its executor, what is trained at which pace, and what that takes in memory."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from featherweight.errors import BudgetError, ModelError
from featherweight.learn._choices import Scales
from featherweight.learn.execute import Executor
from featherweight.learn.optimiser import unit_of
from featherweight.quantities import format_bytes

#: Values of each weight that training keeps: the weight, its gradient, two moments, the best so far.
COPIES = 5
#: Names told in a message.
NAMED = 8
#: Torch and its kernels need this beside what is counted, as a share and in bytes.
SLACK, BASE_BYTES = 1.25, 100 << 20


@dataclass(frozen=True)
class Footprint:
    """Predicted bytes of training: of weights, of values kept for the gradients of one sample, and beside them."""

    weights: int
    sample: int
    kept: int
    before: int

    def peak(self, micro: int) -> int:
        """Predicted peak of the process with micro-batches of `micro` samples."""
        return int(self.before + BASE_BYTES + self.weights + SLACK * micro * self.sample)

    def peak_recomputing(self, micro: int) -> int:
        """The same where inner values are computed again in the backward pass."""
        return int(self.before + BASE_BYTES + self.weights + SLACK * micro * self.kept)


@dataclass(frozen=True)
class Fit:
    """How a step is done within the limit: samples at a time, and whether inner values are computed again."""

    micro: int
    recompute: bool
    predicted: int


def fit_memory(print_: Footprint, batch: int, limit: int | None) -> Fit:
    """The largest micro-batch that is predicted to fit; recomputing where one sample does not.

    Raises BudgetError, with the least that would do, where nothing fits.
    """
    if limit is None:
        return Fit(batch, False, print_.peak(batch))
    for recompute, peak in ((False, print_.peak), (True, print_.peak_recomputing)):
        micro = batch
        while micro > 1 and peak(micro) > limit:
            micro = (micro + 1) // 2
        if peak(micro) <= limit:
            return Fit(micro, recompute, peak(micro))
    raise BudgetError(
        f"training this student takes at least {format_bytes(print_.peak_recomputing(1))}, one sample at a time, but "
        f"--max-memory is {format_bytes(limit)}; raise it or take a smaller student"
    )


class Student:
    """An executor with its inputs' memory layout, optional recomputation, and learning rates by weight."""

    def __init__(self, model: ir.Model, *, train_scales: Scales, freeze: Sequence[str] = ()) -> None:
        """`freeze`: patterns of names of weights that stay. Raises ModelError for one that fits no weight."""
        self.model = model
        self.executor = Executor(model, train_scales=train_scales).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._parts: list[tuple[Callable[[Mapping[str, Tensor]], dict[str, Tensor]], tuple[str, ...]]] = []
        self._outputs = [v.name or "" for v in model.graph.outputs]
        known = self.executor.parameters_by_name()
        for pattern in freeze:
            fits = fnmatch.filter(known, pattern)
            if not fits:
                raise ModelError(f"no weight to freeze is named {pattern!r}; weights are {_some(known)}")
            for name in fits:
                for part in (name, *self.executor.parts_of(name)):
                    if part in known:
                        known[part].requires_grad_(False)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All that is trained, by name."""
        return {n: p for n, p in self.executor.parameters_by_name().items() if p.requires_grad}

    def units(self) -> dict[str, Tensor]:
        """What a learning rate of 1 moves each weight by."""
        scales = self.executor.scales()
        return {n: p.detach().abs() if n in scales else unit_of(p) for n, p in self.parameters().items()}

    def forward(self, feeds: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Outputs and inner tensors by name."""
        if not self._parts or not torch.is_grad_enabled():
            return self.executor(feeds, fetch=names)  # type: ignore[no-any-return]
        return self._recomputing(feeds, names)

    def recompute_between(self, places: Sequence[str], starts: Sequence[Sequence[str]]) -> None:
        """Keep only the values at these places in training; `starts`: what the part that ends at each reads, and last
        what the part behind the last place reads.
        """
        self.keep_everything()
        for place, reads in zip([*places, None], starts, strict=True):
            outputs = self._outputs if place is None else [place]
            self._parts.append((self.executor.segment(reads, outputs), tuple(reads)))

    def keep_everything(self) -> None:
        """Recompute nothing."""
        self._parts = []

    def _recomputing(self, feeds: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = dict(feeds)
        for part, reads in self._parts:

            def run(*given: Tensor, part: Any = part, reads: tuple[str, ...] = reads) -> Any:
                return part(dict(zip(reads, given, strict=True)))

            values |= checkpoint(run, *(values[n] for n in reads), use_reentrant=False)
        absent = [n for n in names if n not in values]
        if absent:
            raise BudgetError(f"inner tensors between recomputed parts cannot be matched: {absent}")
        return {n: values[n] for n in (*self._outputs, *names)}


def _some(names: Iterable[str]) -> str:
    """A few names in order."""
    ordered = sorted(names)
    return ", ".join(ordered[:NAMED]) + (f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else "")


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes of the distinct tensors that a forward pass keeps for its backward pass."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(seen.values())


def resident_bytes(field: str = "VmRSS") -> int:
    """Memory of this process by the kernel's count (VmRSS now, VmHWM at most); 0 where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as f:
            for line in f:
                if line.startswith(field):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
