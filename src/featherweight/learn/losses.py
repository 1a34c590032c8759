"""What a student is taught to match of its teacher, chosen by what the outputs are.

Distributions by the Kullback-Leibler divergence at a temperature (Hinton 2015, arXiv:1503.02531), embeddings by their
direction and by their mutual similarities (relational knowledge, Park 2019, arXiv:1904.05068), hidden states and other
numbers by squared error relative to the teacher's (FitNets, Romero 2015, arXiv:1412.6550).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import DataError
from featherweight.runtime import outputs as runtime_outputs
from featherweight.runtime.metrics import Metric
from featherweight.runtime.scores import are_probabilities

Kind = Literal["logits", "probabilities", "embedding", "values"]
Loss = Literal["auto", "kl", "embedding", "mse"]
LOSSES: tuple[str, ...] = get_args(Loss)
Array = npt.NDArray[Any]
_TINY = 1e-9
#: Positions for each channel of a map between features: fewer are learned by heart, and the map says nothing of others.
ENOUGH = 30
_SAYS: Mapping[Kind, str] = {
    "logits": "KL divergence of class scores",
    "probabilities": "KL divergence of probabilities",
    "embedding": "cosine, relations between samples and squared error of embeddings",
    "values": "relative squared error",
}


@dataclass(frozen=True)
class Target:
    """One output to match. `axis`: of the classes; `why`: the reason in words."""

    name: str
    kind: Kind
    axis: int
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {_SAYS[self.kind]} ({self.why})"


def choose(outputs: Mapping[str, Array], metric: Metric, asked: str = "auto") -> tuple[Target, ...]:
    """How each float output is matched: by the metric that reads it, else by what its values are.

    `outputs`: the teacher's on one batch. Raises DataError for an unknown loss, or where no output holds floats.
    """
    if asked not in LOSSES:
        raise DataError(f"loss must be one of {', '.join(LOSSES)}, but got {asked!r}")
    floats = {n: v for n, v in outputs.items() if v.dtype.kind == "f" and v.size}
    if not floats:
        raise DataError(f"a teacher must give floats to be matched, but the outputs are {_shapes(outputs)}")
    read = set(metric.select(floats)) if metric.kind in ("class", "vector") else set()
    chosen = []
    for name, value in floats.items():
        kind, why = _kind(name, value, metric, name in read)
        if asked != "auto":
            wanted: dict[str, Kind] = {"kl": "logits", "embedding": "embedding", "mse": "values"}
            kind, why = (kind if asked == "kl" and kind == "probabilities" else wanted[asked]), "as asked"
        if kind in ("logits", "probabilities") and (value.ndim < 2 or value.shape[_class_axis(value)] < 2):
            kind, why = "values", f"{value.shape} holds no scores of two or more classes"
        chosen.append(Target(name, kind, _class_axis(value) if value.ndim > 1 else 0, why))
    return tuple(chosen)


def _kind(name: str, value: Array, metric: Metric, read: bool) -> tuple[Kind, str]:
    low = name.lower()
    if value.ndim >= 2 and are_probabilities(np.moveaxis(value, _class_axis(value), -1)):
        return "probabilities", "every row sums to one"
    if read and metric.kind == "class":
        return "logits", f"the metric {metric.name} reads it as class scores"
    if any(w in low for w in runtime_outputs.CLASS_WORDS) and not any(w in low for w in runtime_outputs.VECTOR_WORDS):
        return "logits", "its name says class scores"
    if read or (value.ndim in (2, 3) and any(w in low for w in runtime_outputs.VECTOR_WORDS)):
        return "embedding", f"the metric {metric.name} reads vectors" if read else "its name says vectors"
    if value.ndim == 2 and metric.kind in ("vectors", "vector"):
        return "embedding", "one vector a sample"
    return "values", "neither class scores nor embeddings"


def _class_axis(value: Array) -> int:
    return value.ndim - 1 if value.ndim in (2, 3) else 1


def _shapes(outputs: Mapping[str, Array]) -> str:
    return ", ".join(f"{n} {v.dtype} {v.shape}" for n, v in outputs.items()) or "none"


def output_loss(target: Target, student: Tensor, teacher: Tensor, *, temperature: float, mask: Tensor | None) -> Tensor:
    """The loss of one output, a mean over samples and positions; `mask` (rows, tokens) says which positions count."""
    if mask is not None and student.ndim == 3:
        keep = mask.bool()
        if target.kind == "embedding":
            pooled = [_pooled(x, mask) for x in (student, teacher)]
            return embedding(*pooled) + relative(student[keep], teacher[keep])
        student, teacher = student[keep], teacher[keep]
        axis = -1
    else:
        axis = target.axis
    if target.kind in ("logits", "probabilities"):
        already = target.kind == "probabilities"
        return divergence(student, teacher, axis=axis, temperature=temperature, probabilities=already)
    if target.kind == "embedding":
        flat = [x.mean(1) if x.ndim == 3 else x.flatten(1) for x in (student, teacher)]
        return embedding(*flat) + relative(student, teacher)
    return relative(student, teacher)


def divergence(
    student: Tensor, teacher: Tensor, *, axis: int, temperature: float = 1.0, probabilities: bool = False
) -> Tensor:
    """T^2 KL(teacher || student) in nats, both softened by the temperature T; a mean over all rows.

    `probabilities`: the tensors hold probabilities, whose logarithms are scores.
    """
    if probabilities:
        student, teacher = student.clamp_min(_TINY).log(), teacher.clamp_min(_TINY).log()
    log_p = functional.log_softmax(teacher / temperature, axis)
    log_q = functional.log_softmax(student / temperature, axis)
    p = log_p.exp()
    # What the teacher rules out (a score of -inf) adds nothing: 0 log 0 is 0.
    return temperature**2 * torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(axis).mean()


def cross_entropy(student: Tensor, labels: Tensor, *, axis: int, probabilities: bool = False) -> Tensor:
    """Mean negative log-likelihood of class numbers (n,) or (n, ...) under scores with the classes along `axis`."""
    scores = student.clamp_min(_TINY).log() if probabilities else student
    log_q = functional.log_softmax(scores, axis).movedim(axis, -1)
    return -log_q.gather(-1, labels.long().unsqueeze(-1)).mean()


def relative(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error over the teacher's mean square: 0 equal, 1 as bad as answering 0."""
    return functional.mse_loss(student, teacher) / teacher.square().mean().clamp_min(_TINY)


