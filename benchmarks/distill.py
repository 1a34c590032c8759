"""What distillation brings back: pruned and coarsely rounded networks taught by their originals for 20 minutes.

`python -m benchmarks.distill --data FOLDER [--rows "lite0 pruned 50,..."] [--time 20m] [--again]`. One row at a time;
rows measured before are kept, and a row that was cut off goes on where it was. Training sees the calibration photos
alone, no labels; the evaluation photos are looked at by the measurements before and after only. `--list` names rows;
`--plain` measures the same compression with nothing solved for: channels cut off, weights rounded to the nearest value.
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
from typing import TYPE_CHECKING, Any

from benchmarks import quantize, results, tasks
from benchmarks.tasks import TASKS, Task

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from featherweight.core import Plan
    from featherweight.stats import Statistics

RESULT = results.FOLDER / "distill.json"
PAGE = results.FOLDER / "distill.md"
STATISTICS_IMAGES = 128
#: Needs photos for its ranges, and solves for its weights with them at once.
NO_PLAIN = "static_int8"


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
    from featherweight.graph import io
    from featherweight.graph.normalise import normalise
    from featherweight.runtime import targets
    from featherweight.search.candidates import build_numeric
    from featherweight.techniques import Context, all_techniques
    from featherweight.techniques._equalise import equalise

    model = normalise(io.load(quantize.original(task_of(row))), run=None).model
    equal, ready = equalise(model, statistics(row, source, model))
    ctx = Context(targets.this_machine(), ready, 0, frozenset(), thorough=True)
    io.save(build_numeric(equal, everywhere(row, equal), ctx, all_techniques()), path)


def statistics(row: Row, source: Path, model: ir.Model) -> Statistics:
    """What the calibration photos make of the network."""
    from featherweight import data as fwdata
    from featherweight.search.problem import input_specs
    from featherweight.stats import collect
    from featherweight.stats.shrinkage import shrunk

    reading = task_of(row).reading[1]
    photos = fwdata.split(fwdata.open_data(source / "imagenet-samples", input_specs(model), preprocess=reading))
    every = max(1, photos.calibration.n_batches // STATISTICS_IMAGES)
    used = photos.calibration.subset(range(0, photos.calibration.n_batches, every))
    return shrunk(collect(model, used, max_positions=64))


def everywhere(row: Row, model: ir.Model) -> Plan:
    """The row's one decision at every place where its technique could act."""
    from featherweight.core import Action, Decision, Plan
    from featherweight.techniques import all_techniques

    action = Action.of(row.technique, **dict(row.params))
    return Plan(tuple(Decision(s.name, (action,)) for s in all_techniques()[row.technique].sites(model)))


def plain(row: Row, source: Path) -> float:
    """Top-1 of the same compression with nothing solved for: channels cut off, or weights rounded to the nearest."""
    import numpy as np

    from benchmarks import evaluate, feeds
    from featherweight.core import Plan
    from featherweight.graph import io
    from featherweight.graph.normalise import normalise
    from featherweight.runtime import targets
    from featherweight.search.candidates import build_numeric
    from featherweight.search.stage import cut_only
    from featherweight.techniques import Context, all_techniques

    task, folder = task_of(row), student(row, source).parent
    tasks.prepare(task, source, quantize.WORK)
    model = normalise(io.load(quantize.original(task)), run=None).model
    # The photos say which channels go; weights are rounded without them.
    ctx = Context(targets.this_machine(), statistics(row, source, model) if row.gone else None, 0, frozenset())
    if row.gone:
        made = cut_only(model, Plan.from_json((folder / "plan.json").read_text()).decisions, ctx, all_techniques())
    else:
        made = build_numeric(model, everywhere(row, model), ctx, all_techniques())
    path = folder / "plain.onnx"
    io.save(made, path)
    answers = evaluate.outputs(task, path, quantize.WORK).argmax(1)
    return float(np.mean(answers == feeds.labels(quantize.WORK / "data" / task.evaluation)))


