"""A metric that kills the process that runs it, as a native kernel may; found by the child through PYTHONPATH."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np


def score(outputs: dict[str, np.ndarray], labels: np.ndarray | None) -> np.ndarray:
    """Accuracy, or death by SIGSEGV while the file that CRASH_WHILE names has letters left (one is used up)."""
    fuse = Path(os.environ["CRASH_WHILE"])
    left = fuse.read_text() if fuse.exists() else ""
    if left and not np.isin(outputs["logits"], np.load(os.environ["CRASH_UNLESS"])).all():
        fuse.write_text(left[1:])
        os.kill(os.getpid(), signal.SIGSEGV)
    return np.asarray(outputs["logits"].argmax(axis=1) == labels, np.float64)


score.per_batch = True
