"""From an opened problem to a table of effects: statistics, site facts, gains, bounds."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from featherweight.core import Action, Decision, Site
from featherweight.graph import io
from featherweight.graph.weights import Weight, weights
from featherweight.recover import recover
from featherweight.search import probe, stage
from featherweight.search.candidates import all_sites
from featherweight.search.effects import Effects, SiteFacts, build_effects, modelled_latency_ms
from featherweight.search.problem import STAGES_FOLDER, Problem, first_feeds
from featherweight.stats import Statistics, collect
from featherweight.stats.shrinkage import shrunk
from featherweight.techniques import Context
from featherweight.techniques._equalise import equalise

PROBE_BATCHES = 12
MOST_FOR_STATISTICS = 128
# Rows of im2col wanted over all calibration data: about five times the longest reduced dimension of usual layers.
ROWS_WANTED = 6144
LEAST_POSITIONS, MOST_POSITIONS = 32, 256


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all proposals stand on: the context for techniques, the sites, their effects."""

    ctx: Context
    sites: dict[str, Site]
    effects: Effects
    facts: dict[str, SiteFacts] = dataclasses.field(default_factory=dict)


def statistics(problem: Problem) -> Statistics:
    """Calibration statistics, read once and kept in the work folder.

    Channels are rescaled by what they say (cross-layer equalisation keeps the function as it is); from here on
    `problem.model` is the equalised model, and the statistics returned are those of it.
    """
    path = problem.work / "statistics.npz"
    most = min(problem.splits.calibration.n_batches, MOST_FOR_STATISTICS)
    problem.progress.start("reading calibration statistics", most)
    read = read_statistics(problem, problem.model, path)
    problem.model, ready = equalise(problem.model, shrunk(read))
    io.save(problem.model, problem.model_path)
    problem.model_sha256 = io.sha256(problem.model_path)
    return ready


def read_statistics(problem: Problem, model: ir.Model, path: Path) -> Statistics:
    """Statistics of a model over the calibration data, as they are read back from `path` (an npz file)."""
    batches = min(problem.splits.calibration.n_batches, MOST_FOR_STATISTICS)
    stats = collect(
        model,
        First(problem.splits.calibration, batches),
        max_positions=min(max(ROWS_WANTED // max(batches, 1), LEAST_POSITIONS), MOST_POSITIONS),
        worker=problem.worker,
        threads=1,
        seed=problem.request.seed,
    )
    whole = path.with_name(f"whole-{path.name}")
    stats.save(whole)
    whole.replace(path)
    del stats
    problem.worker.close()  # a fresh child holds none of what the runtime kept from this pass
    # Read back, so that a replay from the saved file sees the same numbers to the bit.
    return Statistics.load(path)


@dataclasses.dataclass(frozen=True)
class First:
    """The first batches of a dataset: means and ranges settle sooner than what a whole layer is solved from."""

    dataset: Any
    most: int

    def batches(self) -> Iterator[Any]:
        """The first `most` batches."""
        return itertools.islice(self.dataset.batches(), self.most)


def context(problem: Problem, stats: Statistics | None) -> Context:
    """A fresh Context for this problem's techniques."""
    # Who names techniques wants all they offer; else each leaves out what others do better.
    thorough = problem.request.techniques is not None
    return Context(
        problem.profile,
        stats,
        problem.request.seed,
        problem.keep_float,
        thorough=thorough,
        input_shapes=problem.shapes(),
    )


def survey(
    problem: Problem,
    ctx: Context,
    *,
    with_gains: bool,
    admit: Callable[[Action], bool] = lambda _action: True,
    gains: Mapping[str, float] | None = None,
) -> Ground:
    """List the sites of the numeric techniques and estimate every option; gains as given, or probed where asked."""
    numeric = problem.of_stage(structure=False)
    sites = all_sites(problem.model, numeric.values())
    by_name = {w.name: w for w in weights(problem.model)}
    if gains is None:
        gains = probed_gains(problem, ctx, [by_name[s] for s in sites if s in by_name]) if with_gains else {}
    facts = site_facts(problem, sites, by_name, gains)
    effects = build_effects(problem.model, sites, list(numeric.values()), ctx, facts, problem.progress, admit=admit)
    return Ground(ctx, sites, effects, facts)


def site_facts(
    problem: Problem, sites: Mapping[str, Site], by_name: Mapping[str, Weight], gains: Mapping[str, float]
) -> dict[str, SiteFacts]:
    """What each site costs in the float model."""
    macs = problem.node_macs()
    work = {name: sum(macs.get(n, 0) or 0 for n in site.nodes) for name, site in sites.items()}
    return {
        name: SiteFacts(
            modelled_latency_ms(work[name]), _resident(by_name.get(name), site), gains.get(name, 1.0), work[name]
        )
        for name, site in sites.items()
    }


def _resident(weight: Weight | None, site: Site) -> int:
    """Bytes the site's tensor takes when loaded as float32."""
    return 4 * int(np.prod(weight.shape)) if weight is not None else site.size_bytes


class FromData:
    """What happens between the steps of a structure stage, with the problem's calibration data."""

    def __init__(self, problem: Problem, folder: Path) -> None:
        self._problem, self._folder = problem, folder
        self._read = 0

    def recover(self, original: ir.Model, reduced: ir.Model) -> ir.Model:
        """Weights of `reduced` solved anew, layer by layer, against the original's outputs."""
        problem = self._problem
        problem.progress.start("solving weights anew")
        found = recover(
            original, reduced, problem.splits.calibration, worker=problem.worker, seed=problem.request.seed,
            progress=lambda _done, _total: problem.progress.advance(),
        )  # fmt: skip
        problem.worker.close()
        for note in found.notes:
            problem.note(note.where, note.text)
        return found.model

    def statistics(self, model: ir.Model) -> Statistics:
        """Statistics of `model`, shrunk; its channels are not rescaled again."""
        problem = self._problem
        self._read += 1
        problem.progress.start("reading statistics of the changed structure", problem.splits.calibration.n_batches)
        return shrunk(read_statistics(problem, model, self._folder / f"statistics-{self._read}.npz"))

    def keep(self, target: Path) -> None:
        """Move the last statistics read to `target` and forget the others."""
        files = [self._folder / f"statistics-{i + 1}.npz" for i in range(self._read)]
        for file in files[:-1]:
            file.unlink(missing_ok=True)
        files[-1].replace(target)


def staged(problem: Problem, ctx: Context, decisions: Sequence[Decision]) -> stage.Staged:
    """The model after the structure stage of these decisions; made once, and found again by a resumed run.

    Raises TechniqueError if the decisions cannot be carried out together, RunError if the result does not run.
    """
    key = stage.stage_key(problem.model_sha256, decisions, problem.request.seed)
    if key in problem.stages:
        return problem.stages[key]
    folder = problem.work / STAGES_FOLDER / key
    path, stats_path = folder / stage.FILE, folder / "statistics.npz"
    if not (path.exists() and stats_path.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        problem.progress.start("changing the structure")
        between = FromData(problem, folder)
        model, _, _ = stage.run_stage(problem.model, decisions, ctx, problem.of_stage(structure=True), between)
        between.keep(stats_path)
        io.save(model, path)
    found = stage.read(path, key, decisions, shrunk(Statistics.load(stats_path)))
    problem.stages[key] = found
    return found


def probed_gains(problem: Problem, ctx: Context, wanted: list[Weight]) -> dict[str, float]:
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
