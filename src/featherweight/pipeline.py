"""The whole flow on one screen: a model and a budget go in, the best model and its proof come out.

Each public function opens the problem, asks the search, and lets the result be measured on data the search never
saw. Sizes, times and fractions may be numbers or text such as "25%", "8ms", "1%".
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.core import Note, Progress, Report, Silent
from featherweight.errors import BudgetError, FeatherweightError, OutputError, RemoteError
from featherweight.quantities import format_bytes
from featherweight.runtime.sandbox import Worker
from featherweight.search import comparing, finish, teaching
from featherweight.search.baseline import already_fits, measure_baseline
from featherweight.search.comparing import Comparison
from featherweight.search.problem import Problem, forget_refused, open_problem
from featherweight.search.replay import apply
from featherweight.search.request import Request
from featherweight.search.rounds import fit, fronts, plain_int8

if TYPE_CHECKING:
    from featherweight.learn.result import Distilled

__all__ = ["Comparison", "apply", "compare", "compress", "decide", "distill", "frontier"]


def compress(
    model: Any,
    data: Any,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    save_anyway: bool = False,
    progress: Progress | None = None,
    **asked: Any,
) -> Report:
    """Find the best compressed model within the limits and prove it on unseen data.

    Args:
        model: ONNX file; it is never changed. Or a torch.nn.Module (with example_inputs), torch.export.ExportedProgram,
            .pt2 file or local Hugging Face folder, converted to `source.onnx` in the run folder and checked first.
        data: npz, image folder, text table, `module:function`, callable or mapping of arrays.
        out: run folder for `model.onnx`, `plan.json`, `report.json`; None: a temporary one (see report.facts["out"]).
        resume: go on with an interrupted run in `out`.
        save_anyway: write the nearest model even where the budget is not met.
        progress: where long work reports itself.
        **asked: the fields of `Request`: max_size, max_latency, max_peak_memory, max_drop, minimize, metric,
            max_macs, techniques, keep_float, calibration, preprocess, tokenizer, batch_size, profile, threads, seed,
            time_budget, max_candidates. `target` is another word for profile: `this`, a profile's name or file, or
            the address of a device's agent, `http://host:port`, where everything is measured then; its token comes
            from target_token, target_token_file or FEATHERWEIGHT_AGENT_TOKEN, its authority from target_ca.
            For what is converted: example_inputs, dynamic and trust, as in `convert.to_onnx`.

    Returns:
        A Report; `report.ok` says whether the budget is met. With no limit and no objective the goal is a plain
        8-bit model within one point of the metric.

    Raises:
        FeatherweightError: of the kind that names what is wrong with the model, the data or the request.
    """
    with _opened(model, data, out, asked, resume, progress) as problem:
        return _solve(problem, save_anyway=save_anyway, first_is_enough=False)


def decide(
    model: Any,
    data: Any,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    save_anyway: bool = False,
    progress: Progress | None = None,
    **asked: Any,
) -> Report:
    """Answer whether a compressed model within the limits exists: `yes` with it, `no, proved`, or `not found`.

    Arguments as in `compress`; the search ends at the first model within the limits.
    """
    with _opened(model, data, out, asked, resume, progress) as problem:
        return _solve(problem, save_anyway=save_anyway, first_is_enough=True)


def frontier(
    model: Any,
    data: Any,
    *,
    out: str | Path | None = None,
    points: int = 8,
    resume: bool = False,
    progress: Progress | None = None,
    **asked: Any,
) -> Report:
    """Measure the trade-off between size and drop at `points` sizes; `report.front` holds what nothing beats."""
    with _opened(model, data, out, asked, resume, progress) as problem:
        known = measure_baseline(problem)
        return _write(problem, finish.finish_front(problem, known, fronts(problem, known, points)))


def compare(
    original: Any,
    candidate: Any,
    data: Any,
    *,
    example_inputs: Any = None,
    trust: bool = False,
    target: str | None = None,
    target_token: str | None = None,
    target_token_file: Path | None = None,
    target_ca: Path | None = None,
    **asked: Any,
) -> Comparison:
    """Measure two models on the same data: metric with a paired test, bytes, latency interleaved, memory, load time.

    Args:
        original, candidate: models that take the same inputs, as in `compress`.
        data: as in `compress`.
        example_inputs, trust: as in `compress`.
        target: address of a device's agent to measure on; None: this machine.
        target_token, target_token_file, target_ca: as in `compress`.
        **asked: metric, preprocess, tokenizer, batch_size, threads, seed.

    Raises:
        FeatherweightError: of the kind that names what is wrong with the models, the data or the target.
    """
    if target is not None and not _is_address(target):
        raise BudgetError(
            f"compare measures here or on an agent, so target must be http://HOST:PORT, but is {target!r}"
        )
    from featherweight.convert import as_onnx

    opening = {"trust": trust, "example_inputs": example_inputs}
    with (
        Worker() as worker,
        _bench(target, (target_token, target_token_file, target_ca), worker, None) as bench,
        as_onnx(original, **opening) as (first, converted),
        as_onnx(candidate, **opening) as (second, also),
    ):
        found = [c for c in (converted, also) if c is not None]
        if asked.get("tokenizer") is None and found:
            asked["tokenizer"] = found[0].tokenizer
        compared = comparing.compare(first, second, data, bench=bench, **asked)
    notes = tuple(n for c in found for n in (Note(c.source, c.line), *c.notes))
    return dataclasses.replace(compared, notes=(*notes, *compared.notes))


def _is_address(target: object) -> bool:
    """True for the address of an agent."""
    return isinstance(target, str) and target.lower().startswith(("http://", "https://"))


@contextlib.contextmanager
def _bench(target: Any, let_in: tuple[Any, Any, Any], worker: Worker, progress: Progress | None) -> Iterator[Any]:
    """Where models are measured: the device at the address `target`, or None for this machine.

    For a device that is not here and has a profile to predict from, latency is predicted.
    """
    if not _is_address(target):
        from featherweight.edge import predicting

        device = predicting.device_of(target)
        yield None if device is None else predicting.Predicting(device, worker)
        return
    from featherweight.edge import remote

    notice = (progress or Silent()).trying
    with remote.connect(target, worker, let_in=remote.Access(*let_in), notice=notice) as bench:
        yield bench


def distill(teacher: Any, student: Any, data: Any, *, progress: Progress | None = None, **asked: Any) -> Distilled:
    """Let the original teach a compressed model and write the result with its report; see `learn.distill`.

    Args:
        teacher: the original, as the model of `compress`.
        student: a compressed ONNX model, what else `--student` takes, or a torch.nn.Module or exported program.
        data: as in `compress`; labels are not needed.
        progress: where long work reports itself.
        **asked: out, time_budget, max_memory, resume, example_inputs, dynamic and the fields of `learn.distill.Asked`.

    Raises:
        MissingExtraError: torch is not installed.
        FeatherweightError: of the kind that names what is wrong with the models, the data or the request.
    """
    from featherweight.learn.distill import distill as teach
    from featherweight.report import distillation

    found = teach(teacher, student, data, progress=progress, **asked)
    distillation.write(found, found.out)
    return found


def _request(model: Any, data: Any, out: str | Path | None, asked: dict[str, Any]) -> Request:
    if "target" in asked:
        asked["profile"] = asked.pop("target")
    unknown = sorted(asked.keys() - {f.name for f in dataclasses.fields(Request)})
    if unknown:
        raise TypeError(
            f"unknown argument {unknown[0]!r}; known: {', '.join(f.name for f in dataclasses.fields(Request))}"
        )
    if callable(asked.get("metric")):  # the child imports it by name
        asked["metric"] = f"{asked['metric'].__module__}:{asked['metric'].__qualname__}"
    for name in ("techniques", "keep_float"):
        if asked.get(name) is not None:
            asked[name] = (asked[name],) if isinstance(asked[name], str) else tuple(asked[name])
    path = Path(model) if isinstance(model, str | Path) else Path(type(model).__name__)
    return Request(path, data, None if out is None else Path(out), **{k: v for k, v in asked.items() if v is not None})


@contextlib.contextmanager
def _converted(
    model: Any, request: Request, out: Path, door: dict[str, Any], resume: bool, progress: Progress | None
) -> Iterator[tuple[Request, tuple[Note, ...]]]:
    """The request with an ONNX file as its model, and what conversion has to tell; gone again if the run is refused."""
    from featherweight import convert

    found = convert.into_run(model, out, data=request.data, resume=resume, progress=progress, **door)
    if found is None:
        yield request, ()
        return
    tokenizer = request.tokenizer or found.tokenizer
    try:
        yield (
            dataclasses.replace(request, model=found.path, tokenizer=tokenizer),
            (Note(found.source, found.line), *found.notes),
        )
    except FeatherweightError:
        if not (out / "journal.sqlite").exists():
            convert.forget(out)
        raise


@contextlib.contextmanager
def _opened(
    model: Any, data: Any, given: str | Path | None, asked: dict[str, Any], resume: bool, progress: Progress | None
) -> Iterator[Problem]:
    """The problem, opened in its run folder; the child process and the journal are closed at the end."""
    door: dict[str, Any] = {name: asked.pop(name) for name in ("example_inputs", "dynamic", "trust") if name in asked}
    request = _request(model, data, given, asked)
    out = request.out or Path(tempfile.mkdtemp(prefix="featherweight-"))
    if out.exists() and not out.is_dir():
        raise OutputError(f"the run folder {out} is a file; name a folder")
    let_in = (request.target_token, request.target_token_file, request.target_ca)
    with (
        Worker() as worker,
        _bench(request.profile, let_in, worker, progress) as bench,
        _converted(model, request, out, door, resume, progress) as (ready, told),
    ):
        ready, limited = _within_storage(ready, bench)
        problem = open_problem(ready, out, worker, progress or Silent(), resume=resume, bench=bench)
        for note in (*told, *limited):
            problem.note(note.where, note.text)
        try:
            yield problem
        except RemoteError as e:
            if not problem.journal.finished("baseline"):
                forget_refused(problem.journal, out)
                raise
            raise RemoteError(f"{e}; what was measured is kept in {out}: go on with --resume") from e
        except FeatherweightError:
            forget_refused(problem.journal, out)
            raise
        finally:
            problem.journal.close()


def _within_storage(request: Request, bench: Any) -> tuple[Request, tuple[Note, ...]]:
    """Where the model does not fit the device's storage and no size was asked for, the storage is the limit."""
    from featherweight.graph import io

    room = bench.profile.storage_bytes if bench is not None and bench.profile is not None else None
    if room is None or request.max_size is not None or io.size_bytes(request.model) <= room:
        return request, ()
    note = Note(bench.profile.name, f"its storage of {format_bytes(room)} is the limit on the size")
    return dataclasses.replace(request, max_size=room), (note,)


