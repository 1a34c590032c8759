"""Time the chains of `bench_graphs` in a child process: all in turns, many rounds, the least of each.

Whatever else a machine does only ever adds time, so the least of many interleaved calls is what the operator takes.
"""

from __future__ import annotations

import gc
import math
import time
from typing import Any

import numpy as np

from featherweight.edge.bench_graphs import chains
from featherweight.edge.bench_writing import Chain, Graph

TURN_MS = 0.6
LINKS = (1, 40)


class _Timed:
    """One session of the child and its least time."""

    def __init__(self, session: Any, feeds: dict[str, Any], output: str, threads: int) -> None:
        self.session, self.feeds, self.output, self.best = session, feeds, output, math.inf
        # On one thread everything runs in the caller: its processor time does not count what the system does between.
        fine = time.get_clock_info("thread_time").resolution <= 1e-6
        self.clock = time.thread_time_ns if threads == 1 and fine else time.perf_counter_ns

    def run(self) -> None:
        start = self.clock()
        self.session.run(self.feeds, [self.output])
        self.best = min(self.best, (self.clock() - start) / 1e3)


_cases: list[tuple[Chain, int, _Timed, _Timed]] = []
_plain: dict[str, _Timed] = {}


def open_cases(threads: int, integer: bool, limit_bytes: int) -> int:
    """In the child: load every chain in two lengths. Kinds this runtime has no kernels for are left out."""
    from featherweight.errors import RunError

    _cases.clear()
    for chain in chains(integer=integer):
        try:
            _cases.append(_open(chain, threads, limit_bytes))
        except RunError:
            continue
    _plain["call"] = _timed(_relus(1), threads, optimize=False)
    _plain["nodes"] = _timed(_relus(101), threads, optimize=False)
    gc.collect()
    gc.disable()
    return len(_cases)


def _open(chain: Chain, threads: int, limit_bytes: int) -> tuple[Chain, int, _Timed, _Timed]:
    short = _timed(chain.build(1), threads, chain.feeds, optimize=chain.optimize)
    short.run()
    short.run()
    weight = len(chain.build(1))
    more = (
        1
        if chain.once
        else max(1, min(math.ceil(TURN_MS * 1e3 / max(short.best, 5.0)), LINKS[1], limit_bytes // max(weight, 1)))
    )
    long = _timed(chain.build(1 + more), threads, chain.feeds, optimize=chain.optimize)
    short.best = math.inf
    return chain, more, short, long


def _timed(model: bytes, threads: int, feeds: dict[str, Any] | None = None, *, optimize: bool = True) -> _Timed:
    from featherweight.runtime import ort

    session = ort.session(model, threads=threads, optimize=optimize)
    return _Timed(session, feeds or {"x": np.ones(4, np.float32)}, session.outputs[0].name, threads)


def _relus(n: int) -> bytes:
    g = Graph()
    x = g.input("x", (4,))
    for _ in range(n):
        x = g.node("Relu", x)
    return g.finish(x)


def round_of_cases(seed: int) -> float:
    """In the child: every session once, in an order of this round's own; returns the seconds it took.

    No warm call: as in a real network, the weights were last read one call of everything ago.
    """
    started = time.perf_counter()
    order = np.random.default_rng(seed).permutation(2 * len(_cases))
    for i in order:
        timed = _cases[i // 2][2 + i % 2]
        timed.run()
    for timed in _plain.values():
        for _ in range(3):
            timed.run()
    return time.perf_counter() - started


def results() -> tuple[float, float, list[tuple[str, str, tuple[int, ...], float, int]]]:
    """In the child: microseconds of a call, of a node, and of each chain's operator with its multiply-accumulates."""
    node = max((_plain["nodes"].best - _plain["call"].best) / 100, 0.05)
    call = max(_plain["call"].best - node, 0.0)
    rows = []
    for chain, more, short, long in _cases:
        each = (long.best - short.best) / (more * chain.per_link)
        if each <= 0 and chain.macs:
            continue  # noise was larger than the work
        us = each - node * (chain.per_link + chain.extra) / chain.per_link
        rows.append((chain.kind, chain.precision, chain.dims, max(us, 0.01), chain.macs))
    return call, node, rows


def bandwidth(megabytes: int, threads: int) -> float:
    """In the child: 10^9 bytes/s read from main memory by a product of one row with `megabytes` of weights."""
    g = Graph()
    rows = 2048
    columns = megabytes * (1 << 20) // (4 * rows)
    x = g.input("x", (1, rows))
    timed = _timed(g.finish(g.node("MatMul", x, g.weight((rows, columns), 0.01))), threads,
                   {"x": np.ones((1, rows), np.float32)})  # fmt: skip
    for _ in range(8):
        timed.run()
    return 4 * rows * columns / (timed.best * 1e3)


def scaling(counts: tuple[int, ...]) -> list[tuple[int, float]]:
    """In the child: how much faster a large product runs on so many threads."""
    side = 768
    sessions = []
    for n in counts:
        g = Graph()
        x = g.input("x", (side, side))
        out = g.node("MatMul", g.node("MatMul", x, g.weight((side, side))), g.weight((side, side)))
        feeds = {"x": np.ones((side, side), np.float32)}
        sessions.append(_timed(g.finish(out), n, feeds))
    for _ in range(12):
        for timed in sessions:
            timed.run()
    return [(n, sessions[0].best / timed.best) for n, timed in zip(counts, sessions, strict=True)]


def runtime_bytes() -> int:
    """In the child, first of all: resident memory of a process with the runtime and a trivial model."""
    import psutil

    from featherweight.runtime import ort
    from featherweight.runtime.measure import trivial_model

    ort.session(trivial_model()).run({"x": np.zeros(1, np.float32)})
    return int(psutil.Process().memory_info().rss)
