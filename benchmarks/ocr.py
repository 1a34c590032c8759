"""PP-OCR's text recogniser out of the rapidocr package, and rendered lines of text to read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx

from benchmarks.models import package_file

MODEL = ("rapidocr", "models/PP-OCRv6_rec_small.onnx")
HEIGHT, WIDTH = 48, 320
LINES = 300
_SEEDS = {"calibration": 0, "evaluation": 1}
_FIRST_PARAGRAPH = {"calibration": 0, "evaluation": 1}
_LONGEST = 30


def write_ppocr(path: Path) -> Path:
    """The recogniser as shipped: `x` (batch, 3, 48, width) to (batch, steps, characters); Apache-2.0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(package_file(*MODEL), path)
    return path


def prepare_lines(corpus: Path, target: Path, split: str, model: Path, *, n: int = LINES) -> Path:
    """`pixels.npy` (n, 48, 320, 3) uint8, `lines.txt` with what they say, `labels.npy` (n, 30): its classes, then 0.

    Lines are cut from every second paragraph of `corpus`, so the two splits share none, and drawn in Pillow's own
    font with a seeded size, grey, tilt, blur and noise.
    """
    if (target / "spec.json").exists():
        return target
    rng = np.random.default_rng(_SEEDS[split])
    texts = _texts(corpus, split, n, rng)
    pixels = np.stack([_draw(text, rng) for text in texts])
    classes = {c: i for i, c in enumerate(characters(model))}
    labels = np.array([[classes[c] for c in text] + [0] * (_LONGEST - len(text)) for text in texts])
    target.mkdir(parents=True, exist_ok=True)
    np.save(target / "pixels.npy", pixels)
    np.save(target / "labels.npy", labels)
    (target / "lines.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    (target / "spec.json").write_text(f'{{"kind": "lines", "batches": {n}}}')
    return target


def _texts(corpus: Path, split: str, n: int, rng: np.random.Generator) -> list[str]:
    """Runs of words of at most 30 printable ASCII characters."""
    paragraphs = corpus.read_text(encoding="utf-8").splitlines()[_FIRST_PARAGRAPH[split] :: 2]
    usable = [p.split() for p in paragraphs if p.isascii() and p.isprintable() and len(p) > 4 * _LONGEST]
    texts = []
    for i in rng.choice(len(usable), n, replace=len(usable) < n):
        words = usable[i][int(rng.integers(0, len(usable[i]) - 8)) :]
        text, limit = words[0][:_LONGEST], int(rng.integers(8, _LONGEST))
        for word in words[1:]:
            if len(text) + 1 + len(word) > limit:
                break
            text = f"{text} {word}"
        texts.append(text)
    return texts


def _draw(text: str, rng: np.random.Generator) -> np.ndarray:
    """(48, 320, 3) uint8: dark on light or light on dark, a little tilted, blurred and noisy; zeros to the right."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    font = ImageFont.load_default(int(rng.integers(28, 40)))
    left, top, right, bottom = font.getbbox(text)
    ink, paper = sorted(rng.integers(0, 256, 2)) if rng.random() < 0.7 else sorted(rng.integers(0, 256, 2))[::-1]
    if abs(int(ink) - int(paper)) < 90:
        ink, paper = 20, 235
    size = (int(right - left) + 24, int(bottom - top) + 16)
    image = Image.new("L", size, int(paper))
    ImageDraw.Draw(image).text((12 - left, 8 - top), text, fill=int(ink), font=font)
    image = image.rotate(float(rng.uniform(-1.2, 1.2)), Image.Resampling.BICUBIC, fillcolor=int(paper))
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.9))))
    width = min(WIDTH, round(HEIGHT * image.width / image.height))
    grey = np.asarray(image.resize((width, HEIGHT), Image.Resampling.BILINEAR), np.float64)
    grey += rng.normal(0, rng.uniform(0, 8), grey.shape)
    line = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    # What the package pads with is grey after normalising; 128 is the nearest pixel.
    out = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    out[:, :width] = line[:, :, None]
    return out


def characters(path: Path) -> list[str]:
    """What each class stands for, as the model's own metadata lists it; 0 is CTC's blank, the last a space."""
    model = onnx.load(path)
    listed = next(p.value for p in model.metadata_props if p.key == "character").splitlines()
    return ["", *listed, " "]


def collapse(steps: np.ndarray) -> list[tuple[int, ...]]:
    """(n, t) classes -> each line's characters: repeats merged, blanks (0) dropped (CTC, best path)."""
    found = []
    for row in steps:
        changed = np.concatenate([[True], row[1:] != row[:-1]])
        found.append(tuple(int(c) for c in row[changed] if c != 0))
    return found


def lines_read(steps: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n,) bool: which of the lines (n, t) of classes say exactly what `labels` (n, 30) say."""
    truth = [tuple(int(c) for c in row if c != 0) for row in labels]
    return np.array([found == true for found, true in zip(collapse(steps), truth, strict=True)])
