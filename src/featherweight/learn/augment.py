"""More pictures from few: crops, flips, colours and mixtures need no labels, as the teacher says what each shows.

A patient teacher that sees the same crop as the student is what makes distillation work with few images (Beyer 2022,
arXiv:2106.05237); mixtures are those of Zhang 2018 (mixup, arXiv:1710.09412) and Yun 2019 (CutMix, arXiv:1905.04899).
What is drawn depends on the seed and the step alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featherweight.data import Dataset
from featherweight.data import images as fwimages
from featherweight.data.images import ImageFolder
from featherweight.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

KINDS = ("flip", "crop", "color", "mixup", "cutmix")
#: Share of a picture's area that a crop keeps, and its aspect over the picture's.
LEAST_AREA, WIDEST = 0.2, 4 / 3
#: Brightness, contrast and saturation are changed by a factor of at most 1 + this, or its inverse.
COLORS = 0.4
#: Pixels by which arrays that are no files are shifted at most, as a share of their side.
SHIFT = 0.125
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Augment:
    """What is done to images; all off for other data."""

    flip: bool = False
    crop: bool = False
    color: bool = False
    mixup: bool = False
    cutmix: bool = False

    @property
    def mixes(self) -> bool:
        """True if several images make one, so that labels do not fit it."""
        return self.mixup or self.cutmix

    @property
    def any(self) -> bool:
        """True if anything is done."""
        return any(getattr(self, k) for k in KINDS)

    def __str__(self) -> str:
        return ",".join(k for k in KINDS if getattr(self, k)) or "none"


def parse(text: str, dataset: Dataset, *, labels: bool = False) -> Augment:
    """`auto` (all for image files, without labels also mixtures; else nothing), `none`, or some of `KINDS`.

    Raises DataError for an unknown word, or for words that do not suit the data.
    """
    words = tuple(w.strip() for w in text.split(",") if w.strip())
    folder = isinstance(dataset.origin, ImageFolder)
    if words == ("auto",):
        found = Augment(**dict.fromkeys(KINDS, True)) if folder else Augment()
        return dataclasses.replace(found, mixup=False, cutmix=False) if labels else found
    if words in ((), ("none",)):
        return Augment()
    unknown = [w for w in words if w not in KINDS]
    if unknown:
        raise DataError(f"augment must be auto, none or some of {', '.join(KINDS)}, but got {unknown[0]!r}")
    if "color" in words and not folder:
        raise DataError(f"augment=color is for image files, but {dataset.source} holds arrays; leave it out")
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
    if isinstance(origin, ImageFolder) and (augment.flip or augment.crop or augment.color):
        recipe = origin.recipe
        rows = []
        for atom in group:
            path = Path(origin.folder) / origin.files[atom]
            picture = fwimages.picture(path, recipe)
            how = recipe
            if augment.crop and isinstance(recipe.crop, tuple):
                picture = picture.crop(_box(picture.width, picture.height, recipe.crop, rng))
                how = dataclasses.replace(recipe, resize=recipe.crop)
            row = fwimages.apply(_colored(picture, rng) if augment.color else picture, how, str(path))
            width_axis = 2 if recipe.layout == "nchw" else 1
            rows.append(np.flip(row, width_axis) if augment.flip and rng.random() < 0.5 else row)
        return {origin.input_name: np.ascontiguousarray(np.stack(rows))}
    only = dataclasses.replace(dataset, groups=(tuple(group),))
    feeds = dict(next(iter(only.batches())).feeds)
    if augment.flip or augment.crop:
        feeds = {name: _moved(x, augment, rng) for name, x in feeds.items()}
    return feeds


def _colored(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A picture with other brightness, contrast and saturation."""
    from PIL import ImageEnhance

    most = math.log(1 + COLORS)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        factor = math.exp(rng.uniform(-most, most))
        if change is not ImageEnhance.Color or picture.mode == "RGB":
            picture = change(picture).enhance(factor)
    return picture


def _box(width: int, height: int, wanted: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random part of a picture, about as wide as the wanted shape is."""
    area = width * height * rng.uniform(LEAST_AREA, 1.0)
    aspect = math.exp(rng.uniform(-math.log(WIDEST), math.log(WIDEST))) * wanted[1] / wanted[0]
    w, h = min(width, max(1, round(math.sqrt(area * aspect)))), min(height, max(1, round(math.sqrt(area / aspect))))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return left, top, left + w, top + h


def _moved(x: Array, augment: Augment, rng: np.random.Generator) -> Array:
    """Each image of (n, c, h, w) or (n, h, w, c) flipped and shifted; edges are repeated where it was shifted from."""
    last = _channels_last(x)
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


def mixed(feeds: dict[str, Array], augment: Augment, rng: np.random.Generator) -> dict[str, Array]:
    """Each image and its follower in the batch as one, by `mixup` or `cutmix`; of both, by one of them at random."""
    cut = augment.cutmix and (not augment.mixup or rng.random() < 0.5)
    n = len(next(iter(feeds.values())))
    shares = rng.uniform(0.5, 1, n)
    places = rng.random((n, 2))
    return {name: (_cut if cut else _added)(x, shares, places) for name, x in feeds.items()}


def _added(x: Array, shares: Array, _places: Array) -> Array:
    """`share` of each image and the rest of its follower added up."""
    weight = shares.reshape(-1, *[1] * (x.ndim - 1)).astype(np.float32)
    return (weight * x + (1 - weight) * np.roll(x, -1, axis=0)).astype(x.dtype)


def _cut(x: Array, shares: Array, places: Array) -> Array:
    """A box of `1 - share` of each (n, c, h, w) or (n, h, w, c) image replaced by its follower's."""
    last = _channels_last(x)
    rows = np.moveaxis(x, 3, 1) if last else x
    made, (height, width) = rows.copy(), rows.shape[2:]
    for i, (share, place) in enumerate(zip(shares, places, strict=True)):
        side = math.sqrt(1 - share)
        h, w = round(height * side), round(width * side)
        top, left = (int(p * (full - part + 1)) for p, full, part in zip(place, (height, width), (h, w), strict=True))
        box = (slice(None), slice(top, top + h), slice(left, left + w))
        made[i][box] = rows[(i + 1) % len(rows)][box]
    return np.ascontiguousarray(np.moveaxis(made, 1, 3) if last else made)


def _channels_last(x: Array) -> bool:
    return x.shape[3] in (1, 3) and x.shape[1] not in (1, 3)
