"""Time several files against each other: one pinned process each, one thread, interleaved turn by turn."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import feeds

CALLS = 4
FEEDS = 8
START_S = 120.0


@dataclass(frozen=True)
class Latency:
    """`ms`: median of the turns' fastest call. `speed`: median over turns of float's time over this file's."""

    ms: float
    speed: float
    speed_low: float
    speed_high: float


def measure(name: str, files: Mapping[str, Path], data: Path, *, original: str, turns: int) -> dict[str, Latency]:
    """Every turn, each file answers the same feed CALLS times (the first call unmeasured) while the others wait.

    A file whose process dies is left out. `speed_low`, `speed_high`: quartiles over the turns.
    """
    context = multiprocessing.get_context("spawn")
    cpu = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    children: dict[str, tuple[Any, Connection]] = {}
    for key, path in files.items():
        ours, theirs = context.Pipe()
        child = context.Process(target=_serve, args=(theirs, name, path, data, cpu), daemon=True)
        child.start()
        theirs.close()
        children[key] = (child, ours)
    try:
        live = {k: pipe for k, (_, pipe) in children.items() if _ask(pipe, None) is not None}
        times: dict[str, list[float]] = {k: [] for k in live}
        for turn in range(turns):
            for key, pipe in live.items():
                best = _ask(pipe, turn % FEEDS)
                if best is None:
                    raise RuntimeError(f"the process timing {key} died")
                times[key].append(best)
    finally:
        for child, pipe in children.values():
            with suppress(OSError):
                pipe.send("stop")
            child.join(5)
            child.kill()
    return {key: _summary(times[original], values) for key, values in times.items()}


def _summary(original: list[float], values: list[float]) -> Latency:
    low, mid, high = statistics.quantiles([f / v for f, v in zip(original, values, strict=True)], n=4)
    return Latency(statistics.median(values), mid, low, high)


def _ask(pipe: Connection, index: int | None) -> float | None:
    """One turn on feed `index`, or the sign of life after loading (None in, 0.0 out); None from a dead child."""
    try:
        if index is not None:
            pipe.send(index)
        return float(pipe.recv()) if pipe.poll(START_S) else None
    except (EOFError, OSError):
        return None


def _serve(pipe: Connection, name: str, path: Path, data: Path, cpu: int | None) -> None:
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    batches = list(feeds.read(data, name, limit=FEEDS))
    for feed in batches[:2]:
        session.run(None, feed)
    pipe.send(0.0)
    while (message := pipe.recv()) != "stop":
        feed = batches[message % len(batches)]
        session.run(None, feed)
        best = float("inf")
        for _ in range(CALLS - 1):
            started = time.perf_counter()
            session.run(None, feed)
            best = min(best, time.perf_counter() - started)
        pipe.send(best * 1e3)
