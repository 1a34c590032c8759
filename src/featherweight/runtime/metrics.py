"""How good a model is: per-sample values that can be paired with the original's, and their aggregate.

Against labels: accuracy, top5, spearman, a function of the user. Against the original's own outputs (no labels
needed): agreement, cosine, kl, sqnr. A metric is data and plain functions, so it travels to a child process.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherweight.errors import DataError
from featherweight.runtime import outputs as _outputs
from featherweight.runtime import scores
from featherweight.runtime.outputs import Array, Kind, Outputs
from featherweight.runtime.scores import Float, Judged

# -> (n, ...), or () for one number over all
Score = Callable[[Judged], Float]
# (per_sample gathered to (b, n, ...), labels (b, n) or None) -> (b,)
Aggregate = Callable[[Float, Array | None], Float]


@dataclass(frozen=True)
class Metric:
    """One way to judge a model.

    `perfect` is what the original scores against itself (agreement kinds), None where labels decide. `whole`: the score
    needs all outputs at once. `drop` turns two aggregates into "how much worse", in the unit of `drop_unit`.
    """

    name: str
    kind: Kind
    score: Score
    reduce: Aggregate
    needs_labels: bool
    higher_is_better: bool = True
    perfect: float | None = None
    output: str | None = None
    whole: bool = False
    drop_unit: str = ""

    @property
    def needs_reference(self) -> bool:
        """True if the original's outputs are what it compares with."""
        return self.perfect is not None

    def select(self, outputs: Outputs, feeds: Outputs | None = None) -> dict[str, Array]:
        """Only what this metric reads of the outputs, averaged over tokens or masked where that is its way."""
        return _outputs.select(outputs, self.kind, output=self.output, feeds=feeds)

    def per_sample(
        self,
        outputs: Outputs,
        reference: Outputs | None = None,
        labels: Array | None = None,
        rows_per_sample: int = 1,
        *,
        feeds: Outputs | None = None,
        n: int | None = None,
    ) -> Float:
        """Values (n, ...) float64 of the n samples in one batch; of shape () if only one number can be given.

        Raises:
            DataError: labels or outputs do not have the shape this metric needs.
        """
        if self.needs_labels and labels is None:
            raise DataError(f"the metric {self.name} needs labels, but the data has none; use agreement or cosine")
        if self.needs_reference and reference is None:
            raise DataError(f"the metric {self.name} compares with the original's outputs, but none were given")
        chosen = self.select(outputs, feeds)
        theirs = self.select(reference, feeds) if reference is not None and self.needs_reference else None
        count = n if n is not None else _count(chosen, labels, rows_per_sample)
        if theirs is None:
            return np.asarray(self.score(Judged(chosen, {}, labels, rows_per_sample, count)), np.float64)
        each = self.score(Judged(chosen, theirs, None, 1, count * rows_per_sample))
        return np.asarray(each.reshape(count, rows_per_sample, *each.shape[1:]).mean(axis=1), np.float64)

    def aggregate(self, per_sample: Float, labels: Array | None = None) -> float:
        """The metric over all samples."""
        if per_sample.ndim == 0:
            return float(per_sample)
        if per_sample.shape[0] == 0:
            raise DataError(f"the metric {self.name} needs at least one sample, but got none")
        return float(self.reduce(per_sample[None], None if labels is None else labels[None])[0])

    def aggregate_many(self, per_sample: Float, labels: Array | None, rows: npt.NDArray[np.intp]) -> Float:
        """The metric over each row of `rows` (b, n): indices of the samples drawn. For resampling."""
        if self.reduce is scores.spearman:
            return scores.spearman_resampled(per_sample, labels, rows)
        return self.reduce(per_sample[rows], None if labels is None else labels[rows])

    def drop(self, baseline: float, value: float) -> float:
        """How much worse than the original, > 0 if worse. For sqnr the added noise-to-signal ratio (not dB)."""
        if self.name == "sqnr":
            return float(10 ** (-value / 10) - 10 ** (-baseline / 10))
        return baseline - value if self.higher_is_better else value - baseline


