"""One compression problem, opened: the model normalised, the data checked and split, the original measured."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from featherweight import data as fwdata
from featherweight.core import Budget, Note, Profile, Progress
from featherweight.errors import DataError, ModelError, RunError
from featherweight.graph import cost, io, surgery
from featherweight.graph.normalise import Normalised, normalise
from featherweight.quantities import parse_count
from featherweight.runtime import ort, targets
from featherweight.runtime.bench import Bench, Here
from featherweight.runtime.sandbox import Worker
from featherweight.search.journal import Journal
from featherweight.search.request import (
    MAX_RECOVERY,
    Request,
    chosen_techniques,
    matching_nodes,
    most_calibration,
)
from featherweight.techniques import Technique, all_techniques

if TYPE_CHECKING:
    from featherweight.search.stage import Staged

#: Folder inside `work` with the models after their structure stage; a resumed run finds them there.
STAGES_FOLDER = "structure"
NORMALISE_FEEDS = 2
#: Share of the time budget for the search where distillation follows; seconds of distillation without a budget.
SEARCH_SHARE, DEFAULT_TEACHING_S = 0.4, 1200.0


class Timed:
    """A Progress that passes everything on and remembers how long each phase took."""

    def __init__(self, inner: Progress) -> None:
        self.inner = inner
        self.seconds: dict[str, float] = {}
        self._phase, self._since = "", time.monotonic()

    def start(self, phase: str, total: int | None = None) -> None:
        """The phase before has ended."""
        now = time.monotonic()
        if self._phase:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now
        self.inner.start(phase, total)

    def advance(self, steps: int = 1) -> None:
        """Pass on."""
        self.inner.advance(steps)

    def trying(self, what: str) -> None:
        """Pass on."""
        self.inner.trying(what)

    def best(self, what: str) -> None:
        """Pass on."""
        self.inner.best(what)


@dataclass
class Problem:
    """Everything the search needs; built by `open_problem`, which says in which order.

    `original` is the user's file, `model` its normalised form (saved at `model_path`), which all decisions are about.
    `worker` runs what the search computes for itself, `bench` what is measured: it may be another machine.
    `normalised_sha256` is of that form before channels were rescaled, `stages` holds what structure stages made of it;
    for the numeric part of a plan with structure there is a problem of its own, whose `model` is the one after that
    stage.
    """

    request: Request
    original: Path
    original_bytes: int
    model: ir.Model
    model_path: Path
    model_sha256: str
    work: Path
    splits: fwdata.Splits
    budget: Budget
    profile: Profile
    techniques: dict[str, Technique]
    keep_float: frozenset[str]
    worker: Worker
    bench: Bench
    journal: Journal
    progress: Timed
    runnable: Path
    started: float
    notes: list[Note] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    normalised_sha256: str = ""
    stages: dict[str, Staged] = field(default_factory=dict)

    def of_stage(self, *, structure: bool) -> dict[str, Technique]:
        """The techniques that change the graph, or those that change how its weights are stored and computed."""
        return {n: t for n, t in self.techniques.items() if (t.stage == "structure") == structure}

    def node_macs(self) -> dict[str, int | None]:
        """Multiply-accumulates of one call by node, at the shapes of the data; counted once."""
        if "macs" not in self.facts:
            self.facts["macs"] = {n.name: n.macs for n in cost.costs(self.model, input_shapes=self.shapes()).nodes}
        found: dict[str, int | None] = self.facts["macs"]
        return found

    def macs(self) -> int:
        """Multiply-accumulates of one call of the model; nodes whose shapes are unknown count as none."""
        return sum(v or 0 for v in self.node_macs().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs in the data's first batch."""
        if "input_shapes" not in self.facts:
            feeds = first_feeds(self.splits.calibration, 1)[0]
            self.facts["input_shapes"] = {name: a.shape for name, a in feeds.items()}
        found: dict[str, tuple[int, ...]] = self.facts["input_shapes"]
        return found

    def out_of_time(self) -> bool:
        """True if the time budget is used up."""
        limit = self.request.time_budget_s
        if limit is not None and self.request.recover == "distill":
            limit *= SEARCH_SHARE
        return limit is not None and time.monotonic() - self.started > limit

    def note(self, where: str, text: str) -> None:
        """Remember something the user should know, once."""
        entry = Note(where, text)
        if entry not in self.notes:
            self.notes.append(entry)


