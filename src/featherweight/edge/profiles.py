"""Measure this machine's profile: operators by kind, size and precision, memory bandwidth, overheads, threads.

In a child process of its own, pinned where the system allows; see `measuring` for what is timed and `bench_graphs` for
the models. Power cannot be read here in general: it is left to the user.
"""

from __future__ import annotations

import dataclasses
import datetime
import platform
import shutil
import sys
import time
from pathlib import Path

from featherweight.core import Profile, Progress, Silent
from featherweight.device import Kernel, Source
from featherweight.edge import measuring
from featherweight.errors import DataError
from featherweight.runtime.sandbox import Worker
from featherweight.runtime.targets import quiet_cpus, this_machine, to_json
from featherweight.whole import write_text

DEFAULT_SECONDS = 60.0
MIN_ROUNDS, MAX_ROUNDS = 5, 40
# Weights of one timed chain, at most; all chains together stay below this share of the machine's memory.
CHAIN_BYTES = 16 << 20
_BANDWIDTH_MB = 128
# Kinds whose best measured operator is the rate of large products.
_RATE_KINDS = ("matmul", "conv1x1", "conv")
_RATE_NAMES = {"float32": "float32", "int8": "int8", "int4": "int4"}


def measure_profile(
    *,
    threads: int = 1,
    seconds: float = DEFAULT_SECONDS,
    name: str | None = None,
    idle_w: float | None = None,
    busy_w: float | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure this machine; `seconds` bound the timed rounds (loading comes on top, 10 to 30 s).

    Raises:
        DataError: an argument that makes no sense.
        ChildCrashed: the measuring process died.
    """
    here = this_machine()
    if not 1 <= threads <= here.threads:
        raise DataError(f"threads must be 1 to {here.threads}, what this process may use, but got {threads}")
    if not seconds > 0:
        raise DataError(f"the time must be > 0 s, but got {seconds}")
    shown = progress or Silent()
    small = here.memory_bytes < 2 << 30
    with Worker(cpus=quiet_cpus(threads)) as worker:
        shown.start("loading small models")
        runtime_bytes = worker.call(measuring.runtime_bytes)
        worker.call(measuring.open_cases, threads, True, CHAIN_BYTES // (4 if small else 1))
        _rounds(worker, seconds, shown)
        call, node, rows = worker.call(measuring.results)
    with Worker(cpus=quiet_cpus(threads)) as worker:
        shown.start("memory bandwidth")
        bandwidth = worker.call(measuring.bandwidth, _BANDWIDTH_MB // (4 if small else 1), threads)
    shown.start("threads")
    with Worker() as worker:
        scaling = worker.call(measuring.scaling, _counts(here.threads)) if here.threads > 1 else []
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    kernels = tuple(Kernel(kind, precision, tuple(dims), round(us, 4)) for kind, precision, dims, us, _ in rows)
    return dataclasses.replace(
        here,
        name=name or here.name,
        threads=threads,
        cpu=cpu_name(),
        cores=here.threads,
        storage_bytes=shutil.disk_usage(Path.home()).free or None,
        rates=_rates(rows),
        memory_gb_per_s=round(bandwidth, 3),
        call_us=round(call, 3),
        node_us=round(node, 4),
        runtime_bytes=runtime_bytes,
        idle_w=idle_w,
        busy_w=busy_w,
        date=today,
        thread_scaling=tuple((n, round(speed, 3)) for n, speed in scaling),
        kernels=kernels,
        sources=(Source("all figures", "measured by featherweight profile", today),),
    )


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile file, whole or not at all. Raises OutputError."""
    write_text(to_json(profile), path, make_folder=False)


def _rounds(worker: Worker, seconds: float, shown: Progress) -> None:
    """As many rounds as the time allows, between the least that says something and the most that still learns."""
    shown.start("timing operators", MAX_ROUNDS)
    end = time.monotonic() + seconds
    for i in range(MAX_ROUNDS):
        took = worker.call(measuring.round_of_cases, i)
        shown.advance()
        if i + 1 >= MIN_ROUNDS and time.monotonic() + took > end:
            return


def _counts(threads: int) -> tuple[int, ...]:
    """1, 2, 4, ... and all."""
    counts = [1]
    while counts[-1] * 2 <= threads:
        counts.append(counts[-1] * 2)
    return tuple(counts if counts[-1] == threads else [*counts, threads])


def _rates(rows: list[tuple[str, str, tuple[int, ...], float, int]]) -> dict[str, float]:
    """GMAC/s of the best large product of each precision."""
    rates: dict[str, float] = {}
    for kind, precision, _, us, macs in rows:
        known = _RATE_NAMES.get(precision)
        if known and kind in _RATE_KINDS and us > 1.0:
            rates[known] = max(rates.get(known, 0.0), round(macs / us / 1e3, 3))
    return {name: rate for name, rate in rates.items() if rate > 0}


def cpu_name() -> str:
    """What the processor calls itself; "" where the system does not tell."""
    if sys.platform == "linux":
        try:
            text = Path("/proc/cpuinfo").read_text(errors="replace")
        except OSError:
            return ""
        fields = dict(line.partition(":")[::2] for line in text.splitlines() if ":" in line)
        names = {key.strip(): value.strip() for key, value in fields.items()}
        return names.get("model name") or names.get("Model") or ""
    return platform.processor()
