"""Quantize three real networks with featherweight and other tools, on the same files and data, side by side.

`python -m benchmarks.quantize --data FOLDER [--tasks lite0,...] [--write] [--json]`. Other tools' files are made once
and kept in benchmarks/.work; `--redo` makes them again. All files are evaluated and timed in one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

from benchmarks import evaluate, feeds, latency, models, ocr, process, results, speech, tasks
from benchmarks.floors import floors
from benchmarks.results import Row
from benchmarks.tasks import TASKS, Task

HERE = Path(__file__).parent
WORK = HERE / ".work"
PEER_LIMIT_S = 1800.0
OURS_LIMIT_S = 3600.0
WRITERS = {**models.WRITERS, "ppocr": ocr.write_ppocr, "resemblyzer": speech.write_resemblyzer}


def original(task: Task) -> Path:
    """The float file, written if it is not there."""
    path = WORK / "models" / f"{task.name}.onnx"
    return path if path.exists() else WRITERS[task.name](path)


def make_peer(task: Task, tool: str, kept: dict[str, Row], *, redo: bool) -> tuple[Row, Path]:
    """Another tool's file, and what it cost; an earlier one is kept with its cost unless `redo`."""
    out = WORK / "out" / f"{task.name}-{tool}.onnx"
    if out.exists() and tool in kept and kept[tool].wall_s is not None and not redo:
        return Row(tool, wall_s=kept[tool].wall_s, peak_bytes=kept[tool].peak_bytes), out
    out.parent.mkdir(parents=True, exist_ok=True)
    python = WORK / "nncf" / "bin" / "python" if tool.startswith("nncf") else Path(sys.executable)
    if not python.exists():
        return Row(tool, error="not installed (make bench)"), out
    out.unlink(missing_ok=True)
    command = [python, "-m", "benchmarks.peer", tool, task.name, original(task), WORK / "data" / task.calibration, out]
    return made_by(tool, list(map(str, command)), out, PEER_LIMIT_S), out


def run_folder(task: Task, name: str) -> Path:
    """Where a run of featherweight for the row `name` leaves its files."""
    return WORK / "runs" / f"{task.name}-{name.replace(' ', '-')}"


def make_ours(task: Task, name: str, asked: tuple[str, ...]) -> tuple[Row, Path]:
    """featherweight's file through its command line; nothing of an earlier run is kept."""
    folder = run_folder(task, name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    reading = [str(WORK / "models" / r) if r.endswith("tokenizer.json") else r for r in task.reading]
    command = [sys.executable, "-m", "featherweight.cli", "compress", str(original(task))]
    command += [
        "--data",
        str(WORK / "data" / task.table),
        *reading,
        *asked,
        "--save-anyway",
        "--quiet",
        "-o",
        str(folder),
    ]
    out = folder / "model.onnx"
    row = made_by(name, command, out, OURS_LIMIT_S)
    if row.error.startswith("exit 3"):  # the budget is not met: the verdict and its reason stand first
        said = [line.strip() for line in log_of(out).read_text().splitlines() if line.strip()]
        row = dataclasses.replace(row, error=": ".join(said[:2])[:200])
    return row, out


def log_of(out: Path) -> Path:
    """What the process that made `out` printed."""
    return WORK / "logs" / f"{out.parent.name}-{out.stem}.txt"


def made_by(tool: str, command: list[str], out: Path, limit_s: float) -> Row:
    log = log_of(out)
    log.parent.mkdir(parents=True, exist_ok=True)
    cost = process.run(command, cwd=HERE.parent, log=log, limit_s=limit_s)
    return Row(tool, wall_s=cost.wall_s, peak_bytes=cost.peak_bytes, error=cost.error)


def judge(task: Task, made: list[tuple[Row, Path]], *, turns: int) -> list[Row]:
    """Size, quality and speed of every file that exists; the first is the float original."""
    data = WORK / "data" / task.evaluation
    labels = feeds.labels(data)
    reference = evaluate.outputs(task, made[0][1], WORK)
    qualities, errors = {}, {}
    for row, path in made:
        if path.exists():
            try:
                qualities[row.tool] = evaluate.compare(task, labels, reference, evaluate.outputs(task, path, WORK))
            except Exception as e:
                errors[row.tool] = f"does not run: {e}"[:200]
    alive = {row.tool: path for row, path in made if row.tool in qualities}
    speeds = latency.measure(task.name, alive, data, original=made[0][0].tool, turns=turns)
    rows = []
    for row, path in made:
        q, s = qualities.get(row.tool), speeds.get(row.tool)
        rows.append(
            Row(
                row.tool,
                size_bytes=_bytes(path) if path.exists() else None,
                metric=q.metric if q else None,
                drop=q.drop if q else None,
                p=q.p if q else None,
                closeness=q.closeness if q else None,
                n=q.n if q else None,
                **(vars(s) if s else {}),
                wall_s=row.wall_s,
                peak_bytes=row.peak_bytes,
                error=row.error or errors.get(row.tool, ""),
            )
        )
    return rows


def _bytes(path: Path) -> int:
    """The file and its external data."""
    return sum(p.stat().st_size for p in (path, path.with_name(f"{path.name}.data")) if p.exists())


def run(task: Task, *, source: Path, redo: bool, turns: int, only: str | None) -> Path:
    """One task from preparation to its saved rows; returns the JSON file."""
    path = original(task)
    tasks.prepare(task, source, WORK)
    kept = results.load(task)
    made = [(Row("float"), path)]
    if only != "peers":
        made += [make_ours(task, name, asked) for name, asked in task.asked]
    if only != "ours":
        made += [make_peer(task, tool, kept, redo=redo) for tool in task.peers]
    rows = judge(task, made, turns=turns)
    fresh = {row.tool for row in rows}
    # Rows that were not asked for this time stay as they were measured.
    rows += [row for tool, row in kept.items() if tool not in fresh and only is not None]
    feed = next(feeds.read(WORK / "data" / task.evaluation, task.name))
    return results.save(task, rows, floors(path, feed))


def main() -> None:
    """Parse the command line, run the tasks, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with imagenet-samples/ and sts/")
    parser.add_argument("--tasks", default=",".join(t.name for t in TASKS), help="default: %(default)s")
    parser.add_argument("--only", choices=("ours", "peers"), help="measure these; keep the others' last numbers")
    parser.add_argument("--redo", action="store_true", help="make the other tools' files again")
    parser.add_argument("--turns", type=int, default=40, help="interleaved turns of timing (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    wanted = args.tasks.split(",")
    unknown = sorted(set(wanted) - {t.name for t in TASKS})
    if unknown:
        parser.error(f"there is no task {unknown[0]!r}; tasks: {', '.join(t.name for t in TASKS)}")
    documents = []
    for task in (t for t in TASKS if t.name in wanted):
        saved = run(task, source=args.data, redo=args.redo, turns=args.turns, only=args.only)
        documents.append(json.loads(saved.read_text()))
        if not args.json:
            print(results.table(task, documents[-1]))
    if args.json:
        print(json.dumps(documents, indent=1))
    if args.write:
        results.write_page()


if __name__ == "__main__":
    main()
