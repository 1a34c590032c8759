"""Where a training run stands, on disk: tensors as safetensors, the rest as JSON, written whole or not at all.

A checkpoint is a folder `step-N` of the two files, built under another name, synced and renamed; the one before it goes
only then. So a run that is killed at any moment finds its last whole checkpoint. Nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import DataError, MissingExtraError, OutputError

if TYPE_CHECKING:
    import torch

    from featherweight.data import Dataset

SCHEMA = 1
STATE, TENSORS = "state.json", "tensors.safetensors"
PREFIX = "step-"
FINGERPRINT_BATCHES = 16


@dataclass(frozen=True)
class Saved:
    """One checkpoint read back."""

    state: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


class Checkpoints:
    """The checkpoints of one run in one folder: only the last is kept.

    `asked`: what the run was asked to do; a checkpoint of another request is refused.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        self.folder = folder
        self.asked = json.loads(json.dumps(asked))

    def write(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep where the run stands after `step` steps over all stages. Raises OutputError; the one before stays."""
        from safetensors.torch import save_file

        target = self.folder / f"{PREFIX}{step:09d}"
        temporary = self.folder / f".{target.name}.{os.getpid()}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary / TENSORS)
            document = {"schema": SCHEMA, "asked": self.asked, "step": step, "state": state}
            (temporary / STATE).write_text(json.dumps(document, indent=1), encoding="utf-8")
            for file in (temporary / TENSORS, temporary / STATE, temporary):
                _sync(file)
            shutil.rmtree(target, ignore_errors=True)
            temporary.replace(target)
            _sync(self.folder)
        except OSError as e:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OutputError(
                f"the checkpoint {target} cannot be written ({e.strerror or e}); free some space or name another folder"
            ) from e
        for other in self._all():
            if other != target:
                shutil.rmtree(other, ignore_errors=True)

    def read(self) -> Saved | None:
        """The last whole checkpoint, or None. Raises DataError where it is of another run or damaged."""
        found = self._all()
        if not found:
            return None
        folder = found[-1]
        try:
            raw = json.loads((folder / STATE).read_text(encoding="utf-8"))
            schema, asked, state = raw["schema"], raw["asked"], raw["state"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(f"the checkpoint {folder} must be a whole one, but {e}; remove it to begin anew") from e
        if schema != SCHEMA:
            raise DataError(f"a checkpoint must have schema {SCHEMA}, but {folder} has {schema!r}; remove it")
        differing = sorted(k for k in {*asked, *self.asked} if asked.get(k) != self.asked.get(k))
        if differing:
            k = differing[0]
            raise DataError(
                f"a resumed run must be asked the same, but {k} was {asked.get(k)!r} and is {self.asked.get(k)!r}; "
                "ask the same, or give a new folder"
            )
        return Saved(state, _tensors(folder / TENSORS))

    def clear(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if p.name.startswith(PREFIX) and p.is_dir())


def fingerprint(dataset: Dataset) -> str:
    """A hash of the first batches: data that comes in another order each time is told from what it was."""
    digest = hashlib.sha256()
    for batch in itertools.islice(dataset.batches(), FINGERPRINT_BATCHES):
        for name, array in sorted(batch.feeds.items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    import safetensors
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, safetensors.SafetensorError) as e:
        raise DataError(f"the checkpoint {path} must be a whole one, but {e}; remove its folder to begin anew") from e


def _sync(path: Path) -> None:
    """Reach the disk before the rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def need_torch() -> None:
    """Raises MissingExtraError, naming the extra, where torch or safetensors are not installed."""
    try:
        import safetensors.torch  # noqa: F401
        import torch  # noqa: F401
    except ImportError as e:
        raise MissingExtraError(
            f"distillation needs the packages 'torch' and 'safetensors' ({e}); install featherweight[learn]"
        ) from e
