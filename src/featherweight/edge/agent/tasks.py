"""What a job's child process does. Its inputs are files that strangers sent; its limits are set by the agent.

Feeds and outputs are `.npz` archives with keys `<batch>::<name>`, batches in order of first appearance.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.errors import DataError

__all__ = ["SEPARATOR", "latency", "memory", "outputs", "read_batches", "runtime_version", "score", "write_batches"]

Array = npt.NDArray[Any]
ProgressCallback = Callable[[int, int], None]
SEPARATOR = "::"
MEASURED_FEEDS = 16
"""Inputs that latency goes through; more make no difference to a median."""


def write_batches(path: Path, batches: Sequence[Mapping[str, Array]], *, first: int = 0) -> None:
    """Write arrays by name, batch by batch; the same batches give the same bytes. `first`: number of the first."""
    arrays: dict[str, Array] = {}
    for number, batch in enumerate(batches, start=first):
        for name, value in batch.items():
            arrays[f"{number:06d}{SEPARATOR}{name}"] = plain(value, name)
    np.savez(path, **arrays)  # type: ignore[arg-type]


def plain(value: Array, name: str) -> Array:
    """An array that `.npz` can hold without pickling. Raises DataError for types it has no name for."""
    if value.dtype.kind == "O":
        return value.astype("U")
    if value.dtype.kind == "V":
        raise DataError(f"{name!r} is of type {value.dtype}, which .npz cannot hold; cast it to float32 in the model")
    return value


def read_batches(path: Path) -> Iterator[dict[str, Array]]:
    """Batches of an archive, one at a time. Raises DataError for anything malformed."""
    from featherweight.data import arrays

    batches: dict[str, dict[str, arrays.Member]] = {}
    for member in arrays.members(path):
        number, found, name = member.key.partition(SEPARATOR)
        if not found or not name:
            raise DataError(f"keys must be '<batch>{SEPARATOR}<input>', but one is {member.key[:80]!r}")
        batches.setdefault(number, {})[name] = member
    if not batches:
        raise DataError("an archive of feeds must hold at least one batch, but it is empty")
    with arrays.opened(path) as z:
        for members in batches.values():
            yield {name: arrays.read_whole(member, z) for name, member in members.items()}


def runtime_version() -> str:
    """Version of the runtime; asked in a child, so that the agent itself need not load it."""
    from featherweight.runtime import ort

    return ort.VERSION


def outputs(
    model: str,
    feeds: Sequence[str],
    out: str,
    names: Sequence[str] | None,
    threads: int,
    max_bytes: int,
    progress: ProgressCallback | None = None,
) -> int:
    """Run a model on all batches of some archives and write its outputs to one; the number of batches.

    Raises ModelError, RunError, DataError: the model or the feeds cannot be used, or outputs exceed `max_bytes`.
    """
    import zipfile

    from featherweight.runtime import ort

    _prepare(model)
    session = ort.session(model, threads=threads)
    total = sum(_count(Path(file)) for file in feeds)
    written = done = 0
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:
        for file in feeds:
            for batch in read_batches(Path(file)):
                for name, value in session.run(_typed(batch, session), names).items():
                    value = plain(value, name)
                    written += value.nbytes
                    if written > max_bytes:
                        raise DataError(
                            f"outputs must fit into {max_bytes} bytes, but after {done} of {total} batches they have "
                            f"{written}; ask for fewer batches at a time, or for single outputs by name"
                        )
                    with z.open(f"{done:06d}{SEPARATOR}{name}.npy", "w", force_zip64=True) as f:
                        np.lib.format.write_array(f, value, allow_pickle=False)
                done += 1
                if progress is not None:
                    progress(done, total)
    return done


def latency(original: str, candidate: str, feeds: Sequence[str], threads: int, time_limit_s: float) -> Any:
    """A `runtime.measure.LatencyResult` of two models in turns, a child of this child each.

    Raises ModelError, RunError, ChildCrashed, DataError.
    """
    from featherweight.runtime import measure

    for path in (original, candidate):
        _prepare(path)
    read = _feeds(original, feeds)
    return measure.latency(original, candidate, read, threads=threads, time_limit_s=time_limit_s)


def memory(model: str, feeds: Sequence[str], threads: int) -> Any:
    """A `runtime.measure.MemoryResult`. Raises ModelError, RunError, ChildCrashed, DataError."""
    from featherweight.runtime import measure

    _prepare(model)
    return measure.memory(model, _feeds(model, feeds)[0], threads=threads)


def score(
    model: str, original: str | None, data: str, metric: str, threads: int, progress: ProgressCallback | None = None
) -> tuple[str, float, int]:
    """Name, value and number of samples of a built-in metric on an archive with labels as `--data` takes it.

    Raises ModelError, RunError, DataError.
    """
    from featherweight import data as fwdata
    from featherweight.data.spool import named_dtype
    from featherweight.runtime import evaluate, metrics, ort
    from featherweight.runtime.sandbox import Worker

    for path in (model, original):
        if path is not None:
            _prepare(path)
    specs = [fwdata.InputSpec(i.name, named_dtype(i.dtype), i.shape) for i in ort.session(model).inputs]
    chosen = metrics.get(metric)
    dataset = fwdata.open_data(Path(data), specs)
    if chosen.needs_reference and original is None:
        raise DataError(f"the metric {metric} compares with another model's outputs; name one as 'original'")
    with Worker() as worker:
        found = evaluate.evaluate(
            model, dataset, chosen, reference=original, worker=worker, threads=threads, progress=progress
        )
    return found.metric_name, found.value, found.n_samples


def _prepare(model: str) -> None:
    """Be the first that a device out of memory kills, and see that the model's files are its own."""
    from featherweight.graph import io

    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("900")
    io.files(model)  # weights outside the job's folder, absent or cut short are refused here


def _feeds(model: str, files: Sequence[str]) -> list[dict[str, Array]]:
    from featherweight.runtime import ort

    session = ort.session(model)
    read: list[dict[str, Array]] = []
    for file in files:
        for batch in read_batches(Path(file)):
            read.append(_typed(batch, session))
            if len(read) == MEASURED_FEEDS:
                return read
    return read


def _typed(batch: dict[str, Array], session: Any) -> dict[str, Array]:
    """Texts as the runtime takes them; archives hold them with a fixed length."""
    texts = {i.name for i in session.inputs if i.dtype == "object"}
    return {name: value.astype(object) if name in texts else value for name, value in batch.items()}


def _count(path: Path) -> int:
    from featherweight.data import arrays

    return len({member.key.partition(SEPARATOR)[0] for member in arrays.members(path)})
