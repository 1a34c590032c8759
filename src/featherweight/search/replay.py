"""Plans as files: written beside the model they made, and replayed without a search to the same bytes.

A run folder keeps `statistics.npz`, the calibration statistics that the techniques used: with it a plan needs no data.
Where the plan changes the structure it also keeps `structure.onnx`, the float model after that, and the statistics
are those of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featherweight.core import Plan, Profile, Scalar
from featherweight.errors import OutputError, PlanError
from featherweight.graph import io
from featherweight.graph.normalise import normalise
from featherweight.search.candidates import build_numeric
from featherweight.search.measured import stage_of
from featherweight.search.problem import Problem
from featherweight.search.stage import FILE as STRUCTURE_FILE
from featherweight.search.stage import Staged, numeric_part, structure_part
from featherweight.search.stage import read as read_staged
from featherweight.stats import Statistics, model_key
from featherweight.stats.shrinkage import shrunk
from featherweight.techniques import Context, all_techniques
from featherweight.techniques._equalise import equalise

STATISTICS = "statistics.npz"
#: Options of a plan that changes the structure: sha256 of the normalised model, and of structure.onnx.
NORMALISED, STRUCTURE = "normalised_sha256", "structure_sha256"
#: Option of a plan whose model was taught by the original: sha256 of the model, which no replay can make again.
TAUGHT = "distilled_sha256"


def sealed(problem: Problem, ctx: Context, plan: Plan) -> Plan:
    """The plan with all a replay needs to know: the model it is about, the target, seed and float nodes."""
    options: dict[str, Scalar] = {
        **{name: value for name, value in plan.options if name == TAUGHT},
        "seed": problem.request.seed,
        "int8_dot": problem.profile.int8_dot,
        "keep_float": json.dumps(sorted(ctx.keep_float)),
        "fragile": json.dumps(sorted(ctx.fragile)),
    }
    made = stage_of(problem, plan)
    if made is not None:
        options |= {NORMALISED: problem.normalised_sha256, STRUCTURE: io.sha256(made.path)}
    return dataclasses.replace(plan, model_sha256=problem.model_sha256, options=tuple(sorted(options.items())))


def write(problem: Problem, plan: Plan, built: Path) -> None:
    """Put model, plan and statistics into the run folder, each whole or not at all."""
    out = problem.work.parent
    model = io.load(built)
    io.save(model, out / "model.onnx", external=None)
    write_file(out / "plan.json", lambda p: p.write_text(plan.to_json()))
    made = stage_of(problem, plan)
    folder = problem.work if made is None else made.path.parent
    if plan.changed():
        write_file(out / STATISTICS, lambda p: shutil.copyfile(folder / STATISTICS, p))
    for file in [] if made is None else reversed(io.files(made.path)):
        write_file(out / file.name, lambda p, f=file: shutil.copyfile(f, p))  # type: ignore[misc]


def write_original(problem: Problem, plan: Plan) -> None:
    """Copy the original as the result, byte for byte, with its side files."""
    out = problem.work.parent
    source = problem.runnable
    files = io.files(source)
    for file in files[1:]:
        write_file(out / file.relative_to(source.parent), lambda p, f=file: shutil.copyfile(f, p))  # type: ignore[misc]
    write_file(out / "model.onnx", lambda p: shutil.copyfile(source, p))
    write_file(out / "plan.json", lambda p: p.write_text(plan.to_json()))


def write_file(target: Path, write_to: Callable[[Path], Any]) -> None:
    """Write through a temporary file in the same folder, then rename. Raises OutputError; leaves nothing behind."""
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        write_to(temporary)
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as e:
        raise OutputError(f"{target} cannot be written: {e.strerror or e}; free some space or write elsewhere") from e
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def apply(model: str | Path, plan: str | Path | Plan, *, out: str | Path, statistics: str | Path | None = None) -> Path:
    """Replay a plan on its model: the same bytes as the run that made it, without search or data.

    `plan` is `plan.json` of a run folder (its `statistics.npz` and, where it changes the structure, `structure.onnx`
    are found beside it) or a Plan with `statistics` given (`structure.onnx` is then looked for beside those).
    Raises PlanError if the plan is another model's, malformed, or what it needs is missing.
    """
    read, beside = _read(plan)
    target = Path(out)
    if not read.changed():
        io.save(io.load(model), target)
        return target
    found = Path(statistics) if statistics is not None else beside
    if dict(read.options).get(TAUGHT):
        return _taught(read, found, target)
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        path = Path(folder) / "normalised.onnx"
        io.save(normalise(io.load(model), run=None).model, path)
        known = all_techniques()
        if structure_part(read, known):
            made = _structure(read, path, found, str(model))
            stats = shrunk(_statistics(found, made.model, str(made.path)))
            numeric = numeric_part(read, known, made.left)
            io.save(build_numeric(made.model, numeric, _context(read, stats), known), target)
            return target
        stats = _statistics(found, io.load(path), str(model))
        equal, ready = equalise(io.load(path), shrunk(stats))
        io.save(equal, path)
        _check_model(read.model_sha256, path, str(model))
        io.save(build_numeric(equal, read, _context(read, ready), known), target)
    return target


def _taught(plan: Plan, statistics: Path | None, target: Path) -> Path:
    """The model of the run folder, where the original taught it: the plan alone leads to the student before that."""
    path = None if statistics is None else statistics.parent / "model.onnx"
    if path is None or not path.exists() or io.sha256(path) != dict(plan.options)[TAUGHT]:
        raise PlanError(
            "the plan's model was taught by the original, which is not repeated here: keep the run's own model.onnx "
            "beside plan.json"
        )
    io.save(io.load(path), target)
    return target


def _check_model(wanted: str, path: Path, name: str) -> None:
    """Raises PlanError unless the model at `path` is the one the plan was made for."""
    found = io.sha256(path)
    if wanted != found:
        raise PlanError(
            f"the plan was made for the model {wanted[:12] or '(none named)'} (after normalising), "
            f"but {name} is {found[:12]}; give the plan's own model"
        )


def _structure(plan: Plan, normalised: Path, statistics: Path | None, name: str) -> Staged:
    """The structure that the plan stands on, from the run folder; checked to be of this model and this plan."""
    options = dict(plan.options)
    _check_model(str(options.get(NORMALISED, "")), normalised, name)
    path = None if statistics is None else statistics.parent / STRUCTURE_FILE
    if path is None or not path.exists():
        raise PlanError(
            f"the plan changes the structure, so it needs the {STRUCTURE_FILE} and {STATISTICS} of its run folder; "
            "keep both beside plan.json"
        )
    if io.sha256(path) != options.get(STRUCTURE):
        raise PlanError(f"{path} is not the structure this plan was made with; give the one of the plan's run folder")
    return read_staged(path, "", (), None)


def _read(plan: str | Path | Plan) -> tuple[Plan, Path | None]:
    if isinstance(plan, Plan):
        return plan, None
    path = Path(plan)
    if path.is_dir():
        path = path / "plan.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise PlanError(f"{path} cannot be read ({why}); give the plan.json of a run whose budget was met") from e
    beside = path.parent / STATISTICS
    return Plan.from_json(text), beside if beside.exists() else None


def _statistics(path: Path | None, model: Any, name: str) -> Statistics:
    if path is None:
        raise PlanError(f"the plan needs the {STATISTICS} of its run folder; keep it beside plan.json, or name it")
    stats = Statistics.load(path)
    if stats.key != model_key(model):
        raise PlanError(f"{path} was read from another model than {name}; give the plan's own model and statistics")
    return stats


def _context(plan: Plan, stats: Statistics) -> Context:
    options = dict(plan.options)
    try:
        keep, fragile = (frozenset(json.loads(str(options[name]))) for name in ("keep_float", "fragile"))
        profile = Profile("replay", "", 1, 0, bool(options["int8_dot"]))
        return Context(profile, stats, int(options["seed"]), keep, fragile)
    except (KeyError, TypeError, ValueError) as e:
        raise PlanError(f"the plan's options are incomplete or malformed: {e}") from e
