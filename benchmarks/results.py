"""Rows of the comparison: kept as JSON with machine and versions, shown as tables."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.floors import Floors
from benchmarks.tasks import MORE_TASKS, TASKS, Task

FOLDER = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "RESULTS.md"
_SHOWN_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
_PACKAGES = ("onnxruntime", "onnx", "numpy", "featherweight")


@dataclass(frozen=True)
class Row:
    """One file. `wall_s`, `peak_bytes`: what making it cost. `macs`: of one call. `error`: why a number is absent."""

    tool: str
    size_bytes: int | None = None
    metric: float | None = None
    drop: float | None = None
    p: float | None = None
    closeness: float | None = None
    ms: float | None = None
    speed: float | None = None
    speed_low: float | None = None
    speed_high: float | None = None
    wall_s: float | None = None
    peak_bytes: int | None = None
    n: int | None = None
    error: str = ""
    macs: int | None = None


def machine() -> dict[str, Any]:
    """What of this machine the numbers depend on."""
    from featherweight.runtime.targets import cpu_flags

    flags = [f for f in cpu_flags() if f in _SHOWN_FLAGS]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "flags": flags,
        "vnni": any("vnni" in f for f in flags),
        "versions": {p: version(p) for p in _PACKAGES} | {"python": platform.python_version()},
    }


def load(task: Task, *, kind: str = "") -> dict[str, Row]:
    """Rows of the last run by tool; empty if there was none. `kind`: a prefix of the file's name, as in KINDS."""
    path = FOLDER / f"{kind}{task.name}.json"
    if not path.exists():
        return {}
    return {raw["tool"]: Row(**raw) for raw in json.loads(path.read_text())["rows"]}


def save(task: Task, rows: list[Row], floors: Floors | None = None, *, kind: str = "") -> Path:
    """Write a run with its date and machine."""
    raw = {
        "task": task.name,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "floors": None if floors is None else dataclasses.asdict(floors),
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{kind}{task.name}.json"
    path.write_text(json.dumps(raw, indent=1) + "\n")
    return path


def read(path: Path) -> dict[str, Any]:
    """A saved run."""
    raw: dict[str, Any] = json.loads(path.read_text())
    return raw


def table(task: Task, raw: dict[str, Any]) -> str:
    """A saved run as Markdown: its rows, then its floors. A column of MACs if they were counted."""
    rows = [Row(**row) for row in raw["rows"]]
    whole = next((row.macs for row in rows if row.tool == "float"), None)
    counted = "MACs | " if whole else ""
    head = f"| {task.title} | MB | {counted}{task.metric} | drop (p) | {task.closeness} to float | speed | made in s |"
    lines = [f"{head} peak MB |", f"|{' --- |' * (9 if whole else 8)}", *(_line(row, whole) for row in rows)]
    return "\n".join(lines) + "\n" + (f"\n{_floors_text(raw)}" if raw["floors"] else "")


def _line(row: Row, whole: int | None) -> str:
    blank = " |" if whole else ""
    if row.size_bytes is None:
        return f"| {row.tool} | {row.error} |{blank} | | | | {_seconds(row)} | {_peak(row)} |"
    shown = [
        row.tool,
        f"{row.size_bytes / 1e6:.2f}",
        *(["-" if row.macs is None else f"{row.macs / whole:.0%}"] if whole else []),
        "-" if row.metric is None else f"{row.metric:.4f}",
        "-" if row.drop is None or row.tool == "float" else f"{row.drop:+.4f} ({row.p:.2g})",
        "-" if row.closeness is None else f"{row.closeness:.4f}",
        "-" if row.speed is None else f"{row.speed:.2f}x ({row.speed_low:.2f} to {row.speed_high:.2f})",
        _seconds(row),
        _peak(row),
    ]
    return f"| {' | '.join(shown)} |" + (f" {row.error}" if row.error else "")


def _seconds(row: Row) -> str:
    return "-" if row.wall_s is None else f"{row.wall_s:.1f}"


def _peak(row: Row) -> str:
    return "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"


def _floors_text(raw: dict[str, Any]) -> str:
    f = Floors(**{**raw["floors"], "bytes_at": {int(k): v for k, v in raw["floors"]["bytes_at"].items()}})
    widths = ", ".join(f"{bits} bit {n / 1e6:.2f}" for bits, n in f.bytes_at.items())
    return (
        f"Floors: weights alone in MB at {widths}. One call is {f.macs / 1e6:.0f} million MACs: {f.float_ms:.2f} ms at "
        f"the measured float peak ({f.float_rate / 1e9:.0f} GMAC/s), {f.int8_ms:.2f} ms at the int8 peak "
        f"({f.int8_rate / 1e9:.0f} GMAC/s).\n"
    )


# Benchmarks whose printed table is kept as it is, by the name of their module.
PRINTED = {
    "statistics": "Memory of the calibration pass against the number of batches",
    "encodings": "What each way to store weights costs to load and run",
    "effects": "How long it takes to estimate every decision",
}


# Saved runs by the prefix of their files, and the heading of their part of the page.
KINDS = {
    "": "",
    "structure-": "Fewer MACs without training",
    "joint-": "Each technique alone and all together, at a drop of one point",
}


def write_page() -> None:
    """RESULTS.md, all of it, from the saved runs."""
    PAGE.write_text(page((*TASKS, *MORE_TASKS)))


def page(tasks: tuple[Task, ...]) -> str:
    """RESULTS.md from the saved runs."""
    parts = [
        "# Results\n\n"
        "Made by `make bench`; benchmarks/README.md says how each number is measured. p: two-sided, paired with the "
        "float original on the same samples.\nSpeed: float's time over this file's, one thread, interleaved, with "
        "quartiles. Made in s, peak MB: wall time and resident memory of the whole process tree.\n"
    ]
    for kind, heading in KINDS.items():
        found = [task for task in tasks if (FOLDER / f"{kind}{task.name}.json").exists()]
        if heading and found:
            parts.append(f"## {heading}\n")
        parts += [_section(task, kind, "###" if heading else "##") for task in found]
    for name, title in PRINTED.items():
        path = FOLDER / f"{name}.txt"
        if path.exists():
            parts.append(f"## {title}\n\n```text\n{path.read_text().strip()}\n```\n")
    return "\n".join(parts)


def _section(task: Task, kind: str, level: str) -> str:
    raw = json.loads((FOLDER / f"{kind}{task.name}.json").read_text())
    m = raw["machine"]
    where = (
        f"{raw['date']}, {m['system']}, {m['cores']} cores ({', '.join(m['flags'])}; "
        f"VNNI: {'yes' if m['vnni'] else 'no'}), ONNX Runtime {m['versions']['onnxruntime']}"
    )
    return f"{level} {task.title}\n\n{where}.\n\n{table(task, raw)}"