def embedding(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine, and the mean squared difference of the samples' cosine matrices; rows (n, d), any two widths d."""
    s, t = functional.normalize(student, dim=-1), functional.normalize(teacher, dim=-1)
    relations = (s @ s.T - t @ t.T).square().mean()
    if s.shape != t.shape:
        return relations
    return (1 - (s * t).sum(-1)).mean() + relations


def _pooled(tokens: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weight).sum(1) / weight.sum(1).clamp_min(1)


class Projection(torch.nn.Module):
    """A linear map from a student's features to a teacher's of another width, solved in closed form and then fixed.

    After channels were removed the least-squares map knows which are left. Axis `axis` holds the channels.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.weight: Tensor | None = None
        self._rows = 0
        self._sums: tuple[Tensor, Tensor] | None = None

    def add(self, student: Tensor, teacher: Tensor) -> bool:
        """Take samples and positions into account; True once there are enough of them."""
        x, y = (v.detach().movedim(self.axis, -1).flatten(0, -2).double() for v in (student, teacher))
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        gram, cross = self._sums or (0, 0)
        self._sums = gram + x.T @ x, cross + x.T @ y
        self._rows += len(x)
        return self._rows >= ENOUGH * x.shape[1]

    def solve(self, *, ridge: float = 1e-3) -> None:
        """Solve for the map by ridge regression, in float64. Raises DataError before anything was added."""
        if self._sums is None:
            raise DataError("a projection must be given features before it is solved for")
        gram, cross = self._sums
        gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        self.weight, self._sums, self._rows = torch.linalg.solve(gram, cross).float(), None, 0

    def forward(self, student: Tensor) -> Tensor:
        """The student's features in the teacher's width. Raises DataError before `solve`."""
        if self.weight is None:
            raise DataError("a projection must be solved for before it is used")
        x = student.movedim(self.axis, -1)
        return (x @ self.weight[:-1] + self.weight[-1]).movedim(-1, self.axis)
