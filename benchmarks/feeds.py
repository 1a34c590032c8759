"""The same prepared inputs for every tool: numpy only, so that it runs in any tool's environment.

A prepared folder holds `spec.json` and arrays; `read` yields one feed (a dict of arrays) a batch.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MEAN_STD = {
    "lite0": ([0.498, 0.498, 0.498], [0.502, 0.502, 0.502]),
    "mobilenetv2": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}
CALIBRATION_PAIRS = 256
MAX_TOKENS = 128
TEXT_BATCH = 8


def read(folder: Path, model: str, *, limit: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Feeds for `model` in order: images (1, 3, 224, 224), text lines (1, 3, 48, 320) or mel windows (1, 160, 40) f32,
    or token arrays (b, t) int64."""
    spec = json.loads((folder / "spec.json").read_text())
    n = spec["batches"] if limit is None else min(limit, spec["batches"])
    if spec["kind"] == "images":
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        mean, std = (np.array(v, np.float32) for v in MEAN_STD[model])
        for i in range(n):
            x = (pixels[i].astype(np.float32) / np.float32(255) - mean) / std
            yield {"image": np.ascontiguousarray(x.transpose(2, 0, 1)[None])}
        return
    if spec["kind"] == "lines":
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        for i in range(n):
            yield {"x": line(pixels[i])}
        return
    if spec["kind"] == "voices":
        mels = np.load(folder / "mels.npy", mmap_mode="r")
        for i in range(n):
            yield {"mels": np.array(mels[i : i + 1])}
        return
    with np.load(folder / "tokens.npz") as tokens:
        for i in range(n):
            names = ("input_ids", "attention_mask", "token_type_ids")
            yield {name: tokens[f"{i}::{name}"] for name in names}


def line(pixels: np.ndarray) -> np.ndarray:
    """(48, w, 3) uint8 -> (1, 3, 48, w) f32 in -1 to 1, as PP-OCR's recogniser reads."""
    x = (pixels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None])


def labels(folder: Path) -> np.ndarray:
    """Images: classes (n,) int64. Pairs (rows 2i, 2i + 1): scores (n,) f64. Lines: the classes they say, (n, 30).
    Voices: speaker and group of each window, (n, 2)."""
    return np.asarray(np.load(folder / "labels.npy"))


def prepare_images(source: Path, target: Path, split: str) -> Path:
    """Centre crops of 224 (offsets rounded down) of one split as uint8, and their classes."""
    from PIL import Image

    if (target / "spec.json").exists():
        return target
    with (source / "labels.csv").open(newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["split"] == split]
    pixels = np.empty((len(rows), 224, 224, 3), np.uint8)
    for i, row in enumerate(rows):
        with Image.open(source / row["file"]) as image:
            rgb = image.convert("RGB")
            left, top = (rgb.width - 224) // 2, (rgb.height - 224) // 2
            pixels[i] = np.asarray(rgb.crop((left, top, left + 224, top + 224)))
    target.mkdir(parents=True, exist_ok=True)
    np.save(target / "pixels.npy", pixels)
    np.save(target / "labels.npy", np.array([int(row["class_index"]) for row in rows]))
    _write_spec(target, {"kind": "images", "batches": len(rows)})
    return target


def prepare_pairs(source: Path, target: Path, tokenizer: Path, *, n: int | None = None) -> Path:
    """Sentence pairs of a TSV as token batches of 8 (4 pairs), padded to the longest, and their scores."""
    from tokenizers import Tokenizer

    if (target / "spec.json").exists():
        return target
    rows = pairs(source, n)
    sentences = [row[key] for row in rows for key in ("sentence1", "sentence2")]
    tool = Tokenizer.from_file(str(tokenizer))
    tool.enable_truncation(MAX_TOKENS)
    tool.enable_padding()
    arrays: dict[str, Any] = {}
    starts = range(0, len(sentences), TEXT_BATCH)
    for i, start in enumerate(starts):
        encoded = tool.encode_batch(sentences[start : start + TEXT_BATCH])
        arrays[f"{i}::input_ids"] = np.array([e.ids for e in encoded], np.int64)
        arrays[f"{i}::attention_mask"] = np.array([e.attention_mask for e in encoded], np.int64)
        arrays[f"{i}::token_type_ids"] = np.array([e.type_ids for e in encoded], np.int64)
    target.mkdir(parents=True, exist_ok=True)
    np.savez(target / "tokens.npz", **arrays)
    np.save(target / "labels.npy", np.array([float(row["score"]) for row in rows]))
    _write_spec(target, {"kind": "pairs", "batches": len(starts)})
    return target


def pairs(source: Path, n: int | None = None) -> list[dict[str, str]]:
    """Rows of a TSV of sentence pairs: all, or `n` drawn with a fixed seed, in file order."""
    with source.open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    if n is None:
        return rows
    return [rows[i] for i in np.sort(np.random.default_rng(0).choice(len(rows), n, replace=False))]


def _write_spec(target: Path, spec: dict[str, Any]) -> None:
    (target / "spec.json").write_text(json.dumps(spec))
