"""What distillation brings back: pruned and coarsely rounded networks taught by their originals for 20 minutes.

`python -m benchmarks.distill --data FOLDER [--rows "lite0 pruned 50,..."] [--time 20m] [--again]`. One row at a time;
rows measured before are kept, and a row that was cut off goes on where it was. Training sees the calibration photos
alone, no labels; the evaluation photos are looked at by the measurements before and after only. `--list` names rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import quantize, results, tasks
from benchmarks.tasks import TASKS, Task

RESULT = results.FOLDER / "distill.json"
PAGE = results.FOLDER / "distill.md"
STATISTICS_IMAGES = 128


@dataclass(frozen=True)
class Row:
    """One student. `technique` and `params`: the one decision for every weight; empty for a pruned network."""

    task: str
    name: str
    gone: int = 0
    technique: str = ""
    params: tuple[tuple[str, int], ...] = ()

    @property
    def key(self) -> str:
        """What `--rows` names."""
        return f"{self.task} {self.name}"


def rows() -> list[Row]:
    """All rows, networks in turn."""
    found = []
    for task in ("lite0", "mobilenetv2"):
        found += [Row(task, f"pruned {gone}", gone=gone) for gone in (30, 50)]
        found += [
            Row(task, "4 bits", technique="weight_nbit", params=(("bits", 4),)),
            Row(task, "3 bits", technique="weight_nbit", params=(("bits", 3),)),
            Row(task, "3-bit palette", technique="palette", params=(("bits", 3),)),
            Row(task, "4 bits int8", technique="static_int8", params=(("weight_bits", 4),)),
        ]
    return found


def task_of(row: Row) -> Task:
    """The network and its data."""
    return next(t for t in TASKS if t.name == row.task)


def student(row: Row, source: Path) -> Path:
    """The student's file, made from the calibration photos if it is not there."""
    path = quantize.WORK / "students" / row.key.replace(" ", "-") / "model.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        pruned(row, source, path.parent) if row.gone else rounded(row, source, path)
    return path


def pruned(row: Row, source: Path, folder: Path) -> None:
    """Channels removed and what is left solved for, by the command line."""
    task = task_of(row)
    command = [sys.executable, "-m", "featherweight.cli", "compress", str(quantize.original(task))]
    command += ["--data", str(source / "imagenet-samples"), *task.reading, "--techniques", "channel_prune"]
    command += ["--max-macs", f"{100 - row.gone}%", "--save-anyway", "--quiet", "-o", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def rounded(row: Row, source: Path, path: Path) -> None:
    """Every weight of the network rounded alike, with error compensation."""
    from featherweight import data as fwdata
    from featherweight.core import Action, Decision, Plan
    from featherweight.graph import io
    from featherweight.graph.normalise import normalise
    from featherweight.runtime import targets
    from featherweight.search.candidates import build_numeric
    from featherweight.search.problem import input_specs
    from featherweight.stats import collect
    from featherweight.stats.shrinkage import shrunk
    from featherweight.techniques import Context, all_techniques
    from featherweight.techniques._equalise import equalise

    task = task_of(row)
    model = normalise(io.load(quantize.original(task)), run=None).model
    opened = fwdata.open_data(source / "imagenet-samples", input_specs(model), preprocess=task.reading[1])
    photos = fwdata.split(opened).calibration
    every = max(1, photos.n_batches // STATISTICS_IMAGES)
    stats = collect(model, photos.subset(range(0, photos.n_batches, every)), max_positions=64)
    equal, ready = equalise(model, shrunk(stats))
    known = all_techniques()
    ctx = Context(targets.this_machine(), ready, 0, frozenset(), thorough=True)
    action = Action.of(row.technique, **dict(row.params))
    sites = [s.name for s in known[row.technique].sites(equal)]
    plan = Plan(tuple(Decision(name, (action,)) for name in sites))
    io.save(build_numeric(equal, plan, ctx, known), path)


def run(row: Row, source: Path, time: str, stages: str) -> dict[str, Any]:
    """Teach one student through the command line; what its report says."""
    task = task_of(row)
    tasks.prepare(task, source, quantize.WORK)
    out = quantize.WORK / "runs" / f"distill-{row.key.replace(' ', '-')}"
    resume = (out / "work" / "checkpoints").exists()
    if not resume:
        shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "featherweight.cli", "distill", str(quantize.original(task))]
    command += ["--student", str(student(row, source)), "--data", str(source / "imagenet-samples"), *task.reading]
    command += ["--time-budget", time, *(["--stages", stages] if stages else []), "--json", "-o", str(out)]
    command += ["--resume"] if resume else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip()[-300:]}
    raw: dict[str, Any] = json.loads(done.stdout)
    layers = next((s for s in raw["stages"] if s["name"] == "layers"), None)
    return {
        "size_bytes": raw["after"]["size_bytes"], "teacher": raw["teacher"]["metric"],
        "before": raw["before"]["metric"], "layers": layers and layers["measured"]["metric"],
        "after": raw["after"]["metric"],
        "rate": raw["facts"]["rate"], "recovered": raw["recovered"], "gain_interval": raw["gain_interval"],
        "steps": {s["name"]: s["steps"] for s in raw["stages"]},
        "validation": {s["name"]: [s["loss_before"], s["loss_after"]] for s in raw["stages"]},
        "wall_s": raw["seconds"], "peak_bytes": raw["peak_bytes"], "n": raw["after"]["n_samples"], "error": "",
    }  # fmt: skip


