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

from benchmarks import feeds, ocr, speech
from benchmarks.tasks import Task

RESAMPLES = 2000


@dataclass(frozen=True)
class Quality:
    """`metric`: see `compare`. `drop`: float minus this. `p`: two-sided, paired. `closeness`: see `compare`."""

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
    answers = (session.run(None, feed)[0] for feed in feeds.read(data, name))
    # Of (1, steps, characters) only the winning character of each step is kept.
    rows = [a.argmax(-1) if a.ndim == 3 else a for a in answers]
    np.save(kept, np.concatenate(rows).astype(np.float32))


def compare(task: Task, labels: np.ndarray, original: np.ndarray, candidate: np.ndarray) -> Quality:
    """Images: accuracy, McNemar's exact test, top-1 agreement. Pairs: Spearman, bootstrap, mean cosine to float.

    Lines: lines read without a mistake, McNemar, agreement of the steps where either reads a character. Voices:
    1 - equal error rate, bootstrap over groups, mean cosine of the windows to float.
    """
    if task.kind == "images":
        agreement = float((original.argmax(1) == candidate.argmax(1)).mean())
        return _counted(original.argmax(1) == labels, candidate.argmax(1) == labels, agreement)
    if task.kind == "lines":
        before, after = ocr.lines_read(original, labels), ocr.lines_read(candidate, labels)
        written = (original != 0) | (candidate != 0)
        return _counted(before, after, float((original == candidate)[written].mean()))
    if task.kind == "voices":
        return _voices(labels, original, candidate)
    before, after = _similarities(original), _similarities(candidate)
    metric, baseline = spearman(after, labels), spearman(before, labels)
    rng = np.random.default_rng(0)
    drops = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        rows = rng.integers(0, len(labels), len(labels))
        drops[i] = spearman(before[rows], labels[rows]) - spearman(after[rows], labels[rows])
    return Quality(metric, baseline - metric, _two_sided(drops), _cosine(original, candidate), len(labels))


def _counted(before: np.ndarray, after: np.ndarray, closeness: float) -> Quality:
    """Right answers (n,) bool of the original and of the candidate."""
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    p = float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return Quality(float(after.mean()), float(before.mean() - after.mean()), p, closeness, len(before))


def _voices(labels: np.ndarray, original: np.ndarray, candidate: np.ndarray) -> Quality:
    speakers = labels[np.unique(labels[:, 1], return_index=True)[1], 0]
    before, after = (speech.group_vectors(x, labels[:, 1]) for x in (original, candidate))
    rng = np.random.default_rng(0)
    drops = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        # A group drawn twice would be compared with itself.
        rows = np.unique(rng.integers(0, len(speakers), len(speakers)))
        errors = [speech.equal_error_rate(x[rows], speakers[rows]) for x in (before, after)]
        drops[i] = errors[1] - errors[0]
    error, baseline = speech.equal_error_rate(after, speakers), speech.equal_error_rate(before, speakers)
    return Quality(1 - error, error - baseline, _two_sided(drops), _cosine(original, candidate), len(speakers))


def _two_sided(drops: np.ndarray) -> float:
    # One is added so that no finite number of resamples claims a probability of zero.
    tail = (1 + min((drops <= 0).sum(), (drops >= 0).sum())) / (1 + RESAMPLES)
    return float(min(1.0, 2 * tail))


def _cosine(original: np.ndarray, candidate: np.ndarray) -> float:
    return float((unit(original) * unit(candidate)).sum(1).mean())


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