def open_problem(
    request: Request, out: Path, worker: Worker, shown: Progress, *, resume: bool, bench: Bench | None = None
) -> Problem:
    """Load, open the journal, check and split the data, normalise. Everything that can be refused is refused here.

    `bench` is where models are measured, and whose profile is the target if it has one; None: this machine.
    Raises ModelError, DataError, BudgetError, TechniqueError, OutputError, each before any long work.
    """
    started = time.monotonic()
    progress = Timed(shown)
    progress.start("reading the model")
    model = io.load(request.model)
    original_bytes, sha = io.size_bytes(request.model), io.sha256(request.model)
    budget = request.budget(original_bytes)
    known = all_techniques()
    names = chosen_techniques(request.techniques, known)
    bench = bench or Here(worker)
    profile = bench.profile or _profile(request)
    inputs = input_specs(model)
    work = out / "work"
    sources = open_sources(request, inputs)
    out.mkdir(parents=True, exist_ok=True)
    asked = request.asked(sha) | ({"profile": bench.host} if bench.profile else {})  # a device may change its address
    if (most := most_calibration(request, {n: known[n] for n in names}, inputs)) > MAX_RECOVERY:
        asked["max_calibration"] = most  # journals of a time with fewer are of other samples
    journal = Journal(out / "journal.sqlite", asked, resume=resume)
    try:
        chosen = {n: known[n] for n in names}
        problem = _opened(
            request, model, budget, profile, chosen, sources, inputs, journal, worker, bench, progress, work
        )
    except Exception:
        forget_refused(journal, out)
        raise
    problem.original_bytes, problem.started = original_bytes, started
    return problem


def forget_refused(journal: Journal, out: Path) -> None:
    """Close the run; where not even the original could be measured, leave nothing, so that a corrected one may follow.

    Removes what opening made in the run folder, and the folder if it is empty then.
    """
    refused = not journal.finished("baseline")
    journal.close()
    if not refused:
        return
    shutil.rmtree(out / "work", ignore_errors=True)
    for file in out.glob("journal.sqlite*"):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        out.rmdir()


def _opened(
    request: Request,
    model: ir.Model,
    budget: Budget,
    profile: Profile,
    techniques: dict[str, Technique],
    sources: tuple[fwdata.Dataset, fwdata.Dataset | None],
    inputs: Sequence[fwdata.InputSpec],
    journal: Journal,
    worker: Worker,
    bench: Bench,
    progress: Timed,
    work: Path,
) -> Problem:
    """Split and check the data, normalise the model, and see that it runs."""
    emptied(work, keep=STAGES_FOLDER if journal.finished("baseline") else "")
    work.mkdir(parents=True, exist_ok=True)
    notes: list[Note] = [*bench.notes()]
    most = most_calibration(request, techniques, inputs)
    splits = _spooled(sources, request, inputs, work, progress, notes, most)
    progress.start("normalising the graph")
    feeds = first_feeds(splits.calibration, NORMALISE_FEEDS)
    try:
        normalised = normalise(model, run=child_runner(worker, work), feeds=feeds)
    except RunError as e:
        raise RunError(f"{request.model} does not run on the data: {e}") from e
    model_path = work / "normalised.onnx"
    io.save(normalised.model, model_path)
    problem = Problem(
        request=request,
        original=request.model,
        original_bytes=0,
        model=normalised.model,
        model_path=model_path,
        model_sha256=io.sha256(model_path),
        normalised_sha256=io.sha256(model_path),
        work=work,
        splits=splits,
        budget=budget,
        profile=profile,
        techniques=techniques,
        keep_float=matching_nodes(request.keep_float, list(surgery.paths(normalised.model).values())),
        worker=worker,
        bench=bench,
        journal=journal,
        progress=progress,
        runnable=_runnable(request.model, model_path, worker, feeds, notes),
        started=0.0,
        notes=notes,
    )
    if request.max_macs is not None:
        problem.budget = dataclasses.replace(budget, max_macs=parse_count(request.max_macs, problem.macs()))
    _describe(problem, normalised)
    return problem


def emptied(folder: Path, *, keep: str = "") -> None:
    """Remove a folder, or all in it but the entry called `keep`."""
    if not keep or not (folder / keep).exists():
        shutil.rmtree(folder, ignore_errors=True)
        return
    for entry in folder.iterdir():
        if entry.name != keep:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def input_specs(model: ir.Model) -> tuple[fwdata.InputSpec, ...]:
    """The inputs a caller must feed: initializers listed as inputs are not among them."""
    specs = []
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        if value.name is None or value.dtype is None:
            raise ModelError(f"every input must have a name and a tensor type, but got {value!r}")
        dims = None if value.shape is None else tuple(_dim(d) for d in value.shape)
        specs.append(fwdata.InputSpec(value.name, value.dtype.numpy(), dims))
    return tuple(specs)