def _with_fit(problem: Problem, report: Report) -> Report:
    """The report with a note on whether the result fits the target, where that is another device."""
    profile = problem.bench.profile
    if profile is None:
        return report
    from featherweight.edge import predict
    from featherweight.graph import io

    path = problem.work.parent / "model.onnx"
    path = path if path.exists() else problem.runnable
    fit = predict.fits(io.load(path), profile, shapes=problem.shapes(), file_bytes=io.size_bytes(path))
    words = f"fits: {format_bytes(fit.memory_bytes)} of {format_bytes(profile.memory_bytes)} memory, planned"
    note = Note(profile.name, words if fit.ok else "does not fit: " + "; ".join(fit.reasons))
    return dataclasses.replace(report, notes=(*report.notes, note))


def _solve(problem: Problem, *, save_anyway: bool, first_is_enough: bool) -> Report:
    """Bounds, search, verification: the three answers of the decision problem."""
    if problem.request.recover == "distill":
        from featherweight.learn.checkpoints import need_torch

        need_torch()  # before any long work
    done = _finished(problem, save_anyway=save_anyway)
    if done is not None:
        return done
    known = measure_baseline(problem)
    if already_fits(problem, known):
        return _write(problem, finish.finish_untouched(problem, known))
    plain = problem.request.goal == "plain-int8" and problem.of_stage(structure=False)
    search = plain_int8 if plain else fit
    found = search(problem, known, first_is_enough=first_is_enough)
    if found.refusal is not None:
        return _write(problem, finish.finish_refused(problem, known, found.refusal))
    if problem.request.recover == "distill":
        teaching.teach(problem, known, found, _learn)
    report = _write(problem, finish.finish(problem, known, found, save_anyway=save_anyway))
    if found.interrupted:
        raise KeyboardInterrupt
    if not problem.out_of_time():
        problem.journal.phase("finished", lambda: True)
    return report


def _learn(problem: Problem, student: Path, data: Any, out: Path, seconds: float) -> tuple[Path, bool]:
    """Distillation as a stage of the search: `out` is its run folder, which an interrupted run goes on in."""
    from featherweight.learn.distill import distill as teach

    found = teach(
        problem.runnable, student, data, out=out, resume=True, progress=problem.progress.inner,
        metric=problem.request.metric, time_budget=seconds, seed=problem.request.seed,
    )  # fmt: skip
    return found.model, found.interrupted


def _finished(problem: Problem, *, save_anyway: bool) -> Report | None:
    """The report of a run that had come to its end, where it is still in the folder: resuming it repeats nothing."""
    from featherweight.report import json

    path = problem.work.parent / "report.json"
    if not problem.journal.finished("finished") or not path.exists():
        return None
    if save_anyway and not (path.parent / "model.onnx").exists():
        return None  # the nearest model was not wanted then and is now: candidates are read from the journal
    shutil.rmtree(problem.work, ignore_errors=True)
    return json.read(path)


def _write(problem: Problem, report: Report) -> Report:
    """Put report.json and report.html beside the model."""
    from featherweight.report import files

    out = problem.work.parent
    report = _with_fit(problem, report)
    files.write(report, out)
    return report
