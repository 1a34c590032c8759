"""What a file answers on the evaluation data, and how that compares with the float original, paired."""

from __future__ import annotations

import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks import feeds
from benchmarks.tasks import Task

RESAMPLES = 2000


@dataclass(frozen=True)
class Quality:
    """`metric`: top-1 or Spearman. `drop`: float minus this. `p`: two-sided, paired. `closeness`: see `compare`."""

    metric: float
    drop: float
    p: float
    closeness: float
    n: int


def outputs(task: Task, path: Path, work: Path) -> np.ndarray:
    """The single output of a file on all evaluation rows (rows, width) f32; kept by the file's hash.

    It runs in a child process: a file may abort the runtime. Raises RuntimeError saying how.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:24]
    kept = work / "outputs" / f"{task.name}-{digest}.npy"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                pool.submit(_run, task.name, path, work / "data" / task.evaluation, kept).result()
            except BrokenProcessPool as e:
                raise RuntimeError(f"the runtime died on {path.name}") from e
    return np.asarray(np.load(kept))


def _run(name: str, path: Path, data: Path, kept: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rows = [session.run(None, feed)[0] for feed in feeds.read(data, name)]
    np.save(kept, np.concatenate(rows).astype(np.float32))


def compare(task: Task, labels: np.ndarray, original: np.ndarray, candidate: np.ndarray) -> Quality:
    """Images: accuracy, McNemar's exact test, top-1 agreement. Pairs: Spearman, bootstrap, mean cosine to float."""
    if task.kind == "images":
        before, after = original.argmax(1) == labels, candidate.argmax(1) == labels
        lost, won = int((before & ~after).sum()), int((~before & after).sum())
        p = float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0
        agreement = float((original.argmax(1) == candidate.argmax(1)).mean())
        return Quality(float(after.mean()), float(before.mean() - after.mean()), p, agreement, len(labels))
    before, after = _similarities(original), _similarities(candidate)
    metric, baseline = spearman(after, labels), spearman(before, labels)
    rng = np.random.default_rng(0)
    drops = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        rows = rng.integers(0, len(labels), len(labels))
        drops[i] = spearman(before[rows], labels[rows]) - spearman(after[rows], labels[rows])
    # One is added so that no finite number of resamples claims a probability of zero.
    tail = (1 + min((drops <= 0).sum(), (drops >= 0).sum())) / (1 + RESAMPLES)
    cosine = float((unit(original) * unit(candidate)).sum(1).mean())
    return Quality(metric, baseline - metric, float(min(1.0, 2 * tail)), cosine, len(labels))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation of (n,) and (n,)."""
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of (n, d) scaled to length one; a row of zeros stays."""
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))


def _similarities(embeddings: np.ndarray) -> np.ndarray:
    """Cosine of the two sentences of each pair: rows 2i and 2i + 1 of (2n, d)."""
    e = unit(embeddings)
    return np.asarray((e[0::2] * e[1::2]).sum(1))
