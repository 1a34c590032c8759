"""Distillation: the original teaches a compressed model on data without labels (Hinton 2015, arXiv:1503.02531).

The student is any ONNX model with the teacher's inputs and outputs; it keeps its encodings, so with quantizers in its
graph this is quantization-aware training. Stages, each optional and measured: block by block, then end to end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.core import Note, Progress, Silent
from featherweight.errors import BudgetError, DataError, OutputError
from featherweight.learn._choices import ROUNDINGS, SCALES, Rounding, Scales
from featherweight.learn.checkpoints import need_torch
from featherweight.learn.result import Distilled
from featherweight.quantities import parse_duration, parse_size

STAGES = ("layers", "end")
DEFAULT_TIME = "20m"
#: Temperature where labels do not teach: classes that the data do not show are taught by their small scores.
TEMPERATURE = 4.0
EMA = 0.98


@dataclass(frozen=True)
class Asked:
    """One request, checked. Times in seconds, sizes in bytes; None where the default decides.

    `stages` None: blocks first where the student is the teacher block for block, or has weights on grids; else only
    end to end.
    `rate`: highest learning rate, relative to the size of each weight; None: by how damaged the student is.
    `temperature` None: `TEMPERATURE`, with labels 1. `features`: weight of inner tensors in the loss;
    `train_scales`: which scales are trained too: of `weights`, with their codebooks, of activations too, or `none`;
    `rounding`: how blocks learn weights on grids: `straight` through the rounding, or by `learned` moves of codes, with
    scales as they are;
    `ema`: decay of the averaged weights that are checked and kept, 0 for the weights as they are;
    `freeze`: patterns of names, separated by commas, of weights that stay as they are, e.g. "*embeddings*";
    `max_steps`: fixes the number of steps of each stage, so that a run does not depend on the clock.
    """

    teacher: Path
    student: Any
    stages: tuple[str, ...] | None = None
    loss: str = "auto"
    labels: bool = False
    metric: str | None = None
    augment: str = "auto"
    temperature: float | None = None
    features: float | None = None
    rate: float | None = None
    ema: float = EMA
    train_scales: Scales = "all"
    rounding: Rounding = "straight"
    freeze: str = ""
    batch_size: int = 16
    max_steps: int | None = None
    seconds: float | None = None
    max_memory: int | None = None
    threads: int = 0
    seed: int = 0
    preprocess: Any = None
    tokenizer: Path | None = None
    calibration: Any = None
    trust: bool = False

    def __post_init__(self) -> None:
        if self.stages is not None and (not self.stages or set(self.stages) - set(STAGES)):
            raise DataError(f"stages must be some of {', '.join(STAGES)}, but got {', '.join(self.stages) or 'none'}")
        for name, known in (("rounding", ROUNDINGS), ("train_scales", SCALES)):
            if getattr(self, name) not in known:
                raise DataError(f"{name} must be one of {', '.join(known)}, but got {getattr(self, name)!r}")
        for name in ("batch_size", "max_steps", "temperature", "rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BudgetError(f"{name} must be > 0, but got {value}")
        if self.features is not None and self.features < 0:
            raise BudgetError(f"features must be >= 0, but got {self.features}")
        if not 0 <= self.ema < 1:
            raise BudgetError(f"ema must be in 0..1, but got {self.ema}")

    @property
    def student_name(self) -> str:
        """The student for a report."""
        return str(self.student) if isinstance(self.student, str | Path) else type(self.student).__name__

    def identity(self) -> dict[str, Any]:
        """What a resumed run must ask again: everything but how long."""
        skipped = {"seconds", "teacher", "student", "trust"}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skipped}
        return {k: v if v is None or isinstance(v, str | int | float | bool) else str(v) for k, v in fields.items()}


def distill(
    teacher: Any,
    student: Any,
    data: Any,
    *,
    out: str | Path | None = None,
    time_budget: str | float | None = None,
    max_memory: str | float | None = None,
    resume: bool = False,
    example_inputs: Any = None,
    dynamic: Any = None,
    progress: Progress | None = None,
    **asked: Any,
) -> Distilled:
    """Teach `student` to answer as `teacher` does, and measure it before and after on data never used for that.

    Args:
        teacher: the original: an ONNX file, or a torch.nn.Module, exported program, .pt2 file or Hugging Face folder,
            converted to `source.onnx` in the run folder and checked first.
        student: a compressed ONNX model with the same inputs and outputs, or what else `--student` takes; or a
            torch.nn.Module or exported program.
        data: npz, image folder, text table, `module:function`, callable or mapping of arrays; labels are not needed.
        out: run folder for `model.onnx`, `report.json`, `report.html`; None: a temporary one (see the result's `out`).
        time_budget: of the whole run, e.g. "20m" (the default unless `max_steps` is given).
        max_memory: limit on the process's memory while training, e.g. "2GB".
        resume: go on with the run in `out` that was stopped or killed.
        example_inputs, dynamic: of a teacher that is converted, as in `convert.to_onnx`.
        progress: where long work reports itself.
        **asked: the fields of `Asked`: stages, loss, labels, metric, augment, temperature, features, rate, ema,
            train_scales, rounding, freeze, batch_size, max_steps, threads, seed, preprocess, tokenizer, calibration,
            trust (of pickled modules).

    Raises:
        MissingExtraError: torch is not installed; the text names the extra.
        FeatherweightError: of the kind that names what is wrong with the models, the data or the request.
    """
    need_torch()
    from featherweight.learn.running import Run

    known = {f.name for f in dataclasses.fields(Asked)} - {"teacher", "student", "seconds", "max_memory"}
    unknown = sorted(asked.keys() - known)
    if unknown:
        raise TypeError(f"unknown argument {unknown[0]!r}; known: {', '.join(sorted(known))}")
    if isinstance(asked.get("stages"), str):
        asked["stages"] = tuple(s.strip() for s in asked["stages"].split(",") if s.strip())
    given: dict[str, Any] = {k: tuple(v) if k == "stages" else v for k, v in asked.items() if v is not None}
    seconds = None if time_budget is None else parse_duration(time_budget)
    if seconds is None and given.get("max_steps") is None:
        seconds = parse_duration(DEFAULT_TIME)
    limit = None if max_memory is None else parse_size(max_memory)
    request = Asked(Path(), student, seconds=seconds, max_memory=limit, **given)
    folder = Path(tempfile.mkdtemp(prefix="featherweight-")) if out is None else Path(out)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"the run folder {folder} is a file; name a folder")
    if not resume:
        _clear(folder)
    shown = progress or Silent()
    door = {"example_inputs": example_inputs, "dynamic": dynamic, "trust": request.trust}
    with (
        _converted(teacher, request, data, folder, door, resume, shown) as (ready, told),
        Run(ready, data, folder, shown) as run,
    ):
        run.notes += told
        return run.whole(resume=resume)


def _clear(folder: Path) -> None:
    """Make room for a new run. Raises OutputError where the folder holds another, of this or another command."""
    if (folder / "work" / "checkpoints").exists():
        raise OutputError(f"{folder} holds a run that was stopped; continue it with --resume, or name another folder")
    held = [name for name in ("journal.sqlite", "model.onnx", "report.json") if (folder / name).exists()]
    if held:
        raise OutputError(f"{folder} already holds a run ({held[0]}); name another folder")
    shutil.rmtree(folder / "work", ignore_errors=True)


@contextlib.contextmanager
def _converted(
    teacher: Any, request: Asked, data: Any, folder: Path, door: dict[str, Any], resume: bool, progress: Progress
) -> Iterator[tuple[Asked, tuple[Note, ...]]]:
    """The request with the teacher's ONNX file, and what its conversion told; gone again if the run is refused."""
    from featherweight import convert

    kept = resume or (folder / convert.FILE).exists()  # what was there before does not go with a refusal
    found = convert.into_run(teacher, folder, data=data, resume=resume, progress=progress, **door)
    if found is None:
        yield dataclasses.replace(request, teacher=Path(teacher)), ()
        return
    tokenizer = request.tokenizer or found.tokenizer
    told = (Note(found.source, found.line), *found.notes)
    try:
        yield dataclasses.replace(request, teacher=found.path, tokenizer=tokenizer), told
    except BaseException:
        if not kept and not (folder / "work" / "checkpoints").exists():
            convert.forget(folder)
        raise
