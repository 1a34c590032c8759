"""The student of a distillation from what the user says: a file, a function, or a cut of the teacher.

`make_student` always ends with an ONNX file whose inputs and outputs are the teacher's, by name, type and shape.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from featherweight import convert
from featherweight.convert import formats
from featherweight.core import Note
from featherweight.data import feeds
from featherweight.data.dataset import Dim, InputSpec
from featherweight.errors import ModelError
from featherweight.graph import io, surgery
from featherweight.graph.channels.sizes import concrete
from featherweight.graph.normalise import normalise
from featherweight.learn import narrow, repeats

FORMS = (
    "student.onnx, student.pt2, module:factory (a function that returns a torch module or an ONNX model), or a cut of "
    "the teacher: layers=3 (that many of its repeated blocks, evenly spread), layers=0,2,5 (these), layers=50%, "
    "width=50% (half of all channels and heads that can be cut), width=50%:PATTERN (of layers so named); "
    "several with ';' between"
)
"""What may stand after --student."""


@dataclass(frozen=True)
class Made:
    """The student's file, what was done to make it, and (teacher tensor, student tensor) that correspond."""

    path: Path
    notes: tuple[Note, ...] = ()
    pairs: narrow.Pairs = ()


def shared_inputs(teacher: Sequence[InputSpec], student: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    """What both can be fed: the teacher's inputs, an axis fixed where either fixes it (a batch of 1, for instance).

    The student must have its teacher's interface, as those of `make_student` have.
    """
    ours = {s.name: s.shape for s in student}
    return tuple(replace(spec, shape=_fixed_in_either(spec.shape, ours[spec.name])) for spec in teacher)


def _fixed_in_either(a: tuple[Dim, ...] | None, b: tuple[Dim, ...] | None) -> tuple[Dim, ...] | None:
    if a is None or b is None:
        return a or b
    return tuple(y if isinstance(y, int) else x for x, y in zip(a, b, strict=True))


def make_student(teacher: Path, spec: Any, out: Path, *, trust: bool = False, seed: int = 0) -> Made:
    """The student that `spec` asks for, as an ONNX file; a cut or converted one is written to `out`.

    `spec` is text or a path (see FORMS), or a torch module or exported program; `trust` allows a pickled one. A
    given .onnx file is checked and used where it lies; a function is called with all random generators at `seed`.

    Raises ModelError for a spec or a teacher that does not fit, a function that fails or a student with another
    interface, DataError for a function that cannot be imported, MissingExtraError where torch is needed and absent,
    OutputError if `out` cannot be written.
    """
    if not isinstance(spec, str | Path):
        return _converted(io.load(teacher), spec, out, trust=trust)
    text = str(spec).strip()
    if _is_cut(text):
        return _cut(teacher, text, out)
    reference = io.load(teacher)
    if feeds.is_function_name(text):
        with _seeded(seed):
            return _from_function(reference, text, out, trust=trust)
    path = Path(text)
    if not text or not path.exists():
        raise ModelError(f"--student must be {FORMS}; but {text!r} is none of them and no file of that name exists")
    if path.suffix == ".onnx":
        _same_interface(reference, io.load(path), str(path))
        return Made(path)
    return _converted(reference, path, out, trust=trust)


def _is_cut(text: str) -> bool:
    return all(t.partition("=")[0].strip() in ("layers", "width") and "=" in t for t in _terms(text)) and bool(text)


def _terms(text: str) -> list[str]:
    return [t for t in text.replace(";", " ").split() if t]


def _cut(teacher: Path, text: str, out: Path) -> Made:
    """Blocks first, then widths of what is left."""
    model = normalise(io.load(teacher), run=None).model
    before = concrete(model, None)
    notes: list[Note] = []
    pairs: narrow.Pairs = ()
    terms = [(t.partition("=")[0], t.partition("=")[2]) for t in _terms(text)]
    asked = [value for name, value in terms if name == "layers"]
    if len(asked) > 1:
        raise ModelError(f"layers= may be said once, but {text!r} says it {len(asked)} times")
    if asked:
        pairs, note = _leave_out(model, asked[0])
        notes.append(note)
    for name, value in terms:
        if name == "width":
            share, _, pattern = value.partition(":")
            notes += narrow.thin(model, narrow.share_of(share), pattern or "*")
    after = concrete(model, None)
    io.save(model, out)
    return Made(out, tuple(notes), tuple(p for p in pairs if before.get(p[0]) == after.get(p[1])))


def _leave_out(model: ir.Model, value: str) -> tuple[narrow.Pairs, Note]:
    blocks = repeats.blocks(model)
    if not blocks:
        raise ModelError(
            "layers= needs a teacher with repeated residual blocks of equal shape, but none were found; use width=50%"
        )
    kept = _kept(value, len(blocks))
    pairs = narrow.keep_blocks(blocks, kept)
    surgery.remove_unused(model)
    problem = narrow.still_there(model, blocks, kept)
    if problem:
        raise ModelError(f"{problem}; choose other layers or use width=50%")
    return pairs, Note("layers", f"blocks {', '.join(map(str, kept))} of {len(blocks)} kept")


def _kept(value: str, n: int) -> tuple[int, ...]:
    try:
        if value.endswith("%"):
            return narrow.spread(n, max(1, round(narrow.share_of(value) * n)))
        numbers = [int(v) for v in value.rstrip(",").split(",")]
    except ValueError as e:
        raise ModelError(f"layers= takes a number, a list such as 0,2,5 or a share such as 50%, not {value!r}") from e
    if len(numbers) == 1 and not value.endswith(","):
        return narrow.spread(n, numbers[0])
    if len(set(numbers)) < len(numbers) or not all(0 <= i < n for i in numbers):
        raise ModelError(f"layers= must list different numbers from 0 to {n - 1}, but got {value!r}")
    return tuple(sorted(numbers))


def _from_function(teacher: ir.Model, text: str, out: Path, *, trust: bool) -> Made:
    """A function without arguments; what it returns is a torch module, an ONNX model or a path to one."""
    function: Callable[[], Any] = feeds.imported(text, "student")
    try:
        made = function()
    except Exception as e:  # anything may happen in a user's function; the cause is kept
        raise ModelError(f"the student function {text!r} failed ({type(e).__name__}: {e})") from e
    if isinstance(made, onnx.ModelProto):
        made = ir.from_proto(made)
    if isinstance(made, ir.Model):
        _same_interface(teacher, made, text)
        io.save(made, out)
        return Made(out)
    if isinstance(made, str | Path) and Path(made).suffix == ".onnx":
        _same_interface(teacher, io.load(made), str(made))
        return Made(Path(made))
    return _converted(teacher, made, out, trust=trust)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The generators of Python, NumPy and torch at `seed`, and as they were afterwards."""
    kept = random.getstate(), np.random.get_state()  # the user's code may use the global one
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        torch = None
    try:
        with torch.random.fork_rng(devices=[]) if torch is not None else contextlib.nullcontext():
            if torch is not None:
                torch.manual_seed(seed)
            yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def _converted(teacher: ir.Model, source: Any, out: Path, *, trust: bool) -> Made:
    """A torch module, program or file through the door; inputs and outputs take the teacher's names, in order."""
    if not convert.is_convertible(source):
        what = str(source) if isinstance(source, Path) else f"a {type(source).__name__}"
        raise ModelError(f"--student must be {FORMS}; but got {what}")
    source = Path(source) if isinstance(source, str) else source
    own = formats.kind_of(source) != "pickle" if isinstance(source, Path) else hasattr(source, "example_inputs")
    examples = None if own else _examples(teacher)  # programs and folders know what they take
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        converted = convert.to_onnx(source, Path(folder) / "student.onnx", example_inputs=examples, trust=trust)
        student = io.load(converted.path)
        _rename(teacher.graph.inputs, student.graph.inputs)
        _rename(teacher.graph.outputs, student.graph.outputs)
        _same_interface(teacher, student, str(source) if isinstance(source, Path) else "the student")
        io.save(student, out)
    return Made(out, (Note("student", converted.line), *converted.notes))


def _examples(teacher: ir.Model) -> tuple[Any, ...]:
    """Inputs of the teacher's types and shapes as tensors: noise, and zeros for integers, which are legal as tokens."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as e:
        from featherweight.errors import MissingExtraError

        raise MissingExtraError(
            "a torch student needs torch; install it with: pip install 'featherweight[torch]'"
        ) from e
    found, rng = [], np.random.default_rng(0)
    for value in _inputs(teacher):
        shape = [d if isinstance(d, int) else (2 if a == 0 else 32) for a, d in enumerate(value.shape or ())]
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        array = rng.normal(size=shape).astype(dtype) if dtype.kind == "f" else np.zeros(shape, dtype)
        found.append(torch.from_numpy(array))
    return tuple(found)


def _inputs(model: ir.Model) -> list[ir.Value]:
    return [v for v in model.graph.inputs if not v.is_initializer()]


def _rename(wanted: Sequence[ir.Value], given: Sequence[ir.Value]) -> None:
    """Names by position where not all of them are there already; twice, as a name may be in the way of another."""
    if len(wanted) != len(given) or {v.name for v in wanted} == {v.name for v in given}:
        return
    for i, value in enumerate(given):
        value.name = f"featherweight_student_{i}"
    for old, new in zip(wanted, given, strict=True):
        new.name = old.name


def _same_interface(teacher: ir.Model, student: ir.Model, what: str) -> None:
    """Raises ModelError unless the student takes and gives what the teacher does."""
    sides: tuple[tuple[str, Callable[[ir.Model], list[ir.Value]]], ...] = (
        ("input", _inputs),
        ("output", lambda m: list(m.graph.outputs)),
    )
    for side, of in sides:
        wanted, given = ({v.name or "": v for v in of(m)} for m in (teacher, student))
        if set(wanted) != set(given):
            raise ModelError(
                f"a student's {side}s must be called as its teacher's: {', '.join(wanted)}; "
                f"but those of {what} are {', '.join(given)}"
            )
        for name, value in wanted.items():
            other = given[name]
            if value.dtype != other.dtype or not _shapes_agree(value.shape, other.shape):
                raise ModelError(
                    f"a student's {side} {name!r} must be {_described(value)} as its teacher's, "
                    f"but that of {what} is {_described(other)}"
                )


def _shapes_agree(a: ir.Shape | None, b: ir.Shape | None) -> bool:
    if a is None or b is None:
        return True
    return len(a) == len(b) and all(
        x == y for x, y in zip(a, b, strict=True) if isinstance(x, int) and isinstance(y, int)
    )


def _described(value: ir.Value) -> str:
    kind = value.dtype.name if value.dtype is not None else "of an unknown type"
    return f"{kind} ({', '.join('?' if d is None else str(d) for d in value.shape or ())})"
