"""From an opened problem to a table of effects: statistics, site facts, gains, bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from featherweight.core import Action, Site
from featherweight.graph import cost, io
from featherweight.graph.weights import Weight, weights
from featherweight.search import probe
from featherweight.search.candidates import all_sites
from featherweight.search.effects import Effects, SiteFacts, build_effects, modelled_latency_ms
from featherweight.search.problem import Problem, first_feeds
from featherweight.stats import Statistics, collect
from featherweight.stats.shrinkage import shrunk
from featherweight.techniques import Context
from featherweight.techniques._equalise import equalise

PROBE_BATCHES = 12
# Rows of im2col wanted over all calibration data: about five times the longest reduced dimension of usual layers.
ROWS_WANTED = 6144
LEAST_POSITIONS, MOST_POSITIONS = 32, 256


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all proposals stand on: the context for techniques, the sites, their effects."""

    ctx: Context
    sites: dict[str, Site]
    effects: Effects


def statistics(problem: Problem) -> Statistics:
    """Calibration statistics, read once and kept in the work folder.

    Channels are rescaled by what they say (cross-layer equalisation keeps the function as it is); from here on
    `problem.model` is the equalised model, and the statistics returned are those of it.
    """
    path = problem.work / "statistics.npz"
    problem.progress.start("reading calibration statistics", problem.splits.calibration.n_batches)
    batches = problem.splits.calibration.n_batches
    stats = collect(
        problem.model,
        problem.splits.calibration,
        max_positions=min(max(ROWS_WANTED // max(batches, 1), LEAST_POSITIONS), MOST_POSITIONS),
        worker=problem.worker,
        threads=1,
        seed=problem.request.seed,
    )
    stats.save(path)
    del stats
    problem.worker.close()  # a fresh child holds none of what the runtime kept from this pass
    # Read back, so that a replay from the saved file sees the same numbers to the bit.
    read = Statistics.load(path)
    problem.model, ready = equalise(problem.model, shrunk(read))
    io.save(problem.model, problem.model_path)
    problem.model_sha256 = io.sha256(problem.model_path)
    return ready


def context(problem: Problem, stats: Statistics | None) -> Context:
    """A fresh Context for this problem's techniques."""
    # Who names techniques wants all they offer; else each leaves out what others do better.
    thorough = problem.request.techniques is not None
    return Context(problem.profile, stats, problem.request.seed, problem.keep_float, thorough=thorough)


def survey(
    problem: Problem,
    ctx: Context,
    *,
    with_gains: bool,
    admit: Callable[[Action], bool] = lambda _action: True,
) -> Ground:
    """List sites, estimate every option; with gains probed by real runs where asked."""
    sites = all_sites(problem.model, problem.techniques.values())
    by_name = {w.name: w for w in weights(problem.model)}
    gain = _gains(problem, ctx, [by_name[s] for s in sites if s in by_name]) if with_gains else {}
    facts = {
        name: SiteFacts(_site_ms(problem, site), _resident(by_name.get(name), site), gain.get(name, 1.0))
        for name, site in sites.items()
    }
    techniques = list(problem.techniques.values())
    effects = build_effects(problem.model, sites, techniques, ctx, facts, problem.progress, admit=admit)
    return Ground(ctx, sites, effects)


def _site_ms(problem: Problem, site: Site) -> float:
    """Modelled float time of the nodes that read a site's tensor."""
    if "macs" not in problem.facts:
        shapes = {name: a.shape for name, a in first_feeds(problem.splits.calibration, 1)[0].items()}
        nodes = cost.costs(problem.model, input_shapes=shapes).nodes
        problem.facts["macs"] = {n.name: n.macs for n in nodes}
    macs = problem.facts["macs"]
    return modelled_latency_ms(sum(macs.get(n, 0) or 0 for n in site.nodes))


def _resident(weight: Weight | None, site: Site) -> int:
    """Bytes the site's tensor takes when loaded as float32."""
    return 4 * int(np.prod(weight.shape)) if weight is not None else site.size_bytes


def _gains(problem: Problem, ctx: Context, wanted: list[Weight]) -> dict[str, float]:
    """Gain by site from a few real runs, recorded in the journal."""

    def measured() -> dict[str, float]:
        model, opened = probe.overridable(problem.model, wanted)
        path, arrays = problem.work / "probe.onnx", problem.work / "probe.npz"
        io.save(model, path)
        local: dict[str, float] = {w.name: 0.0 for w in wanted}
        changed: dict[str, np.ndarray] = {}
        for i, w in enumerate(opened):
            matrix = w.to_matrix(w.array())
            second, mean = _moments(ctx.stats, w.name)
            moved = probe.perturbed(matrix, mean)
            local[w.name] = probe.relative_noise(matrix, moved, second, mean)
            changed[str(i)] = w.from_matrix(moved)
        np.savez(arrays, **changed)  # type: ignore[arg-type]
        problem.progress.start("measuring how noise reaches the outputs", len(opened))
        feeds = first_feeds(problem.splits.calibration, PROBE_BATCHES)
        names = [w.name for w in opened]
        output = problem.worker.call(
            probe.child_probe, str(path), str(arrays), names, feeds, problem.profile.threads,
            progress=lambda _done, _total: problem.progress.advance(), doing="measuring gains",
        )  # fmt: skip
        for file in (path, arrays, *Path(problem.work).glob("probe.onnx*")):
            file.unlink(missing_ok=True)
        return probe.gains(output, local)

    result: dict[str, float] = problem.journal.phase("gains", measured)
    return result


def _moments(stats: Statistics | None, name: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Second moment (groups, k, k) and mean (groups, k) of a weight's input; None where not read in full."""
    second = stats.second_moment(name) if stats is not None else None
    if second is None or second.ndim != 3 or stats is None:
        return None, None
    return second, stats.mean(name)
