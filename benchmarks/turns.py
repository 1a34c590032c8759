"""Networks that take turns in one process, which imports this: the least processor and wall time of each."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from featherweight.runtime import ort

_sessions: list[tuple[Any, dict[str, np.ndarray], list[float]]] = []


def open_network(path: str, feeds: dict[str, np.ndarray]) -> None:
    """In the child: load one network."""
    _sessions.append((ort.session(path), feeds, [math.inf, math.inf]))


def take_turns(rounds: int) -> list[list[float]]:
    """In the child: least processor and wall time of each network, in ms, after `rounds` more turns."""
    for _ in range(rounds):
        for session, feeds, best in _sessions:
            session.run(feeds)
            cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
            session.run(feeds)
            best[0] = min(best[0], (time.thread_time_ns() - cpu) / 1e6)
            best[1] = min(best[1], (time.perf_counter_ns() - wall) / 1e6)
    return [best for _, _, best in _sessions]