def load() -> dict[str, Any]:
    """Rows of earlier runs by key."""
    return dict(json.loads(RESULT.read_text())["rows"]) if RESULT.exists() else {}


def save(found: dict[str, Any]) -> None:
    """Write the rows with this machine, and the table."""
    order = [r.key for r in rows() if r.key in found]
    document = {"machine": results.machine(), "rows": {k: found[k] for k in order}}
    results.FOLDER.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    PAGE.write_text(table({k: found[k] for k in order}))


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "# Distillation", "",
        "Top-1 on 500 photos that were never trained on; 500 other photos, without labels, taught and guarded.",
        "`came back`: share of the accuracy lost against the original; "
        "`rate`: the highest learning rate, as it was at the end (docs/learn.md).",
        "Machine and versions: distill.json.", "",
        "| student | MB | original | before | after blocks | after | came back | rate | time | peak |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip

    def cell(value: Any, form: Callable[[Any], str]) -> str:
        return "-" if value is None else form(value)

    for key, r in found.items():
        if r["error"]:
            lines.append(f"| {key} | {r['error'].splitlines()[-1][:80]} |")
            continue
        top = [cell(r[k], "{:.3f}".format) for k in ("teacher", "before", "layers", "after")]
        back = cell(r["recovered"], "{:.0%}".format)
        cost = f"{r['wall_s'] / 60:.1f} min | {r['peak_bytes'] / 1e9:.2f} GB"
        lines.append(f"| {key} | {r['size_bytes'] / 1e6:.2f} | {' | '.join(top)} | {back} | {r['rate']:.2g} | {cost} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled data (see benchmarks/README.md)")
    parser.add_argument("--rows", default="", help="names, separated by commas; default: all")
    parser.add_argument("--time", default="20m", help="time budget of a row (default: %(default)s)")
    parser.add_argument("--stages", default="", help="layers, end; default: what the program chooses")
    parser.add_argument("--again", action="store_true", help="run rows again that were measured before")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    args = parser.parse_args()
    if args.list:
        print("\n".join(r.key for r in rows()))
        return
    wanted = [n for n in args.rows.split(",") if n] or [r.key for r in rows()]
    unknown = sorted(set(wanted) - {r.key for r in rows()})
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}; see --list")
    for row in rows():
        found = load()
        if row.key in wanted and (args.again or found.get(row.key, {"error": "missing"})["error"]):
            print(row.key, flush=True)
            found[row.key] = run(row, args.data, args.time, args.stages)
            save(found)
    print(table(load()))


if __name__ == "__main__":
    main()
