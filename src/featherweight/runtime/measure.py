"""Latency, memory and time per node, measured in child processes on saved files. Nothing here is an estimate.

Latency protocol: candidate and original are loaded in a child each and take turns, so that whatever else the machine
does hits both; a turn is one unmeasured call (it refills the caches the other side emptied) and one measured call or
a few; the ratio is the median over turns of candidate / original.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.core import Interval
from featherweight.errors import RunError
from featherweight.runtime.outputs import Array
from featherweight.runtime.profiling import NodeTimes, node_times
from featherweight.runtime.sandbox import Worker
from featherweight.runtime.targets import quiet_cpus

__all__ = [
    "LatencyResult",
    "MemoryResult",
    "NodeTimes",
    "PeakWatch",
    "latency",
    "median_interval",
    "memory",
    "node_times",
    "peak_memory",
    "trivial_model",
]

Feeds = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class LatencyResult:
    """Milliseconds per call (median and 95th percentile), and candidate / original (below 1: faster)."""

    original_ms: float
    candidate_ms: float
    original_p95_ms: float
    candidate_p95_ms: float
    original_min_ms: float
    candidate_min_ms: float
    ratio: float
    ratio_interval: Interval
    turns: int
    threads: int
    cpus: tuple[int, ...]

    @property
    def speedup(self) -> float:
        """Original / candidate: above 1 is faster."""
        return 1.0 / self.ratio

    @property
    def ratio_of_minimums(self) -> float:
        """Fastest candidate turn / fastest original turn: the steadier number on a machine that does other work."""
        return self.candidate_min_ms / self.original_min_ms


@dataclass(frozen=True, slots=True)
class MemoryResult:
    """Resident memory above the empty runtime, in bytes, and the load time (median of three) in ms.

    `peak_bytes` is the larger of the two peaks: what a device must have free. `run_peak_bytes` is while it runs,
    `load_peak_bytes` while it loads, `resident_bytes` what stays after loading.
    """

    peak_bytes: int
    run_peak_bytes: int
    load_peak_bytes: int
    resident_bytes: int
    load_ms: float


def latency(
    original: str | Path,
    candidate: str | Path,
    feeds: Feeds | Sequence[Feeds],
    *,
    threads: int = 1,
    time_limit_s: float = 20.0,
    precision: float = 0.02,
    min_turns: int = 15,
    max_turns: int = 2000,
    level: float = 0.95,
    timeout_s: float = 300.0,
) -> LatencyResult:
    """Compare two models on the same inputs.

    Args:
        original, candidate: model files.
        feeds: one input, or several that turns go through one after another.
        threads: of the runtime; that many cores are pinned, the same ones for both.
        time_limit_s: stop after this long even if the interval is wide (at least 3 turns are made).
        precision: stop when the ratio's interval is within this share of the ratio on both sides.
        min_turns, max_turns: make at least and at most so many, if time allows.
        level: of the interval.
        timeout_s: of one turn.

    Raises:
        RunError, ChildCrashed: a model fails.
    """
    inputs = [dict(feeds)] if isinstance(feeds, Mapping) else [dict(f) for f in feeds]
    if not inputs:
        raise RunError("latency needs at least one input to run, but got none")
    # Both children on the same core(s), never at the same time: only one runs, the other waits in the kernel. Cores of
    # one machine differ (neighbours, frequency), and that difference would be read as a speed ratio. A model against
    # itself, 60 turns on a busy 2-core machine, four times: the ratio's interval was 0.03 to 0.17 wide on the same
    # core, 0.35 to 0.44 on separate cores, 0.09 to 0.14 unpinned; medians 0.97 to 1.08, 0.92 to 1.06, 0.98 to 0.99.
    cpus = quiet_cpus(threads)
    with Worker(cpus=cpus) as a, Worker(cpus=cpus) as b:
        sides = (a, b)
        for worker, path in zip(sides, (original, candidate), strict=True):
            worker.call(_open, str(path), inputs, threads, timeout_s=timeout_s, doing=f"loading '{Path(path).name}'")
        # As many calls a turn as fill 2 ms, so that the clock and the switch between processes do not count.
        once = min(worker.call(_turn, 0, 1, timeout_s=timeout_s) for worker in sides)
        calls = max(1, min(100, math.ceil(2.0 / max(once, 1e-3))))
        times: list[tuple[float, float]] = []
        started = time.monotonic()
        while len(times) < max_turns:
            which = len(times) % len(inputs)
            order = (0, 1) if len(times) % 2 == 0 else (1, 0)  # who goes first alternates
            pair = [0.0, 0.0]
            for side in order:
                pair[side] = sides[side].call(
                    _turn, which, calls, timeout_s=timeout_s, doing=f"timing '{Path((original, candidate)[side]).name}'"
                )
            times.append((pair[0], pair[1]))
            spent = time.monotonic() - started
            if len(times) >= 3 and spent > time_limit_s:
                break
            if len(times) >= min_turns and len(times) % 5 == 0 and _narrow(times, precision, level):
                break
    return _result(times, threads, cpus, level)


def _narrow(times: list[tuple[float, float]], precision: float, level: float) -> bool:
    ratios = [c / o for o, c in times]
    low, high = median_interval(ratios, level)
    middle = statistics.median(ratios)
    return max(high - middle, middle - low) <= precision * middle


def _result(times: list[tuple[float, float]], threads: int, cpus: tuple[int, ...], level: float) -> LatencyResult:
    pairs = np.asarray(times, np.float64)
    ratios = (pairs[:, 1] / pairs[:, 0]).tolist()
    medians, p95, least = np.median(pairs, axis=0), np.quantile(pairs, 0.95, axis=0), pairs.min(axis=0)
    return LatencyResult(
        float(medians[0]),
        float(medians[1]),
        float(p95[0]),
        float(p95[1]),
        float(least[0]),
        float(least[1]),
        statistics.median(ratios),
        Interval(*median_interval(ratios, level), level),
        len(times),
        threads,
        cpus,
    )


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval of the median from order statistics (binomial); the whole range if there are few."""
    ordered = sorted(values)
    n = len(ordered)
    k = binomial_quantile((1 - level) / 2, n)
    return ordered[max(0, k - 1)], ordered[min(n - 1, n - k)]


