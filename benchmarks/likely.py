"""How far the drop measured on few samples is from the drop on all, and how far the likely drop of the search is.

`python -m benchmarks.likely --data FOLDER --task lite0 FILE...` runs compressed files of a network on the 500 photos
(`--task minilm`: 1379 pairs) of the evaluation, draws few of them again and again, and judges each draw by both.
Results of networks are kept together.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks import evaluate, feeds, quantize, results, tasks
from benchmarks.tasks import TASKS, Task
from featherweight.runtime import metrics, significance

RESULT = results.FOLDER / "likely.json"
PAGE = results.FOLDER / "likely.md"
DRAWN = (60, 150, 400)
DRAWS = 60
PAIRS_DRAWN = 300
#: Bands of the drop on all photos, in points.
BANDS = ((0.0, 3.0), (3.0, 8.0), (8.0, 100.0))
#: What a search asks of each drop where one point is the limit; a file that loses more than `TOO_MUCH` should not pass,
#: one that loses at most `LITTLE` should.
AIMS = {"measured drop": 0.8, "likely drop": 1.0}
LITTLE, TOO_MUCH = 0.5, 1.5


def measured(task: Task, files: list[Path]) -> list[dict[str, list[int]]]:
    """For each file, photo by photo: whether the original and the file are right, and whether they differ."""
    labels = feeds.labels(quantize.WORK / "data" / task.evaluation)
    before = evaluate.outputs(task, quantize.original(task), quantize.WORK).argmax(1)
    found = []
    for path in files:
        after = evaluate.outputs(task, path, quantize.WORK).argmax(1)
        columns = {"before": before == labels, "after": after == labels, "changed": before != after}
        found.append({name: column.astype(int).tolist() for name, column in columns.items()})
    return found


def judged(file: dict[str, list[int]], n: int, rng: np.random.Generator) -> tuple[float, float]:
    """The measured and the likely drop of one draw of `n` photos, in points."""
    before, after, changed = (np.array(file[name]) for name in ("before", "after", "changed"))
    rows = rng.integers(0, len(before), n)
    gained, lost = (int((a[rows] & (1 - b[rows])).sum()) for a, b in ((after, before), (before, after)))
    drop = significance.Drop((lost - gained) / n, None, "agresti-min", None, gained, lost, n)
    likely = significance.likely(drop, float(changed[rows].mean()))
    assert likely is not None
    return 100 * drop.value, 100 * likely


def truth(file: dict[str, list[int]]) -> float:
    """The drop on all photos, in points."""
    return 100 * float(np.mean(file["before"]) - np.mean(file["after"]))


def table(files: list[dict[str, list[int]]]) -> str:
    """What a changed answer costs, and both errors by number of photos and band, as Markdown."""
    lines = [
        "# The drop from few photos", "",
        f"{len(files)} compressed files on 500 photos; {DRAWS} draws a file with replacement, against the drop on all. "
        f"passes: draws in which a file that loses more than {TOO_MUCH} points is within a limit of 1 as a search "
        f"judges it ({', '.join(f'{name} at most {aim:g}' for name, aim in AIMS.items())}); refused: draws in which "
        f"one that loses at most {LITTLE} is not.", "",
        "| loses, points | files | drop over changed answers |", "| --- | ---: | --- |",
    ]  # fmt: skip
    for low, high in BANDS:
        shares = [
            truth(f) / (100 * np.mean(f["changed"])) for f in files if low <= truth(f) < high and any(f["changed"])
        ]
        lines.append(
            f"| {low:g} to {high:g} | {len(shares)} | {min(shares, default=0):.2f} to {max(shares, default=0):.2f} |"
        )
    head = " | ".join(f"error, {low:g} to {high:g} points" for low, high in BANDS)
    lines += [
        "",
        f"| photos | judged by | {head} | passes | refused |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for n in DRAWN:
        rng = np.random.default_rng(n)
        rows = np.array([(truth(f), *judged(f, n, rng)) for f in files for _ in range(DRAWS)])
        for column, (name, aim) in enumerate(AIMS.items(), 1):
            errors = [rows[(rows[:, 0] >= low) & (rows[:, 0] < high)][:, [0, column]] for low, high in BANDS]
            cells = " | ".join(f"{np.sqrt(np.square(e[:, 1] - e[:, 0]).mean()):.2f}" if len(e) else "-" for e in errors)
            bad, good = (rows[chosen][:, column] for chosen in (rows[:, 0] > TOO_MUCH, rows[:, 0] <= LITTLE))
            judged_so = f"{(bad <= aim).mean() if len(bad) else 0:.1%} | {(good > aim).mean() if len(good) else 0:.1%}"
            lines.append(f"| {n} | {name} | {cells} | {judged_so} |")
    return "\n".join(lines) + "\n"


def scored(task: Task, files: list[Path]) -> list[dict[str, list[float]]]:
    """For each file, pair by pair: the gold score, and the similarity that the original and the file give."""
    gold = feeds.labels(quantize.WORK / "data" / task.evaluation)
    rows = []
    for path in (quantize.original(task), *files):
        x = evaluate.outputs(task, path, quantize.WORK)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        rows.append((x[0::2] * x[1::2]).sum(axis=1).astype(float).tolist())
    return [{"gold": gold.tolist(), "before": rows[0], "after": after} for after in rows[1:]]


def correlations(files: list[dict[str, list[float]]]) -> str:
    """What disagreement costs a rank correlation, and the errors of few pairs, as Markdown."""
    lines = [
        f"## A correlation: {len(files)} compressed files on {len(files[0]['gold'])} pairs", "",
        "fall: what noise as large as the disagreement of the two models' scores would cost. error: of the drop of "
        f"{PAIRS_DRAWN} pairs ({DRAWS} draws) against the drop on all, measured and likely. passes: draws within a "
        "limit of .01, as measured with a fifth of room and as likely.", "",
        "| drop | fall | drop over fall | error, measured | error, likely | passes, measured | passes, likely |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    metric, rng = metrics.get("spearman"), np.random.default_rng(0)
    for file in files:
        gold, before, after = (np.array(file[name]) for name in ("gold", "before", "after"))
        value = metric.aggregate(before, gold)
        drop, fall = value - metric.aggregate(after, gold), value * (1 - metric.aggregate(after, before))
        draws = []
        for _ in range(DRAWS):
            i = rng.integers(0, len(gold), PAIRS_DRAWN)
            found = significance.drop_interval(metric, before[i], after[i], gold[i], resamples=200)
            start = metric.aggregate(before[i], gold[i])
            draws.append((found.value, significance.likely_correlation(found, start, before[i], after[i])))
        rows = np.array(draws, float)
        errors = np.sqrt(np.square(rows - drop).mean(axis=0))
        passes = [(rows[:, k] <= 0.01 * aim).mean() for k, aim in enumerate(AIMS.values())]
        lines.append(
            f"| {drop:.4f} | {fall:.4f} | {drop / max(fall, 1e-9):.2f} | {errors[0]:.4f} | {errors[1]:.4f} | "
            f"{passes[0]:.0%} | {passes[1]:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the files, keep what they answered, print the table over all networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = TASKS
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled data (see benchmarks/README.md)")
    parser.add_argument("--task", choices=[t.name for t in known], required=True)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="compressed files of that network")
    args = parser.parse_args()
    task = next(t for t in known if t.name == args.task)
    tasks.prepare(task, args.data, quantize.WORK)
    kept = json.loads(RESULT.read_text())["tasks"] if RESULT.exists() else {}
    kept[task.name] = measured(task, args.files) if task.kind == "images" else scored(task, args.files)
    RESULT.write_text(json.dumps({"machine": results.machine(), "tasks": kept}) + "\n")
    kinds = {t.name: t.kind for t in known}
    photos = [f for name, files in kept.items() if kinds[name] == "images" for f in files]
    page = table(photos) if photos else ""
    page += "".join("\n" + correlations(files) for name, files in kept.items() if kinds[name] == "pairs")
    PAGE.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
