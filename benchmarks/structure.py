"""Networks with 30 % and 50 % of their multiplications removed, without training: featherweight and other tools.

`python -m benchmarks.structure --data FOLDER [--tasks lite0,...] [--only "torch-pruning-30,..."] [--write]`. Rows that
were measured before are kept; `--again` times their files once more, `--fresh` makes them again. A row is timed against
the float original in the run that makes it, interleaved with the other rows of that run.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from benchmarks import feeds, floors, models, ocr, quantize, results, speech, tasks
from benchmarks.results import Row
from benchmarks.tasks import MORE_TASKS, TASKS, Task

KIND = "structure-"
PERCENT_GONE = (30, 50)
PEER_LIMIT_S = 900.0
PEER_PYTHON = quantize.WORK / "torch-pruning" / "bin" / "python"
FACTORS = "low_rank,conv_tucker,conv_cp,conv_spatial,conv_depthwise_separable"
_NORMED = ("lite0", "mobilenetv2")


@dataclass(frozen=True)
class Entry:
    """One row of a table. `ours`: options of `featherweight compress`; empty for another tool of that name."""

    name: str
    ours: tuple[str, ...] = ()


def entries(task: Task) -> list[Entry]:
    """The rows of a network: fewer pixels and channels, channels alone, all that takes layers apart, and the peers."""
    rows = []
    for gone in PERCENT_GONE:
        asked = ("--max-macs", f"{100 - gone}%", "--techniques")
        if task.kind == "images":
            rows.append(
                Entry(f"featherweight resolution + channels {gone}", (*asked, "input_resolution,channel_prune"))
            )
        rows += [
            Entry(f"featherweight channels {gone}", (*asked, "channel_prune")),
            Entry(f"featherweight {gone}", (*asked, f"channel_prune,{FACTORS}")),
            Entry(f"svd-{gone}"),
            Entry(f"torch-pruning-{gone}"),
        ]
        if task.name in _NORMED:
            rows += [Entry(f"torch-pruning-{gone}-bn"), Entry(f"torch-pruning-{gone}-bn-8")]
    return rows


def file_of(task: Task, entry: Entry) -> Path:
    """Where the file of a row lies once it is made."""
    if entry.ours:
        return quantize.run_folder(task, entry.name) / "model.onnx"
    return quantize.WORK / "out" / f"{task.name}-{entry.name}.onnx"


def make(task: Task, entry: Entry) -> tuple[Row, Path]:
    """The file of one row, made anew, and what it cost."""
    if entry.ours:
        return quantize.make_ours(task, entry.name, entry.ours)
    out = file_of(task, entry)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    svd = entry.name.startswith("svd")
    python = Path(sys.executable) if svd else PEER_PYTHON
    if not python.exists():
        return Row(entry.name, error="not installed (make bench)"), out
    module = "benchmarks.svd_peer" if svd else "benchmarks.pruning_peer"
    source = quantize.original(task) if svd else weights(task)
    command = [python, "-m", module, entry.name, task.name, source, quantize.WORK / "data" / task.calibration, out]
    return quantize.made_by(entry.name, list(map(str, command)), out, PEER_LIMIT_S), out


def weights(task: Task) -> Path:
    """The checkpoint a peer reads; the recogniser exists as ONNX only."""
    if task.name == "ppocr":
        return models.package_file(*ocr.MODEL)
    return models.package_file(*speech.WEIGHTS) if task.name == "resemblyzer" else models.weights(task.name)


def run(
    task: Task,
    wanted: Sequence[Entry],
    *,
    kind: str,
    source: Path,
    turns: int,
    only: Sequence[str] = (),
    fresh: bool = False,
    again: bool = False,
    count: bool = True,
) -> Path:
    """Make and judge the rows that are missing (`fresh`: all) of `only` or of all; returns the JSON file with all rows.

    `again`: rows whose file exists are not made, but judged and timed once more.
    """
    path = quantize.original(task)
    tasks.prepare(task, source, quantize.WORK)
    kept = results.load(task, kind=kind)
    made = [(Row("float"), path)]
    for entry in (e for e in wanted if not only or e.name in only):
        row, file = kept.get(entry.name), file_of(task, entry)
        if row is None or fresh or _missing(entry, row):
            made.append(make(task, entry))
        elif again and file.exists():
            made.append((Row(row.tool, wall_s=row.wall_s, peak_bytes=row.peak_bytes, error=row.error), file))
    if len(made) > 1 or not kept:
        feed = next(feeds.read(quantize.WORK / "data" / task.evaluation, task.name))
        for (_, file), row in zip(made, quantize.judge(task, made, turns=turns), strict=True):
            alive = count and row.metric is not None
            kept[row.tool] = dataclasses.replace(row, macs=floors.macs(onnx.load(file), feed) if alive else None)
    order = ["float", *(e.name for e in wanted)]
    return results.save(task, [kept[name] for name in order if name in kept], kind=kind)


def _missing(entry: Entry, row: Row) -> bool:
    """A row without a metric, except where another tool failed by itself: it would fail again."""
    return row.metric is None and (bool(entry.ours) or "not installed" in row.error)


def parse(text: str, known: tuple[Task, ...]) -> tuple[argparse.Namespace, list[Task]]:
    """The command line of this benchmark and of `joint`, and the tasks it asks for."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled data (see benchmarks/README.md)")
    parser.add_argument("--tasks", default=",".join(t.name for t in known), help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="ROWS", help="names of rows, separated by commas; default: all")
    parser.add_argument("--fresh", action="store_true", help="make rows again that were measured before")
    parser.add_argument("--again", action="store_true", help="time and judge once more the files that were made before")
    parser.add_argument("--turns", type=int, default=40, help="interleaved turns of timing (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    args = parser.parse_args()
    unknown = sorted(set(args.tasks.split(",")) - {t.name for t in known})
    if unknown:
        parser.error(f"there is no task {unknown[0]!r}; tasks: {', '.join(t.name for t in known)}")
    args.only = [name for name in args.only.split(",") if name]
    return args, [t for t in known if t.name in args.tasks.split(",")]


def work_through(text: str, kind: str, known: tuple[Task, ...], rows_of: Callable[[Task], list[Entry]]) -> None:
    """Parse the command line, run the tasks, print the tables. Raises SystemExit on a row that no task has."""
    args, chosen = parse(text, known)
    names = {entry.name for task in chosen for entry in rows_of(task)}
    unknown = sorted(set(args.only) - names)
    if unknown:
        raise SystemExit(f"there is no row {unknown[0]!r}; rows: {', '.join(sorted(names))}")
    for task in chosen:
        saved = run(
            task,
            rows_of(task),
            kind=kind,
            source=args.data,
            turns=args.turns,
            only=args.only,
            fresh=args.fresh,
            again=args.again,
            count=kind == KIND,
        )
        print(results.table(task, results.read(saved)))
        if args.write:
            results.write_page()


if __name__ == "__main__":
    work_through(__doc__, KIND, (*TASKS, *MORE_TASKS), entries)
