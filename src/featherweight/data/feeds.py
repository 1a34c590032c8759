"""Batches from Python: a callable, `module:function`, an iterable or a mapping of arrays; spooled to disk at once.

Each item is a dict {input: array}, or (dict, labels), as the model takes it; for a model with one input the
array alone will do.
A sample without its batch axis gets one, where the model's first axis is 1 or open.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.core import Note
from featherweight.data import spool
from featherweight.data.dataset import Array, Batch, Dataset, Feeds, InputSpec, conform, grouped
from featherweight.data.npz import LABEL_NAMES, match_names, wanted_types
from featherweight.errors import DataError, OutputError

MAX_BATCHES = 10_000
MAX_BYTES = 8 << 30
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_function_name(text: str) -> bool:
    """True for `module:function`."""
    return _FUNCTION.fullmatch(text) is not None


def imported(text: str, what: str = "data") -> Callable[[], Iterable[Any]]:
    """The function `module:function` names; the current folder is searched too. Runs the user's module: that
    is what naming it means.

    Raises DataError naming what cannot be imported.
    """
    module_name, function_name = text.split(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as e:  # anything may happen in a user's module; the cause is kept
        raise DataError(f"the {what} function {text!r} cannot be imported ({type(e).__name__}: {e})") from e
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(f"module {module_name!r} has no function {function_name!r} to give {what}")
    return function  # type: ignore[no-any-return]


def open_feeds(
    source: Callable[[], Iterable[Any]] | Iterable[Any],
    inputs: Sequence[InputSpec],
    *,
    where: str,
    folder: Path | None = None,
    max_batches: int = MAX_BATCHES,
    max_bytes: int = MAX_BYTES,
) -> Dataset:
    """Run the user's code once, write what it gives under `folder` (default: a temporary one), at most
    `max_batches` and `max_bytes`.

    An endless generator is cut at `max_batches`, with a Note. Raises DataError naming the item that is wrong.
    """
    notes: list[Note] = []
    place = folder or spool.temporary_folder()
    items = source() if callable(source) else source
    if not isinstance(items, Iterable):
        raise DataError(f"{where} must give batches one after another, but gave {type(items).__name__}")
    # The user's batches stay whole: their first axis may be anything, steps of a sequence for instance.
    origin = spool.write(
        _batches(items, inputs, where, max_batches, notes),
        place / "feeds",
        where=where,
        pad_free=False,
        max_bytes=max_bytes,
    )
    groups = grouped(range(len(origin.counts)), 1)
    dtypes = tuple((i.name, i.dtype) for i in inputs)
    return Dataset(origin, groups, 1, False, dtypes, tuple(dict.fromkeys(notes)))


def _batches(
    items: Iterable[Any], inputs: Sequence[InputSpec], where: str, limit: int, notes: list[Note]
) -> Iterator[Batch]:
    stream = iter(items)
    index = 0
    while True:
        try:
            item = next(stream)
        except StopIteration:
            return
        except Exception as e:  # the user's generator; the cause is kept
            raise DataError(f"{where} failed at batch {index} ({type(e).__name__}: {e})") from e
        if index == limit:
            notes.append(Note(where, f"only the first {limit} batches are used"))
            return
        yield _batch(item, index, inputs, where, notes)
        index += 1


def _batch(item: Any, index: int, inputs: Sequence[InputSpec], where: str, notes: list[Note]) -> Batch:
    here = f"{where}, batch {index}"
    raw, labels = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    if not isinstance(raw, Mapping):
        if len(inputs) != 1:
            raise DataError(
                f"{here} must be a dict of the model's inputs {[i.name for i in inputs]}, but got {type(raw).__name__}"
            )
        raw = {inputs[0].name: raw}
    renamed, told = match_names(raw, inputs, here)
    notes += [Note(where, n.text) for n in told]
    arrays = {i.name: _array(raw[renamed[i.name]], f"{here}, input {i.name!r}") for i in inputs}
    wanted_types([(n, a.dtype, f"batch {index}, ") for n, a in arrays.items()], inputs, where, notes)
    feeds: Feeds = {i.name: conform(arrays[i.name], i.dtype, f"{here}, input {i.name!r}") for i in inputs}
    if all(i.rank is not None and feeds[i.name].ndim == i.rank - 1 and i.rows in (1, None) for i in inputs):
        feeds = {n: a[None] for n, a in feeds.items()}
        notes.append(Note(where, "items have no batch axis; one of size 1 was added"))
    found = None if labels is None else np.atleast_1d(_array(labels, f"{here}, labels"))
    firsts = {a.shape[0] if a.ndim else 1 for a in feeds.values()}
    n = len(found) if found is not None else next(iter(firsts)) if len(firsts) == 1 else 1
    return Batch(index, feeds, found, max(1, n), str(index))


def _array(value: Any, here: str) -> Array:
    try:
        array = np.asarray(value)
    except Exception as e:  # foreign array types raise what they like
        raise DataError(f"{here} cannot be read as an array ({type(e).__name__}: {e})") from e
    if array.dtype.hasobject:
        raise DataError(f"{here} is not a regular array of numbers (ragged, or Python objects)")
    return array


def from_mapping(arrays: Mapping[str, Any], folder: Path) -> Path:
    """Write arrays in memory to an `.npz` in `folder`, so that a child process can read them; its path."""
    checked = {name: _array(value, f"array {name!r}") for name, value in arrays.items()}
    path = folder / "arrays.npz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(path, **checked)  # type: ignore[arg-type]
    except OSError as e:
        raise OutputError(f"data cannot be written to {folder} ({e.strerror or e}); give another spool folder") from e
    return path


__all__ = ["LABEL_NAMES", "from_mapping", "imported", "is_function_name", "open_feeds"]
