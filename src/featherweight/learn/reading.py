"""The data of a run: divided, checked, and what is looked at often read once and written to disk."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featherweight import data as fwdata
from featherweight.core import Note, Progress
from featherweight.errors import DataError
from featherweight.learn.distill import Asked


def read_parts(
    asked: Asked, data: Any, specs: Sequence[fwdata.InputSpec], work: Path, progress: Progress
) -> tuple[fwdata.Splits, list[Note]]:
    """Training data as they are, validation and holdout data from `work`; and what was noted.

    Raises DataError where there are none, or no labels where labels were asked for.
    """
    notes: list[Note] = []
    parts = data if isinstance(data, fwdata.Splits) else _divided(asked, data, specs, work, notes)
    if asked.labels and not parts.calibration.has_labels:
        raise DataError(f"--labels needs labelled data, but {parts.calibration.source} has no labels; leave it out")
    read = {}
    for role in ("validation", "holdout"):
        folder = work / role
        shutil.rmtree(folder, ignore_errors=True)
        part = getattr(parts, role)
        if role == "holdout" and part.origin.stackable and not part.fixed:
            part = dataclasses.replace(part, batch_size=1).of_units(part.units())
        progress.start(f"reading {role} data", part.n_batches)
        read[role] = fwdata.spool(part, folder, inputs=specs, progress=progress)
    return fwdata.Splits(parts.calibration, read["validation"], read["holdout"]), notes


def _divided(
    asked: Asked, data: Any, specs: Sequence[fwdata.InputSpec], work: Path, notes: list[Note]
) -> fwdata.Splits:
    sources = []
    given = [asked.calibration, data] if asked.calibration is not None else [data]
    for number, source in enumerate(given):
        if source is None:
            raise DataError("distillation needs data; give some with --data")
        opened = fwdata.open_data(
            source, specs, preprocess=asked.preprocess, tokenizer=asked.tokenizer, batch_size=asked.batch_size,
            spool_folder=work / f"given-{number}",
        )  # fmt: skip
        sources.append(opened)
    evaluation = sources[1] if len(sources) > 1 else None
    parts = fwdata.split_to_teach(sources[0], seed=asked.seed, evaluation=evaluation)
    notes += [*sources[0].notes, *parts.notes]
    return parts
