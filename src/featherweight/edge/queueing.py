"""How long a request waits for a free worker, and how many workers are needed.

Requests arrive at random (Poisson) and each takes the same time: M/D/c. Its waiting is taken as half of M/M/c's
(exact for one worker: Pollaczek 1930, Khinchine 1932; a known approximation for more: Cosmetatos 1975, error below
about 2 % of the waiting near full load), M/M/c's from Erlang's C formula (Erlang 1917).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Queue:
    """Load and waiting. `utilisation` is the share of time a worker is busy; at 1 or more the waiting has no end."""

    workers: int
    utilisation: float
    mean_ms: float
    p95_ms: float


def erlang_c(workers: int, load: float) -> float:
    """Probability that a request must wait; `load` = arrivals * service time, in workers. 1 where load >= workers."""
    if load >= workers:
        return 1.0
    if load <= 0:
        return 0.0
    blocked = 1.0  # Erlang B by recursion, which does not overflow
    for n in range(1, workers + 1):
        blocked = load * blocked / (n + load * blocked)
    share = load / workers
    return blocked / (1.0 - share * (1.0 - blocked))


def waiting(workers: int, per_second: float, service_ms: float) -> Queue:
    """Waiting before service of `per_second` requests of `service_ms` each on `workers` workers."""
    load = per_second * service_ms / 1e3
    if load <= 0:
        return Queue(workers, 0.0, 0.0, 0.0)
    if load >= workers:
        return Queue(workers, load / workers, math.inf, math.inf)
    waits = erlang_c(workers, load)
    drain_per_ms = (workers - load) / service_ms
    p95 = math.log(waits / 0.05) / drain_per_ms if waits > 0.05 else 0.0
    return Queue(workers, load / workers, 0.5 * waits / drain_per_ms, 0.5 * p95)


def servers_needed(per_second: float, service_ms: float, workers: int, most: float) -> int:
    """The fewest servers of `workers` workers each whose utilisation stays at or below `most`; at least 1."""
    load = per_second * service_ms / 1e3
    return max(1, math.ceil(load / (workers * most) - 1e-9))