def binomial_quantile(q: float, n: int) -> int:
    """The least k with P(X <= k) >= q for X of n fair tosses; exact, in whole numbers."""
    term, total, k = 1, 1, 0
    while total < q * 2**n if n < 1000 else total < int(q * 2**64) * 2 ** (n - 64):
        term = term * (n - k) // (k + 1)
        total, k = total + term, k + 1
    return k


_session: Any = None
_inputs: list[dict[str, Array]] = []
_slow = False  # over 200 ms a call, refilling a cache is noise


def _open(path: str, inputs: list[dict[str, Array]], threads: int) -> None:
    """In the child: load the model and run every input twice (arenas grow, pages are touched)."""
    global _session, _inputs, _slow
    import gc

    from featherweight.runtime import ort

    _session, _inputs = ort.session(path, threads=threads), inputs
    for _ in range(2):
        for feeds in inputs:
            start = time.perf_counter()
            _session.run(feeds)
            _slow = time.perf_counter() - start > 0.2
    gc.collect()
    gc.disable()


def _turn(which: int, calls: int) -> float:
    """In the child: one unmeasured call (unless calls are slow), then the median of `calls` measured ones, in ms."""
    feeds = _inputs[which]
    if not _slow:
        _session.run(feeds)
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        _session.run(feeds)
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e6


def memory(
    path: str | Path, feeds: Feeds, *, threads: int = 1, calls: int = 3, timeout_s: float | None = None
) -> MemoryResult:
    """Load and run one model in a fresh child and watch its resident memory. Raises RunError, ChildCrashed."""
    with Worker() as worker:
        name = Path(path).name
        return worker.call(
            _memory, str(path), dict(feeds), threads, calls, timeout_s=timeout_s, doing=f"measuring memory of '{name}'"
        )


def peak_memory(path: str | Path, feeds: Feeds, *, threads: int = 1, timeout_s: float | None = None) -> int:
    """`memory(...).peak_bytes`: the most a process holds for this model above the empty runtime, loading included."""
    return memory(path, feeds, threads=threads, timeout_s=timeout_s).peak_bytes


def _memory(path: str, feeds: dict[str, Array], threads: int, calls: int) -> MemoryResult:
    """In the child, which has done nothing yet: the empty runtime first, then the model."""
    from featherweight.runtime import ort

    trivial = ort.session(trivial_model(), threads=threads)
    trivial.run({"x": np.zeros(1, np.float32)})
    with PeakWatch() as empty:
        pass
    base = empty.now_bytes
    start = time.perf_counter_ns()
    with PeakWatch() as loading:
        session = ort.session(path, threads=threads)
    load_ms = [(time.perf_counter_ns() - start) / 1e6]
    with PeakWatch() as running:
        for _ in range(calls):
            session.run(feeds)
    del session
    for _ in range(2):
        start = time.perf_counter_ns()
        again = ort.session(path, threads=threads)
        load_ms.append((time.perf_counter_ns() - start) / 1e6)
        del again
    load, run = max(0, loading.peak_bytes - base), max(0, running.peak_bytes - base)
    resident = max(0, loading.now_bytes - base)
    return MemoryResult(max(load, run), run, load, resident, statistics.median(load_ms))


class PeakWatch:
    """The highest resident memory of this process while the block runs.

    Linux's own high-water mark, reset at the start; elsewhere (or where the reset is refused) a thread samples every
    millisecond, which may miss shorter peaks.
    """

    peak_bytes: int = 0
    now_bytes: int = 0

    def __enter__(self) -> PeakWatch:
        self._exact = False
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._exact = _status("VmHWM") is not None
        if not self._exact:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.now_bytes = _rss_bytes()
        if self._exact:
            self.peak_bytes = max(_status("VmHWM") or 0, self.now_bytes)
        else:
            self._stop.set()
            self._thread.join()
            self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self.peak_bytes = max(self.peak_bytes, _rss_bytes())


def _status(field: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def _rss_bytes() -> int:
    import psutil

    return _status("VmRSS") or int(psutil.Process().memory_info().rss)


def trivial_model() -> bytes:
    """The smallest model there is, y = -x of one float: stands for the empty runtime."""
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "trivial", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())
