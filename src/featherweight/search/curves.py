"""What a narrower group of channels really costs at the outputs: a few real runs a group, and a curve through them.

The closed-form error of the layers that read a group says in which order its channels go and how the error grows, but
not how much of it reaches the outputs: behind a skip connection nearly nothing does, in a trunk all of it and more.
So each group is cut alone at a few widths and run; what changes the whole model is run in each of its options. Between
these the loss follows the closed-form noise on a straight line in logarithms; beyond them on its slope, held between 1
(errors add) and 2 (they also meet each other).

Where the outputs are class scores the runs are compared by the divergence of their probabilities, as noise on
scores that decide nothing costs nothing; it is brought to the unit of noise by one factor. Of other outputs only what
the metric reads is compared (the mean over a text's tokens, not its padding).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from featherweight.core import Action, Decision, Site
from featherweight.errors import RunError, TechniqueError
from featherweight.graph import io
from featherweight.runtime.metrics import Metric
from featherweight.search.options import GroupOption, Structure
from featherweight.search.probe import child_divergence
from featherweight.search.problem import Problem, first_feeds
from featherweight.search.stage import cut_only
from featherweight.techniques import Context

#: Shares of a group's work at which it is really cut; batches that each cut is run on, and on until so many samples.
SHARES = (0.8, 0.4)
BATCHES, SAMPLES = 24, 96
SLOPES = (1.0, 2.0)
LEAST = 1e-9
CLASS_METRICS = frozenset({"accuracy", "top5", "agreement", "kl"})
Point = tuple[float, float]


def measured(problem: Problem, structure: Structure, ctx: Context, metric: Metric) -> Structure:
    """The structure with the losses of its groups put on measured curves; the runs are kept in the journal.

    `metric`: how the model is judged; where classes decide, their probabilities are compared.
    """
    classes = metric.name in CLASS_METRICS
    whole = {name for name in structure.groups if structure.sites[name].kind == "model"}
    wanted = {
        name: [o for o in options if o.loss > 0] if name in whole else _picked(options)
        for name, options in structure.groups.items()
        if len(options) > 1
    }
    found: dict[str, list[list[float | None]]] = problem.journal.phase(
        "losses of groups", lambda: _runs(problem, structure, wanted, ctx, metric)
    )
    points = in_one_unit(found, classes=classes)
    groups = {
        name: on_curve(that_ran(options, found.get(name, ())) if name in whole else options, points.get(name, ()))
        for name, options in structure.groups.items()
    }
    return dataclasses.replace(structure, groups=groups)


def in_one_unit(found: Mapping[str, Sequence[Sequence[float | None]]], *, classes: bool) -> dict[str, list[Point]]:
    """(predicted, loss) by group from [predicted, noise, divergence]; divergences are scaled to noise by a median."""
    rows = [
        (n, p, noise, kl) for n, runs in found.items() for p, noise, kl in runs if p is not None and noise is not None
    ]
    ratios = [noise / kl for _, _, noise, kl in rows if kl is not None and kl > LEAST and math.isfinite(noise)]
    factor = float(np.median(ratios)) if classes and ratios else None
    points: dict[str, list[Point]] = {}
    for name, predicted, noise, kl in rows:
        loss = noise if factor is None or kl is None else factor * kl
        points.setdefault(name, []).append((predicted, loss))
    return points


def on_curve(options: Sequence[GroupOption], points: Sequence[Point]) -> list[GroupOption]:
    """Options with their predicted loss replaced by the curve through (predicted, measured) points.

    Options that cost nothing keep doing so; without points nothing changes. Losses never fall as predictions rise.
    """
    usable = sorted((p, max(m, LEAST)) for p, m in points if p > 0 and math.isfinite(m))
    if not usable:
        return list(options)
    xs = np.log([p for p, _ in usable])
    ys = np.maximum.accumulate(np.log([m for _, m in usable]))
    steps = np.diff(ys) / np.maximum(np.diff(xs), 1e-9)
    slopes = np.clip(steps, *SLOPES) if len(steps) else np.array([1.0])

    def loss(predicted: float) -> float:
        if predicted <= 0:
            return 0.0
        x = math.log(predicted)
        if x < xs[0]:
            return math.exp(ys[0] + slopes[0] * (x - xs[0]))
        if x > xs[-1]:
            return math.exp(ys[-1] + slopes[-1] * (x - xs[-1]))
        return math.exp(float(np.interp(x, xs, ys)))

    return [dataclasses.replace(o, loss=loss(o.loss)) for o in options]


def that_ran(options: Sequence[GroupOption], runs: Sequence[Sequence[float | None]]) -> list[GroupOption]:
    """Options of a change to the whole model that was really made and run, and to keep it."""
    known = {predicted for predicted, noise, _ in runs if noise is not None and math.isfinite(noise)}
    return [o for o in options if o.decision.keeps or o.loss in known]


def _picked(options: Sequence[GroupOption]) -> list[GroupOption]:
    """The options nearest to the wanted shares of work, each once, that cost something."""
    costly = [o for o in options if o.loss > 0]
    chosen: list[GroupOption] = []
    for share in SHARES if costly else ():
        nearest = min(costly, key=lambda o: abs(o.work - share))
        if nearest not in chosen:
            chosen.append(nearest)
    return chosen


def _runs(
    problem: Problem,
    structure: Structure,
    wanted: Mapping[str, Sequence[GroupOption]],
    ctx: Context,
    metric: Metric,
) -> dict[str, list[list[float | None]]]:
    """[[predicted, noise, divergence], ...] by group; a cut that cannot be built or run is left out."""
    problem.progress.start("measuring what narrower groups cost", sum(map(len, wanted.values())))
    # On calibration data a cut looks better than it is: what makes up for it was fitted there.
    feeds = first_feeds(problem.splits.validation, BATCHES, samples=SAMPLES)
    path = problem.work / "narrower.onnx"
    found: dict[str, list[list[float | None]]] = {}
    for name, options in wanted.items():
        for option in options:
            try:
                io.save(_narrowed(problem, structure.sites[name], option.decision, ctx), path)
                noise, apart = problem.worker.call(
                    child_divergence, str(problem.model_path), str(path), feeds, problem.profile.threads, metric,
                    doing="running a narrower group",
                )  # fmt: skip
                found.setdefault(name, []).append([option.loss, noise, apart])
            except (TechniqueError, RunError) as e:
                ctx.note(name, f"{option.decision} could not be tried: {e}")
            problem.progress.advance()
            for file in problem.work.glob("narrower.onnx*"):
                file.unlink(missing_ok=True)
    return found


def _narrowed(problem: Problem, site: Site, decision: Decision, ctx: Context) -> ir.Model:
    """The model as it would answer after the decision; a technique may know a cheaper way than to cut it."""
    (action,) = decision.actions
    preview: Callable[[ir.Model, Site, Action, Context], ir.Model] | None = getattr(
        problem.techniques[action.technique], "preview", None
    )
    if preview is not None:
        return preview(problem.model, site, action, ctx)
    return cut_only(problem.model, [decision], ctx, problem.of_stage(structure=True))
