"""One door for all data: the kind is found from what is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from featherweight.data import feeds
from featherweight.data.dataset import Dataset, InputSpec
from featherweight.data.images import FILE_COLUMNS, open_images
from featherweight.data.npz import open_npz
from featherweight.data.preprocess import Preprocess
from featherweight.data.spool import temporary_folder
from featherweight.data.tables import header
from featherweight.data.text import TEXT_COLUMNS, open_text
from featherweight.errors import DataError

Given = str | Path | Dataset | Callable[[], Iterable[Any]] | Mapping[str, Any] | Iterable[Any]


def open_data(
    source: Given,
    inputs: Sequence[InputSpec],
    *,
    preprocess: str | Path | Preprocess | None = None,
    tokenizer: str | Path | None = None,
    batch_size: int = 1,
    labels: str | bool = True,
    class_names: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    max_length: int = 128,
    spool_folder: str | Path | None = None,
) -> Dataset:
    """The dataset behind a path (.npz, image folder, .tsv, .csv, .txt), `module:function`, callable or mapping.

    `inputs` are the model's. `labels`: True finds them by their usual names, a text names the array or column, False
    ignores them. What was assumed or converted is in `Dataset.notes`. Data in memory is written under `spool_folder`.
    Raises DataError saying what is wrong and what would do; MissingExtraError for text without the package tokenizers.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be >= 1, but got {batch_size}")
    if not inputs:
        raise DataError("the model has no inputs, so there is nothing to give it")
    if isinstance(source, Dataset):
        return source
    folder = Path(spool_folder) if spool_folder is not None else None
    if isinstance(source, Mapping):
        path = feeds.from_mapping(source, folder or temporary_folder())
        return open_npz(path, inputs, batch_size=batch_size, labels=labels)
    if not isinstance(source, str | Path):
        name = getattr(source, "__name__", type(source).__name__)
        where = f"the {'data function' if callable(source) else 'given'} {name}"
        return feeds.open_feeds(source, inputs, where=where, folder=folder)
    path = Path(source)
    if not path.exists():
        if isinstance(source, str) and feeds.is_function_name(source):
            return feeds.open_feeds(feeds.imported(source), inputs, where=source, folder=folder)
        raise DataError(
            f"there is no file or folder {str(path)!r}; give an .npz, an image folder, a text table or module:function"
        )
    if path.is_dir() or (path.suffix.lower() == ".csv" and tokenizer is None and _names_files(path)):
        return open_images(
            path, inputs, preprocess=preprocess, batch_size=batch_size, labels=labels, class_names=class_names
        )
    if path.suffix.lower() == ".npz":
        return open_npz(path, inputs, batch_size=batch_size, labels=labels)
    if path.suffix.lower() not in (".tsv", ".csv", ".txt"):
        raise DataError(
            f"{path} has the ending {path.suffix!r}; use .npz, .tsv, .csv, .txt, an image folder or module:function"
        )
    return open_text(
        path,
        inputs,
        tokenizer=Path(tokenizer) if tokenizer is not None else None,
        batch_size=batch_size,
        labels=labels,
        columns=columns,
        class_names=class_names,
        max_length=max_length,
    )


def _names_files(path: Path) -> bool:
    names = header(path)
    return any(c in names for c in FILE_COLUMNS) and not any(c in names for c in TEXT_COLUMNS)
