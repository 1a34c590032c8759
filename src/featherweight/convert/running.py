"""A converted model in a run folder, or for a while in a temporary one; files are read in a child process."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.convert import extras, formats
from featherweight.convert.door import Converted, is_convertible, to_onnx
from featherweight.core import Note, Progress, Silent
from featherweight.errors import DataError, OutputError
from featherweight.runtime.sandbox import Worker
from featherweight.whole import write_text

FILE, RECORD = "source.onnx", "source.json"
EXAMPLES = 2
"""Rows taken from the data where a module comes without example inputs."""


def into_run(
    model: Any,
    folder: Path,
    *,
    data: Any = None,
    example_inputs: Any = None,
    dynamic: Any = None,
    trust: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Converted | None:
    """Convert `model` to `source.onnx` in a run folder, with `source.json` beside it; None if it is a path to ONNX.

    With `resume` the file that is there is taken. Without `example_inputs` a module's come from `data` where its arrays
    are called like the parameters of `forward`. Raises what `to_onnx` raises, OutputError if the folder holds a run.
    """
    if not is_convertible(model):
        return None
    if resume and (folder / FILE).is_file() and (folder / RECORD).is_file():
        return _read(folder)
    if (folder / "journal.sqlite").exists():
        raise OutputError(f"{folder} already holds a run; continue it with --resume, or name another folder")
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"the run folder {folder} cannot be made: {e.strerror or e}") from e
    try:
        found = _converted(model, folder / FILE, data, example_inputs, dynamic, trust, progress or Silent())
        _write(found, folder)
    except BaseException:
        if fresh:
            forget(folder)
        raise
    return found


def forget(folder: Path) -> None:
    """Remove what `into_run` made in a folder, and the folder if it is empty then."""
    for name in (FILE, f"{FILE}.data", RECORD):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def as_onnx(model: Any, *, trust: bool = False, example_inputs: Any = None) -> Iterator[tuple[Path, Converted | None]]:
    """The path of a model's ONNX file: its own, or of a conversion that is gone afterwards."""
    if not is_convertible(model):
        yield Path(model), None
        return
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        name = f"{Path(model).stem}.onnx" if isinstance(model, str | Path) else "model.onnx"
        found = _converted(model, Path(folder) / name, None, example_inputs, None, trust, Silent())
        yield found.path, found


def convert_file(
    source: str | Path,
    out: Path,
    *,
    trust: bool = False,
    dynamic: Any = None,
    data: Any = None,
    progress: Progress | None = None,
) -> Converted:
    """`to_onnx` of a path in a child process, whose memory is given back and whose crash is an error.

    `data`: arrays (or an .npz) whose first rows are what a pickled module is run on, if called like its parameters.
    """
    (progress or Silent()).start("converting to ONNX")
    path = Path(source)
    if path.is_dir():
        extras.need_transformers(f"reading {path}")
    elif path.exists():
        extras.need_torch(f"reading {path}")
    pickled = trust and path.is_file() and formats.kind_of(path) == "pickle"
    rows = {n: np.asarray(a)[:EXAMPLES] for n, a in _arrays(data).items() if np.ndim(a)} if pickled else {}
    with Worker() as worker:
        return worker.call(
            _in_child, str(source), str(out), dynamic, trust, rows, doing=f"converting {Path(source).name or source}"
        )


def _in_child(source: str, out: str, dynamic: Any, trust: bool, rows: Mapping[str, Any]) -> Converted:
    if formats.kind_of(Path(source)) != "pickle" or not rows:
        return to_onnx(source, out, dynamic=dynamic, trust=trust)
    return to_onnx(source, out, example_inputs=lambda module: _from_data(module, rows), dynamic=dynamic, trust=trust)


def _converted(
    model: Any, out: Path, data: Any, examples: Any, dynamic: Any, trust: bool, progress: Progress
) -> Converted:
    if isinstance(model, str | Path) and examples is None:
        return convert_file(model, out, trust=trust, dynamic=dynamic, data=data, progress=progress)
    if examples is None and data is not None:
        examples = _from_data(model, data)
    return to_onnx(model, out, example_inputs=examples, dynamic=dynamic, trust=trust, progress=progress)


def _from_data(model: Any, data: Any) -> dict[str, Any] | None:
    """The first rows of arrays called like the parameters of `forward`; None where the data has none such."""
    forward = getattr(model, "forward", None)
    arrays = _arrays(data)
    if forward is None or not arrays:
        return None
    wanted = list(inspect.signature(forward).parameters.values())
    found = {p.name: np.asarray(arrays[p.name])[:EXAMPLES] for p in wanted if p.name in arrays}
    needed = [p.name for p in wanted if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    absent = [name for name in needed if name not in found]
    if absent:
        raise DataError(
            f"the data must have an array for each input of forward, but lacks {absent[0]!r} (it has "
            f"{', '.join(arrays)}); rename it, or give example_inputs="
        )
    return found


def _arrays(data: Any) -> Mapping[str, Any]:
    if isinstance(data, Mapping):
        return data
    if isinstance(data, str | Path) and Path(data).suffix.lower() == ".npz" and Path(data).is_file():
        try:
            with np.load(data, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except (OSError, ValueError, EOFError) as e:
            raise DataError(f"{data} is not a readable .npz ({e})") from e
    return {}


def _write(found: Converted, folder: Path) -> None:
    record = {
        "schema": 1, "source": found.source, "largest_difference": found.largest_difference,
        "sizes": [dict(s) for s in found.sizes], "notes": [dataclasses.asdict(n) for n in found.notes],
        "tokenizer": None if found.tokenizer is None else str(found.tokenizer.absolute()),
    }  # fmt: skip
    write_text(json.dumps(record, indent=1), folder / RECORD)


def _read(folder: Path) -> Converted:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return Converted(
            folder / FILE,
            record["source"],
            record["largest_difference"],
            tuple(record["sizes"]),
            tuple(Note(**n) for n in record["notes"]),
            None if record["tokenizer"] is None else Path(record["tokenizer"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise OutputError(f"{folder / RECORD} cannot be read ({e}); name another folder") from e