NAMES = ("accuracy", "top5", "agreement", "cosine", "kl", "sqnr", "spearman")


def get(name: str, *, output: str | None = None) -> Metric:
    """The metric of that name, or of a `module:function`; `output` names the model output it looks at.

    Raises:
        DataError: unknown name (near matches are listed) or a function that cannot be imported.
    """
    if ":" in name:
        function = scores.imported(name)
        whole = not getattr(function, "per_batch", False)
        better = bool(getattr(function, "higher_is_better", True))
        score = functools.partial(scores.custom, name)
        return Metric(name, "raw", score, scores.mean_worst, False, higher_is_better=better, output=output, whole=whole)
    table: dict[str, Callable[[], Metric]] = {
        "accuracy": lambda: Metric(
            name, "class", functools.partial(scores.top_k, 1), scores.mean_worst, True, output=output
        ),
        "top5": lambda: Metric(
            name, "class", functools.partial(scores.top_k, 5), scores.mean_worst, True, output=output
        ),
        "agreement": lambda: Metric(
            name, "class", scores.agreement, scores.mean_worst, False, perfect=1.0, output=output
        ),
        "cosine": lambda: Metric(name, "vectors", scores.cosine, scores.mean_worst, False, perfect=1.0, output=output),
        "kl": lambda: Metric(
            name, "class", scores.kl, scores.mean_worst, False, False, perfect=0.0, output=output, drop_unit="nat"
        ),
        "sqnr": lambda: Metric(
            name,
            "all",
            scores.sqnr,
            scores.sqnr_db,
            False,
            perfect=float("inf"),
            output=output,
            drop_unit="noise/signal",
        ),
        "spearman": lambda: Metric(name, "vector", scores.similarity, scores.spearman, True, output=output),
    }
    if name not in table:
        near = difflib.get_close_matches(name, NAMES, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise DataError(f"metric must be one of {', '.join(NAMES)} or module:function, but got '{name}'{hint}")
    return table[name]()


def choose(
    outputs: Outputs,
    *,
    feeds: Outputs,
    labels: Array | None,
    rows_per_sample: int = 1,
    n: int | None = None,
    output: str | None = None,
) -> tuple[Metric, str]:
    """The metric that fits data and outputs of one batch, and the reason in words."""
    if labels is not None:
        if rows_per_sample == 2:
            return get("spearman", output=output), "the data are pairs with gold scores"
        for name in ("accuracy", "spearman"):
            if (name == "accuracy") != scores.class_labels(labels):
                continue
            metric = get(name, output=output)
            try:
                metric.per_sample(outputs, None, labels, rows_per_sample, feeds=feeds, n=n)
            except DataError as e:
                metric, why = _without_labels(outputs, output)
                return metric, f"the labels do not fit the outputs ({e}), and {why}"
            return metric, "the data has class labels" if name == "accuracy" else "the data has gold scores"
    metric, why = _without_labels(outputs, output)
    return metric, f"the data has no labels, and {why}"


def _without_labels(outputs: Outputs, output: str | None) -> tuple[Metric, str]:
    (name, value), *_ = _outputs.select(outputs, "class", output=output).items()
    low = name.lower()
    if value.dtype.kind in "biu":
        return get("agreement", output=output), f"the output '{name}' holds class numbers"
    if value.ndim == 2 and value.shape[1] >= 2:
        if scores.are_probabilities(value):
            return get("agreement", output=output), f"the output '{name}' holds probabilities"
        if any(w in low for w in _outputs.CLASS_WORDS) and not any(w in low for w in _outputs.VECTOR_WORDS):
            return get("agreement", output=output), f"the output '{name}' {value.shape} is named like class scores"
    return get("cosine", output=output), f"the output '{name}' {value.shape} is not known to be class scores"


def _count(outputs: Outputs, labels: Array | None, rows_per_sample: int) -> int:
    if labels is not None:
        return len(labels)
    first = next(iter(outputs.values()))
    return max(1, first.shape[0] // rows_per_sample) if first.ndim else 1
