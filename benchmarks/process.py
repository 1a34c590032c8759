"""Run a command and measure what it cost: wall time and the peak memory of its whole process tree."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_POLL_S = 0.02


@dataclass(frozen=True)
class Cost:
    """`peak_bytes` is the largest sum of resident set sizes seen over the tree, polled 50 times a second."""

    wall_s: float
    peak_bytes: int
    error: str = ""


def run(command: Sequence[str], *, cwd: Path, log: Path, limit_s: float) -> Cost:
    """Run to the end, its output in `log`; a failure or the time limit is told in `Cost.error`."""
    started = time.perf_counter()
    peak = 0
    with log.open("wb") as out:
        child = subprocess.Popen(command, cwd=cwd, stdout=out, stderr=subprocess.STDOUT)
        tree = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, _resident_bytes(tree))
            if time.perf_counter() - started > limit_s:
                _kill(tree)
                return Cost(time.perf_counter() - started, peak, f"stopped after {limit_s:.0f} s")
            time.sleep(_POLL_S)
    wall = time.perf_counter() - started
    if child.returncode == 0:
        return Cost(wall, peak)
    lines = log.read_text(errors="replace").strip().splitlines()
    return Cost(wall, peak, f"exit {child.returncode}: {lines[-1][:200] if lines else 'no output'}")


def _resident_bytes(tree: psutil.Process) -> int:
    total = 0
    try:
        members = [tree, *tree.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in members:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _kill(tree: psutil.Process) -> None:
    for member in [*tree.children(recursive=True), tree]:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    tree.wait(10)
