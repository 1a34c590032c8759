"""Image folders: `labels.csv` (file, class_index, split), class sub-folders, or images without labels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featherweight.core import Note
from featherweight.data import tables
from featherweight.data.dataset import Array, Dataset, InputSpec, Piece, grouped
from featherweight.data.preprocess import Preprocess, resolve
from featherweight.data.splits import split_words, tag_of
from featherweight.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
FILE_COLUMNS = ("file", "path", "filename", "image")
LABEL_COLUMNS = ("class_index", "label", "class", "target", "y")
SPLIT_COLUMNS = ("split", "subset", "set")
MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class ImageFolder:
    """Images as one input. Atoms are files; decoding runs on a few threads, a bounded number ahead."""

    folder: str
    files: tuple[str, ...]
    input_name: str
    recipe: Preprocess
    classes: tuple[int | float, ...] | None = None
    tags: tuple[str, ...] | None = None
    stackable: bool = True
    rows_per_sample: int = 1

    @property
    def where(self) -> str:
        """The folder."""
        return self.folder

    @property
    def input_names(self) -> tuple[str, ...]:
        """The one input."""
        return (self.input_name,)

    @property
    def has_labels(self) -> bool:
        """True if classes are known."""
        return self.classes is not None

    def sizes(self) -> npt.NDArray[np.int64]:
        """One sample a file."""
        return np.ones(len(self.files), np.int64)

    def labels(self, atoms: Sequence[int]) -> Array | None:
        """Class numbers (int64), or scores (float64), of these files."""
        return None if self.classes is None else np.array([self.classes[a] for a in atoms])

    def read(self, groups: Sequence[tuple[int, ...]]) -> Iterator[Piece]:
        """Decode one batch a group."""
        atoms = (a for g in groups for a in g)
        arrays = _ahead(self._load, atoms)
        for group in groups:
            images = [next(arrays) for _ in group]
            self._same_shape(group, images)
            name = self.files[group[0]] + (f" and {len(group) - 1} more" if len(group) > 1 else "")
            yield Piece(name, {self.input_name: np.stack(images)}, self.labels(group))

    def _load(self, atom: int) -> Array:
        return load(Path(self.folder) / self.files[atom], self.recipe)

    def _same_shape(self, group: tuple[int, ...], images: list[Array]) -> None:
        for atom, image in zip(group, images, strict=True):
            if image.shape != images[0].shape:
                raise DataError(
                    f"{self.files[group[0]]} gives {images[0].shape} but {self.files[atom]} gives {image.shape}; "
                    "set crop, or a batch size of 1"
                )


def _ahead(load_one: Any, atoms: Iterator[int]) -> Iterator[Array]:
    workers = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        waiting: list[Future[Array]] = []
        try:
            for atom in atoms:
                waiting.append(pool.submit(load_one, atom))
                if len(waiting) > 2 * workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def load(path: Path, recipe: Preprocess) -> Array:
    """One image as the model sees it, without the batch axis. Raises DataError naming a file that is no sound
    image.
    """
    return apply(picture(path, recipe), recipe, str(path))


def picture(path: Path, recipe: Preprocess) -> Image.Image:
    """One image as decoded, gray or RGB as the recipe says. Raises DataError naming a file that is no sound image."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning; the bound below is stricter and an error
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(
                        f"{path} has {image.width}x{image.height} pixels, over the limit of "
                        f"{MAX_PIXELS}; make it smaller"
                    )
                if image.mode.startswith(("I", "F")):
                    raise DataError(
                        f"{path} has {image.mode} pixels (more than 8 bits); convert it to 8 bits a channel"
                    )
                return image.convert("L" if recipe.order == "gray" else "RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        raise DataError(f"{path} cannot be read as an image ({e}); mend it or remove it") from e


def apply(picture: Image.Image, recipe: Preprocess, where: str = "the image") -> Array:
    """Resize, crop and normalise an 8-bit picture: (c, h, w) or (h, w, c). `recipe` must be resolved."""
    from PIL import Image

    filters = Image.Resampling
    filter_ = {
        "nearest": filters.NEAREST,
        "bilinear": filters.BILINEAR,
        "bicubic": filters.BICUBIC,
        "lanczos": filters.LANCZOS,
        "box": filters.BOX,
    }
    size = _resized(picture.size, recipe.resize)
    if size != picture.size:
        picture = picture.resize(size, filter_[recipe.interpolation])
    if isinstance(recipe.crop, tuple):
        height, width = recipe.crop
        if height > picture.height or width > picture.width:
            raise DataError(
                f"{where} is {picture.height}x{picture.width} after resizing, smaller than the crop "
                f"{height}x{width}; set resize"
            )
        # An odd margin leaves its extra pixel at the bottom right, as in TensorFlow; torchvision rounds half to even.
        top, left = (picture.height - height) // 2, (picture.width - width) // 2
        picture = picture.crop((left, top, left + width, top + height))
    pixels = np.asarray(picture)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if recipe.order == "bgr":
        pixels = pixels[:, :, ::-1]
    return _normalised(pixels, recipe)


def _resized(size: tuple[int, int], resize: Any) -> tuple[int, int]:
    width, height = size
    if resize is None:
        return size
    if isinstance(resize, tuple):
        return int(resize[1]), int(resize[0])
    # The long side is cut off, not rounded, as in torchvision.
    if width <= height:
        return int(resize), max(1, int(resize * height / width))
    return max(1, int(resize * width / height)), int(resize)


def _normalised(pixels: npt.NDArray[np.uint8], recipe: Preprocess) -> Array:
    from featherweight.data.spool import named_dtype

    dtype = named_dtype(recipe.dtype)
    if recipe.layout == "nchw":
        pixels = pixels.transpose(2, 0, 1)
    if dtype.kind in "iu":
        plain = recipe.scale == 1.0 and set(recipe.mean) == {0.0} and set(recipe.std) == {1.0}
        if not plain:
            raise DataError(
                f"an input of {dtype.name} takes pixels as they are (scale=1,mean=0,std=1), but preprocess is {recipe}"
            )
        if np.iinfo(dtype.name).max < 255:
            raise DataError(f"pixels 0..255 do not fit the input's {dtype.name}; give an .npz instead")
        return np.ascontiguousarray(pixels).astype(dtype)
    shape = (-1, 1, 1) if recipe.layout == "nchw" else (1, 1, -1)
    mean = np.asarray(recipe.mean, np.float32).reshape(shape)
    std = np.asarray(recipe.std, np.float32).reshape(shape)
    values = (np.ascontiguousarray(pixels).astype(np.float32) * np.float32(recipe.scale) - mean) / std
    return values.astype(dtype, copy=False)


def open_images(
    path: Path,
    inputs: Sequence[InputSpec],
    *,
    preprocess: str | Path | Preprocess | None = None,
    batch_size: int = 1,
    labels: str | bool = True,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """The dataset of a folder of images, or of a table that names them.

    `class_names`: the model's classes in order, to number labels given as words or as sub-folders.
    Raises DataError: empty folder, absent files, paths that leave the folder, unknown split words, shapes that
    contradict.
    """
    takes = [i for i in inputs if i.rank == 4]
    if len(inputs) != 1 or not takes:
        raise DataError(
            "an image folder fills one input of rank 4, but the model has "
            f"{[(i.name, i.shape) for i in inputs]}; give an .npz instead"
        )
    recipe, notes = resolve(preprocess, inputs[0])
    table = path if path.is_file() else path / "labels.csv"
    folder = table.parent
    if table.is_file():
        files, words, tags = _from_table(table, labels, notes)
    else:
        files, words, tags = _from_folder(path, labels)
    if not files:
        raise DataError(f"calibration data is empty: {path} holds no images ({', '.join(SUFFIXES)}) and no labels.csv")
    classes = None if words is None else number_labels(words, class_names, str(path), notes)
    size = inputs[0].rows or batch_size
    origin = ImageFolder(str(folder), tuple(files), inputs[0].name, recipe, classes, tags)
    groups = tagged_groups(len(files), tags, size, full=inputs[0].rows is not None, where=str(path), notes=notes)
    return Dataset(
        origin,
        groups,
        size,
        inputs[0].rows is not None,
        ((inputs[0].name, inputs[0].dtype),),
        tuple(notes),
    )


def tagged_groups(
    n: int, tags: Sequence[str] | None, size: int, *, full: bool, where: str, notes: list[Note]
) -> tuple[tuple[int, ...], ...]:
    """Batches of one tag each. `full`: the model takes exactly `size`, so short ones are dropped with a Note.

    Raises DataError if none is left.
    """
    groups: list[tuple[int, ...]] = []
    for tag in dict.fromkeys(tags) if tags else [None]:
        groups += grouped([a for a in range(n) if tags is None or tags[a] == tag], size)
    if full:
        kept = [g for g in groups if len(g) == size]
        lost = n - size * len(kept)
        if not kept:
            raise DataError(f"{where}: the model takes {size} rows a call, but the data has {n}; give at least {size}")
        if lost:
            notes.append(Note(where, f"the model takes {size} rows a call: {lost} of {n} rows are not used"))
        groups = kept
    return tuple(groups)


def number_labels(
    words: Sequence[str], names: Sequence[str] | None, where: str, notes: list[Note]
) -> tuple[int | float, ...]:
    """Labels as numbers: as they are, by place in `names`, else by place in sorted order (with a Note).

    Raises DataError for a label that is not among `names`.
    """
    if names is not None:
        place = {n: i for i, n in enumerate(names)}
        strange = next((w for w in words if w not in place), None)
        if strange is not None:
            raise DataError(f"{where}: label {strange!r} is not among the {len(place)} class names")
        return tuple(place[w] for w in words)
    try:
        return tuple(int(w) for w in words)
    except ValueError:
        pass  # not all are whole numbers: scores or words
    try:
        return tuple(float(w) for w in words)
    except ValueError:
        order = {w: i for i, w in enumerate(sorted(set(words)))}
    notes.append(
        Note(
            where,
            f"labels are words; numbered 0..{len(order) - 1} in alphabetical order "
            f"({next(iter(order))!r} is 0): give class names if the model's order differs",
        )
    )
    return tuple(order[w] for w in words)


def _from_table(
    table: Path, labels: str | bool, notes: list[Note]
) -> tuple[list[str], list[str] | None, tuple[str, ...] | None]:
    header = tables.header(table)
    file_column = tables.column(header, FILE_COLUMNS, table)
    label_column = tables.labels_column(header, LABEL_COLUMNS, labels, table)
    split_column = next((c for c in SPLIT_COLUMNS if c in header), None)
    files: list[str] = []
    words: list[str] = []
    tags: list[str] = []
    for line, row in tables.rows(table):
        name = row[file_column].strip()
        files.append(_inside(name, table, line))
        if label_column is not None:
            word = row[label_column].strip()
            if not word:
                raise DataError(f"{table} line {line}: {label_column!r} is empty; fill it, or give labels=False")
            words.append(word)
        if split_column is not None:
            tag = tag_of(row[split_column])
            if tag is None:
                raise DataError(f"{table} line {line}: {split_column} is {row[split_column]!r}; use {split_words()}")
            tags.append(tag)
    if len(set(files)) < len(files):
        notes.append(Note(str(table), f"{len(files) - len(set(files))} rows name a file that an earlier row names"))
    return files, words if label_column is not None else None, tuple(tags) if split_column is not None else None


def _inside(name: str, table: Path, line: int) -> str:
    plain = PurePosixPath(name.replace("\\", "/"))
    if not name or plain.is_absolute() or PureWindowsPath(name).drive or ".." in plain.parts:
        raise DataError(
            f"{table} line {line}: the path {name!r} must lie inside {table.parent}; use a relative path without '..'"
        )
    if not (table.parent / plain).is_file():
        raise DataError(f"{table} line {line}: there is no file {name!r} in {table.parent}")
    return str(plain)


def _from_folder(path: Path, labels: str | bool) -> tuple[list[str], list[str] | None, tuple[str, ...] | None]:
    """Files sorted by name. Sub-folders called train, test... are splits; the (next) sub-folder is the class."""
    found = sorted(p.relative_to(path) for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    tops = {f.parts[0] for f in found if len(f.parts) > 1}
    flat = any(len(f.parts) == 1 for f in found)
    split = len(tops) > 1 and not flat and all(tag_of(t) for t in tops)
    at = 1 if split else 0
    classes = [f.parts[at] for f in found if len(f.parts) > at + 1]
    labelled = labels is not False and len(classes) == len(found) and len(set(classes)) > 1
    tags = tuple(tag_of(f.parts[0]) or "" for f in found) if split else None
    return [f.as_posix() for f in found], classes if labelled else None, tags
