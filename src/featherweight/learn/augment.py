"""More pictures from few: crops, flips and mixtures need no labels, as the teacher says what each shows.

A patient teacher that sees the same crop as the student is what makes distillation work with few images (Beyer 2022,
arXiv:2106.05237); mixtures are those of Zhang 2018 (mixup, arXiv:1710.09412). What is drawn depends on the seed and
the step alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.data import Dataset
from featherweight.data import images as fwimages
from featherweight.data.images import ImageFolder
from featherweight.errors import DataError

KINDS = ("flip", "crop", "mixup")
AUTO = ("flip", "crop")
#: Share of a picture's area that a crop keeps, and its aspect over the picture's.
LEAST_AREA, WIDEST = 0.35, 4 / 3
#: Both parameters of the Beta distribution that mixtures are drawn from.
MIXING = 0.4
#: Pixels by which arrays that are no files are shifted at most, as a share of their side.
SHIFT = 0.125
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Augment:
    """What is done to images; all off for other data."""

    flip: bool = False
    crop: bool = False
    mixup: bool = False

    @property
    def any(self) -> bool:
        """True if anything is done."""
        return self.flip or self.crop or self.mixup

    def __str__(self) -> str:
        return ",".join(k for k in KINDS if getattr(self, k)) or "none"


def parse(text: str, dataset: Dataset) -> Augment:
    """`auto` (flips and crops for image files, else nothing), `none`, or some of flip, crop, mixup.

    Raises DataError for an unknown word, or for words that do not suit the data.
    """
    words = tuple(w.strip() for w in text.split(",") if w.strip())
    folder = isinstance(dataset.origin, ImageFolder)
    if words == ("auto",):
        return Augment(**dict.fromkeys(AUTO, True)) if folder else Augment()
    if words in ((), ("none",)):
        return Augment()
    unknown = [w for w in words if w not in KINDS]
    if unknown:
        raise DataError(f"augment must be auto, none or some of {', '.join(KINDS)}, but got {unknown[0]!r}")
    if not folder and not _images(dataset):
        raise DataError(f"augment={text} is for images, but {dataset.source} holds none; use augment=none")
    return Augment(**dict.fromkeys(words, True))


def _images(dataset: Dataset) -> bool:
    """True if the one input is (n, c, h, w) or (n, h, w, c) floats."""
    first = next(iter(dataset.batches()), None)
    if first is None or len(first.feeds) != 1:
        return False
    (array,) = first.feeds.values()
    return array.ndim == 4 and array.dtype.kind == "f"


def read(dataset: Dataset, group: Sequence[int], augment: Augment, rng: np.random.Generator) -> dict[str, Array]:
    """Feeds of some atoms, augmented but for mixing."""
    origin = dataset.origin
    if isinstance(origin, ImageFolder) and (augment.flip or augment.crop):
        recipe = origin.recipe
        rows = []
        for atom in group:
            path = Path(origin.folder) / origin.files[atom]
            picture = fwimages.picture(path, recipe)
            if augment.crop and isinstance(recipe.crop, tuple):
                box = _box(picture.width, picture.height, recipe.crop, rng)
                row = fwimages.apply(picture.crop(box), dataclasses.replace(recipe, resize=recipe.crop), str(path))
            else:
                row = fwimages.apply(picture, recipe, str(path))
            width_axis = 2 if recipe.layout == "nchw" else 1
            rows.append(np.flip(row, width_axis) if augment.flip and rng.random() < 0.5 else row)
        return {origin.input_name: np.ascontiguousarray(np.stack(rows))}
    only = dataclasses.replace(dataset, groups=(tuple(group),))
    feeds = dict(next(iter(only.batches())).feeds)
    if augment.flip or augment.crop:
        feeds = {name: _moved(x, augment, rng) for name, x in feeds.items()}
    return feeds


def _box(width: int, height: int, wanted: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random part of a picture, about as wide as the wanted shape is."""
    area = width * height * rng.uniform(LEAST_AREA, 1.0)
    aspect = math.exp(rng.uniform(-math.log(WIDEST), math.log(WIDEST))) * wanted[1] / wanted[0]
    w, h = min(width, max(1, round(math.sqrt(area * aspect)))), min(height, max(1, round(math.sqrt(area / aspect))))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return left, top, left + w, top + h


def _moved(x: Array, augment: Augment, rng: np.random.Generator) -> Array:
    """Each image of (n, c, h, w) or (n, h, w, c) flipped and shifted; edges are repeated where it was shifted from."""
    last = x.shape[3] in (1, 3) and x.shape[1] not in (1, 3)
    rows = np.moveaxis(x, 3, 1) if last else x
    made = np.empty_like(rows)
    for i, row in enumerate(rows):
        if augment.crop:
            pad = [max(1, round(SHIFT * side)) for side in row.shape[1:]]
            wide = np.pad(row, ((0, 0), (pad[0], pad[0]), (pad[1], pad[1])), mode="edge")
            top, left = (int(rng.integers(2 * p + 1)) for p in pad)
            row = wide[:, top : top + row.shape[1], left : left + row.shape[2]]
        made[i] = row[:, :, ::-1] if augment.flip and rng.random() < 0.5 else row
    return np.ascontiguousarray(np.moveaxis(made, 1, 3) if last else made)


def mixed(feeds: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Each image and its follower in the batch added up with one random weight, at least a half."""
    drawn = float(rng.beta(MIXING, MIXING))
    weight = np.float32(max(drawn, 1 - drawn))
    return {n: (weight * x + (1 - weight) * np.roll(x, 1, axis=0)).astype(x.dtype) for n, x in feeds.items()}