def likeness(row: Row, source: Path, path: Path) -> dict[str, float]:
    """How a file's answers on the evaluation photos compare with the original's: share of equal first answers, and
    Kullback-Leibler divergence from the original, in nats a photo. Both move less by chance than top-1 does.
    """
    import numpy as np

    from benchmarks import evaluate

    task = task_of(row)
    tasks.prepare(task, source, quantize.WORK)
    theirs, ours = (evaluate.outputs(task, p, quantize.WORK) for p in (quantize.original(task), path))
    p, q = logarithms(theirs), logarithms(ours)
    return {
        "agree": float(np.mean(theirs.argmax(1) == ours.argmax(1))),
        "divergence": float((np.exp(p) * (p - q)).sum(1).mean()),
    }


def logarithms(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities of (n, classes) logits or probabilities."""
    import numpy as np

    if scores.min() >= 0 and np.allclose(scores.sum(1), 1, atol=1e-3):
        return np.asarray(np.log(np.maximum(scores, 1e-12)))
    less = scores - scores.max(1, keepdims=True)
    return np.asarray(less - np.log(np.exp(less).sum(1, keepdims=True)))


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
    like = {"before": student(row, source), "after": out / "model.onnx"}
    return {
        "size_bytes": raw["after"]["size_bytes"], "teacher": raw["teacher"]["metric"],
        "before": raw["before"]["metric"], "layers": layers and layers["measured"]["metric"],
        "after": raw["after"]["metric"],
        "rate": raw["facts"]["rate"], "recovered": raw["recovered"], "gain_interval": raw["gain_interval"],
        "steps": {s["name"]: s["steps"] for s in raw["stages"]},
        "validation": {s["name"]: [s["loss_before"], s["loss_after"]] for s in raw["stages"]},
        "like": {when: likeness(row, source, path) for when, path in like.items()},
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
        "`plain`: channels cut off or weights rounded to the nearest value, nothing else; `before`: with what",
        "`compress` solves layer by layer, on the same photos; `blocks`: after the first stage; `back`: share that",
        "teaching brought back of what was still lost; `of all`: with what was solved for, of what plain compression",
        "loses; `agree`: share of the photos with the original's first answer, `nats`: Kullback-Leibler divergence",
        "from it, both before and after; `-`: of a run before that was measured.",
        "Machine and versions: distill.json.", "",
        "| student | MB | original | plain | before | blocks | after | back | of all | agree | nats | time | peak |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip

    def cell(value: Any, form: Callable[[Any], str]) -> str:
        return "-" if value is None else form(value)

    for key, r in found.items():
        if r["error"]:
            lines.append(f"| {key} | {r['error'].splitlines()[-1][:80]} |")
            continue
        top = [cell(r.get(k), "{:.3f}".format) for k in ("teacher", "plain", "before", "layers", "after")]
        lost = None if r.get("plain") is None else r["teacher"] - r["plain"]
        whole = (r["after"] - r["plain"]) / lost if lost else None
        back = " | ".join(cell(share, "{:.0%}".format) for share in (r["recovered"], whole))
        like = [r["like"][when] for when in ("before", "after")] if "like" in r else []
        near = " | ".join(", ".join(f"{x[k]:.3f}" for x in like) or "-" for k in ("agree", "divergence"))
        cost = f"{r['wall_s'] / 60:.1f} min | {r['peak_bytes'] / 1e9:.2f} GB"
        lines.append(f"| {key} | {r['size_bytes'] / 1e6:.2f} | {' | '.join(top)} | {back} | {near} | {cost} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled data (see benchmarks/README.md)")
    parser.add_argument("--rows", default="", help="names, separated by commas; default: all")
    parser.add_argument("--time", default="20m", help="time budget of a row (default: %(default)s)")
    parser.add_argument("--stages", default="", help="layers, end; default: what the program chooses")
    parser.add_argument("--again", action="store_true", help="run rows again that were measured before")
    parser.add_argument("--plain", action="store_true", help="only measure rows with nothing solved for")
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
        if args.plain:
            known = row.key in found and not found[row.key]["error"] and row.technique != NO_PLAIN
            if row.key in wanted and known and (args.again or found[row.key].get("plain") is None):
                print(row.key, flush=True)
                found[row.key]["plain"] = plain(row, args.data)
                save(found)
            continue
        if row.key in wanted and (args.again or found.get(row.key, {"error": "missing"})["error"]):
            print(row.key, flush=True)
            measured = found.get(row.key, {}).get("plain")
            found[row.key] = {**run(row, args.data, args.time, args.stages), "plain": measured}
            save(found)
    print(table(load()))


if __name__ == "__main__":
    main()
