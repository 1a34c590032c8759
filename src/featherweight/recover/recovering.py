"""`recover`: both models to files, the pass in a child process, the new weights into the reduced model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from featherweight.core import Note
from featherweight.graph import io, surgery
from featherweight.recover.layers import prepare
from featherweight.recover.passes import Settings, Solved, run_pass


@dataclass(frozen=True)
class Recovered:
    """`model`: the reduced model with its new weights; `solved`: each layer in order; `notes`: what was left alone."""

    model: ir.Model
    solved: tuple[Solved, ...]
    notes: tuple[Note, ...]


def recover(
    original: ir.Model,
    reduced: ir.Model,
    dataset: Any,
    *,
    worker: Any = None,
    threads: int = 1,
    seed: int = 0,
    max_bytes: int = 2 << 30,
    biases_only: bool = False,
    spread: bool = True,
    epochs: int = 1,
    progress: Any = None,
) -> Recovered:
    """Solve the weights of `reduced`, in place, so that its layers answer as those of `original` do.

    Args:
        original: the normalised float model; not changed.
        reduced: made from it: values that mean the same have the same names, those that lost channels say which
            are left (`graph.channels.kept`).
        dataset: something with `batches()`, each with `feeds` by input name and `n` samples, or a list of feeds.
        worker: a running `runtime.sandbox.Worker`; None starts one for this call.
        threads: of the runtime in the child.
        seed: of the drawing of rows.
        max_bytes: of values of both models kept at a time; fewer samples are taken where they do not fit.
        biases_only: leave the weights and correct only the biases.
        spread: scale outputs (not of residual branches) to vary as the original's do: least squares lets signals fade.
        epochs: passes over all layers.
        progress: called as (layers done, layers).

    Raises:
        DataError: the dataset has no batch.
        RunError, ChildCrashed: a model fails or dies on the data.
    """
    layers, notes = prepare(original, reduced)
    if not layers:
        return Recovered(reduced, (), tuple(notes))
    with tempfile.TemporaryDirectory(prefix="featherweight-recover-") as folder:
        paths = [str(Path(folder) / name) for name in ("original.onnx", "reduced.onnx")]
        io.save(original, paths[0])
        io.save(reduced, paths[1])
        job = (*paths, dataset, layers, Settings(threads, seed, max_bytes, biases_only, spread, epochs))
        arrays, solved, more = _run(worker, job, progress)
    stored = reduced.graph.initializers
    for name, array in arrays.items():
        surgery.set_initializer(stored[name], array, dtype=stored[name].dtype)
    return Recovered(reduced, tuple(solved), (*notes, *more))


def _run(worker: Any, job: Any, progress: Any) -> Any:
    if worker is not None:
        return worker.call(run_pass, *job, progress=progress, doing="solving weights anew")
    from featherweight.runtime.sandbox import Worker

    with Worker() as own:
        return own.call(run_pass, *job, progress=progress, doing="solving weights anew")
