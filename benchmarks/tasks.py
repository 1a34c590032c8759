"""The tasks: a model, its data, and what is asked of featherweight."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import feeds, ocr, speech

IMAGES = ("images-calibration", "images-evaluation")
PAIRS = ("pairs-calibration", "pairs-evaluation")
LINES = ("lines-calibration", "lines-evaluation")
VOICES = ("voices-calibration", "voices-evaluation")
_DEV_PAIRS = 300


@dataclass(frozen=True)
class Task:
    """`calibration`, `evaluation`: prepared folders. `table`: what featherweight reads, calibration data only.

    `asked`: named requests in the words of the command line; `default` asks nothing.
    """

    name: str
    kind: Literal["images", "pairs", "lines", "voices"]
    title: str
    metric: str
    closeness: str
    calibration: str
    evaluation: str
    table: str
    reading: tuple[str, ...]
    asked: tuple[tuple[str, tuple[str, ...]], ...]
    peers: tuple[str, ...]


_ORT = (
    "ort-static",
    "ort-static-per-channel",
    "ort-static-reduce-range",
    "ort-dynamic",
    "ort-dynamic-per-channel",
)


def _images(name: str, title: str, six_times_smaller: str) -> Task:
    mean, std = (":".join(map(str, v)) for v in feeds.MEAN_STD[name])
    return Task(
        name=name,
        kind="images",
        title=title,
        metric="top-1",
        closeness="agreement",
        calibration=IMAGES[0],
        evaluation=IMAGES[1],
        table="images/labels.csv",
        reading=("--preprocess", f"resize=none,crop=224,mean={mean},std={std}"),
        asked=(
            ("featherweight", ()),
            ("featherweight 6x", ("--max-size", six_times_smaller)),
            ("featherweight 1%", ("--max-drop", "1%")),
        ),
        peers=(*_ORT, "nncf"),
    )


TASKS = (
    _images("lite0", "EfficientNet-Lite0", "3.1MB"),
    _images("mobilenetv2", "MobileNetV2", "2.33MB"),
    Task(
        name="minilm",
        kind="pairs",
        title="all-MiniLM-L6-v2",
        metric="Spearman",
        closeness="cosine",
        calibration=PAIRS[0],
        evaluation=PAIRS[1],
        table="pairs.tsv",
        reading=("--tokenizer", "minilm-tokenizer.json", "--batch-size", str(feeds.TEXT_BATCH // 2)),
        asked=(
            ("featherweight", ()),
            ("featherweight 6x", ("--max-size", "15MB")),
            ("featherweight 1%", ("--max-drop", "0.01")),
        ),
        peers=(*_ORT, "nncf", "nncf-transformer"),
    ),
)

# Networks that the structure benchmark adds: no labels are given to featherweight, it keeps near to the original.
MORE_TASKS = (
    Task(
        name="ppocr",
        kind="lines",
        title="PP-OCRv6 small recogniser",
        metric="lines read",
        closeness="characters",
        calibration=LINES[0],
        evaluation=LINES[1],
        table="lines.npz",
        reading=("--metric", "agreement"),
        asked=(),
        peers=(),
    ),
    Task(
        name="resemblyzer",
        kind="voices",
        title="Resemblyzer",
        metric="1 - EER",
        closeness="cosine",
        calibration=VOICES[0],
        evaluation=VOICES[1],
        table="voices.npz",
        reading=("--metric", "cosine"),
        asked=(),
        peers=(),
    ),
)


def prepare(task: Task, source: Path, work: Path) -> None:
    """Prepared folders and table of one task from the folder of labelled data; what exists is kept.

    Images, lines: `calibration` sets ranges and guides the search, `evaluation` is reported. Pairs: train, dev, test.
    Voices: train and evaluation takes of the same speakers.
    """
    data = work / "data"
    if task.kind == "lines":
        corpus, model = source / "text-corpus" / "wikipedia-en-part.txt", work / "models" / "ppocr.onnx"
        for split, target in zip(("calibration", "evaluation"), LINES, strict=True):
            ocr.prepare_lines(corpus, data / target, split, model)
        _archive(data / LINES[0], data / task.table, task.name)
        return
    if task.kind == "voices":
        for split, target in zip(("train", "evaluation"), VOICES, strict=True):
            speech.prepare_voices(source / "spoken-digits", data / target, split)
        _archive(data / VOICES[0], data / task.table, task.name)
        return
    if task.kind == "images":
        folder = source / "imagenet-samples"
        for split, target in zip(("calibration", "evaluation"), IMAGES, strict=True):
            feeds.prepare_images(folder, data / target, split)
        _images_table(folder, data / "images")
        return
    tokenizer = work / "models" / "minilm-tokenizer.json"
    sts = source / "sts"
    feeds.prepare_pairs(sts / "stsb-en-train.tsv", data / PAIRS[0], tokenizer, n=feeds.CALIBRATION_PAIRS)
    feeds.prepare_pairs(sts / "stsb-en-test.tsv", data / PAIRS[1], tokenizer)
    _pairs_table(sts, data / "pairs.tsv")


def _archive(folder: Path, target: Path, model: str) -> None:
    """The prepared calibration feeds as an .npz of one array an input."""
    if not target.exists():
        rows = list(feeds.read(folder, model))
        arrays: dict[str, Any] = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        np.savez(target, **arrays)


def _images_table(source: Path, target: Path) -> None:
    """The calibration photos alone; a tool that sees this folder cannot see the evaluation."""
    table = target / "labels.csv"
    if table.exists():
        return
    with (source / "labels.csv").open(newline="") as f:
        rows = [(r["file"], r["class_index"]) for r in csv.DictReader(f) if r["split"] == "calibration"]
    for file, _ in rows:
        link = target / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((source / file).resolve())
    with table.open("w", newline="") as f:
        csv.writer(f).writerows([("file", "class_index"), *rows])


def _pairs_table(source: Path, table: Path) -> None:
    """The peers' train pairs as calibration, pairs of dev as validation and holdout."""
    if table.exists():
        return
    rows = []
    for name, split, n in (("train", "calibration", feeds.CALIBRATION_PAIRS), ("dev", "validation", 2 * _DEV_PAIRS)):
        for i, row in enumerate(feeds.pairs(source / f"stsb-en-{name}.tsv", n)):
            part = "holdout" if split == "validation" and i % 2 else split
            rows.append((row["sentence1"], row["sentence2"], row["score"], part))
    with table.open("w", newline="", encoding="utf-8") as f:
        for line in [("sentence1", "sentence2", "score", "split"), *rows]:
            f.write("\t".join(line) + "\n")
