"""The model and the data of the demo: EfficientNet-Lite0, and the caller's labelled photos or the 16 shipped ones."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

PHOTOS = Path(__file__).parent / "photos"
PREPROCESS = "efficientnet-lite0"
# Whole photos go to one split, so that no crop of a photo is judged after another one was learned from.
_SPLITS = (
    "calibration",
    "evaluation",
    "calibration",
    "evaluation",
    "validation",
    "calibration",
    "evaluation",
    "validation",
)
_SIDE = 256
# (fraction of the short side, place across, place down), places from 0 (left, top) to 1 (right, bottom).
_WINDOWS = (
    (1.0, 0.5, 0.5),
    (1.0, 0.0, 0.0),
    (0.8, 0.0, 0.0),
    (0.8, 1.0, 0.0),
    (0.8, 0.0, 1.0),
    (0.8, 1.0, 1.0),
    (0.7, 0.5, 0.5),
    (0.9, 0.5, 0.5),
)


@dataclass(frozen=True)
class DemoInputs:
    """What the pipeline is called with. `metric` None: chosen by the data. `note`: what the numbers are about."""

    model_path: Path
    data_source: Path
    preprocess: str
    metric: str | None
    note: str


def prepare(folder: Path, data: Path | None = None) -> DemoInputs:
    """Write the model (18.5 MB) and, without `data`, 256 crops of the shipped photos (about 8 MB) into `folder`.

    `data`: a folder of photos with `labels.csv` (ImageNet class indices), used as it is.
    What is there already is not written again. Raises MissingExtraError without the demo's weights, DataError if
    `data` is not a folder.
    """
    from featherweight.demo import lite0

    if data is not None and not data.is_dir():
        raise DataError(f"the demo's data must be a folder of photos, but {data} is not a folder")
    model = folder / "efficientnet-lite0.onnx"
    if not model.exists():
        lite0.write(model)
    if data is not None:
        return DemoInputs(model, data, PREPROCESS, None, f"photos of {data}, centre crops of 224 pixels")
    crops = folder / "photos"
    if not (crops / "labels.csv").exists():
        write_crops(crops)
    note = (
        "no labelled photos here, so the metric is agreement with the original on 16 crops each of 16 freely "
        "licensed photos; crops of one photo resemble each other, so the interval is narrower than it should be. "
        "For accuracy, give labelled ImageNet photos with --data"
    )
    return DemoInputs(model, crops, PREPROCESS, "agreement", note)


def write_crops(folder: Path) -> None:
    """256 JPEG crops of 256 x 256 pixels and a `labels.csv` with their splits (96 / 64 / 96); no randomness."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, photo in enumerate(sorted(PHOTOS.glob("*.jpg"))):
        split = _SPLITS[number % len(_SPLITS)]
        with Image.open(photo) as image:
            for index, crop in enumerate(_crops(image.convert("RGB"))):
                name = f"{photo.stem}-{index:02d}.jpg"
                crop.save(folder / name, quality=92)
                rows.append((name, split))
    # Written last: it is what says that the folder is complete.
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("file", "split"), *rows])


def _crops(image: Image.Image) -> Iterator[Image.Image]:
    """Each window, as it is and mirrored, at 256 x 256."""
    from PIL import Image, ImageOps

    short = min(image.size)
    for fraction, across, down in _WINDOWS:
        side = round(short * fraction)
        left, top = round((image.width - side) * across), round((image.height - side) * down)
        box = (left, top, left + side, top + side)
        crop = image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box=box)
        yield crop
        yield ImageOps.mirror(crop)