def _dim(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def first_feeds(dataset: fwdata.Dataset, n: int, *, samples: int = 0) -> list[dict[str, np.ndarray]]:
    """Feeds of the first `n` batches, and on until they hold so many samples."""
    feeds, held = [], 0
    for batch in dataset.batches():
        feeds.append(batch.feeds)
        held += batch.n
        if len(feeds) >= n and held >= samples:
            break
    return feeds


def child_runner(worker: Worker, work: Path) -> Any:
    """A Runner for graph passes: save, run in the child, give the outputs back."""

    def run(model: ir.Model, feeds: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        path = work / "check.onnx"
        io.save(model, path)
        try:
            return worker.call(ort.run_model, str(path), [dict(f) for f in feeds], doing="checking a graph pass")
        finally:
            for file in work.glob("check.onnx*"):
                file.unlink(missing_ok=True)

    return run


def _profile(request: Request) -> Profile:
    """The target. By default: measured here, but with integer weights that are right on any CPU.

    Weights that fit kernels without a dot product cost next to no accuracy, and the file gives the same answers
    wherever it is taken; "this" trusts this machine's kernels.
    """
    if request.profile is None:
        here = targets.this_machine()
        return dataclasses.replace(here, name=f"any CPU, measured on {here.name}", int8_dot=False)
    if request.profile == "this":
        return targets.this_machine()
    return targets.load_profile(request.profile)


def open_sources(request: Request, inputs: Sequence[fwdata.InputSpec]) -> tuple[fwdata.Dataset, fwdata.Dataset | None]:
    """The user's data, and a second source where calibration data were given apart."""

    def opened(source: Any) -> fwdata.Dataset:
        return fwdata.open_data(
            source,
            inputs,
            preprocess=request.preprocess,
            tokenizer=request.tokenizer,
            batch_size=request.batch_size,
        )

    if request.data is None:
        raise DataError("compression is measured on data; give some with --data")
    main = opened(request.data)
    return (main, None) if request.calibration is None else (opened(request.calibration), main)


def _spooled(
    sources: tuple[fwdata.Dataset, fwdata.Dataset | None],
    request: Request,
    inputs: Sequence[fwdata.InputSpec],
    work: Path,
    progress: Progress,
    notes: list[Note],
    max_calibration: int,
) -> fwdata.Splits:
    """Split, then read each part once: checked and written to disk so that it is decoded only once."""
    first, evaluation = sources
    if first.n_batches == 0:
        raise DataError(f"calibration data is empty: {first.source} has no batch")
    parts = fwdata.split(first, seed=request.seed, max_calibration=max_calibration, evaluation=evaluation)
    notes.extend((*first.notes, *(evaluation.notes if evaluation else ()), *parts.notes))
    # Data lie sorted by class or date, and some passes read only the first batches: those must be of all kinds.
    rng = np.random.default_rng(request.seed)
    for role in ("calibration", "validation"):
        part = getattr(parts, role)
        if sum(getattr(parts, other) == part for other in ("calibration", "validation", "holdout")) == 1:
            mixed = part.subset(rng.permutation(part.n_batches).tolist())
            parts = dataclasses.replace(parts, **{role: mixed})
    read: dict[str, fwdata.Dataset] = {}
    for role in ("calibration", "validation", "holdout"):
        part = getattr(parts, role)
        same = next((r for r in read if getattr(parts, r) == part), None)
        progress.start(f"reading {role} data", part.n_batches)
        read[role] = read[same] if same else fwdata.spool(part, work / role, inputs=inputs, progress=progress)
    notes.extend(fwdata.likeness(read["calibration"], read["holdout"]))
    return fwdata.Splits(read["calibration"], read["validation"], read["holdout"], parts.notes)


def _runnable(
    original: Path, normalised: Path, worker: Worker, feeds: Sequence[Mapping[str, np.ndarray]], notes: list[Note]
) -> Path:
    """The file to measure as the original: the user's own, unless the runtime refuses it and the repaired one runs."""
    try:
        worker.call(ort.run_model, str(original), [dict(f) for f in feeds[:1]], doing="running the original")
    except RunError as e:
        worker.call(ort.run_model, str(normalised), [dict(f) for f in feeds[:1]], doing="running the repaired original")
        notes.append(
            Note(original.name, f"the runtime refuses this file as it is ({e}); its repaired form is measured")
        )
        return normalised
    return original


def _describe(problem: Problem, normalised: Normalised) -> None:
    """Notes and facts about what happened at the door."""
    for step in normalised.steps:
        if step.rolled_back:
            problem.note(step.name, f"undone because outputs moved by {step.max_abs_diff:.3g}: {step.detail}")
    problem.facts["normalised"] = [
        {"step": s.name, "changed": s.changed, "max_abs_diff": s.max_abs_diff, "rolled_back": s.rolled_back}
        for s in normalised.steps
        if s.changed or s.rolled_back
    ]
    sizes = {r: getattr(problem.splits, r).n_samples for r in ("calibration", "validation", "holdout")}
    problem.facts["samples"] = sizes
