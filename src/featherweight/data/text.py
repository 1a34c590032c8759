"""Text tables and plain text, turned into ids by a `tokenizer.json` (extra `text`).

Columns `text`, or `sentence1` and `sentence2`, with `label` or `score`; others by `columns`. Two sentences
with a score are two rows
of the batch each (a sentence encoder compares their vectors); two sentences without one are one row, as a
classifier of pairs takes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.core import Note
from featherweight.data import tables
from featherweight.data.dataset import Array, Dataset, Feeds, InputSpec, Piece
from featherweight.data.images import SPLIT_COLUMNS, number_labels, tagged_groups
from featherweight.data.splits import split_words, tag_of
from featherweight.errors import DataError, MissingExtraError

TEXT_COLUMNS = ("text", "sentence", "document", "review", "content")
PAIR_COLUMNS = (("sentence1", "sentence2"), ("text1", "text2"), ("premise", "hypothesis"), ("question", "answer"))
LABEL_COLUMNS = ("label", "labels", "class_index", "class", "intent", "y")
SCORE_COLUMNS = ("score", "similarity")
_ROLES: Mapping[str, tuple[str, ...]] = {
    "ids": ("input_ids", "ids", "tokens", "input_word_ids", "token_ids", "input"),
    "mask": ("attention_mask", "input_mask", "mask"),
    "types": ("token_type_ids", "segment_ids", "input_type_ids"),
    "positions": ("position_ids",),
    "offsets": ("offsets",),
}


@dataclass(frozen=True)
class TextTable:
    """A text file read anew, line by line, at each pass. Atoms are lines. `roles`: what fills each input;
    `pad_to`: a fixed length.
    """

    path: str
    tokenizer: str
    roles: tuple[tuple[str, str, np.dtype[np.generic]], ...]
    text_columns: tuple[str, ...]
    separate: bool
    classes: tuple[int | float, ...] | None
    tags: tuple[str, ...] | None
    n: int
    max_length: int
    pad_to: int | None
    stackable: bool = True

    @property
    def where(self) -> str:
        """The path."""
        return self.path

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(name for name, _, _ in self.roles)

    @property
    def has_labels(self) -> bool:
        """True if there is a label or score column."""
        return self.classes is not None

    @property
    def rows_per_sample(self) -> int:
        """2 where each sentence of a pair is its own row."""
        return 2 if self.separate else 1

    def sizes(self) -> npt.NDArray[np.int64]:
        """One sample a line."""
        return np.ones(self.n, np.int64)

    def labels(self, atoms: Sequence[int]) -> Array | None:
        """Class numbers (int64) or scores (float64)."""
        return None if self.classes is None else np.array([self.classes[a] for a in atoms])

    def read(self, groups: Sequence[tuple[int, ...]]) -> Iterator[Piece]:
        """Tokenise one batch a group."""
        encode = _encoder(Path(self.tokenizer), self.max_length)
        waiting: dict[int, tuple[str, ...]] = {}
        wanted = {a for g in groups for a in g}
        stream = enumerate(_texts(Path(self.path), self.text_columns))
        for group in groups:
            while any(a not in waiting for a in group):
                try:
                    atom, fields = next(stream)
                except StopIteration:
                    raise DataError(f"{self.path} has fewer lines than when it was opened; it was changed") from None
                if atom in wanted:
                    waiting[atom] = fields
            lines = [waiting.pop(a) for a in group]
            rows = [(f,) for fields in lines for f in fields] if self.separate else lines
            yield Piece(_name(group), self._feeds([encode(row) for row in rows]), self.labels(group))

    def _feeds(self, encoded: list[tuple[list[int], list[int], int]]) -> Feeds:
        width = self.pad_to or max(1, *(len(ids) for ids, _, _ in encoded))
        ids = np.full((len(encoded), width), encoded[0][2], np.int64)
        types = np.zeros((len(encoded), width), np.int64)
        mask = np.zeros((len(encoded), width), np.int64)
        for i, (row, kinds, _) in enumerate(encoded):
            ids[i, : len(row)], types[i, : len(row)], mask[i, : len(row)] = row, kinds, 1
        lengths = [len(row) for row, _, _ in encoded]
        made: dict[str, npt.NDArray[np.int64]] = {
            "ids": ids,
            "mask": mask,
            "types": types,
            "positions": np.broadcast_to(np.arange(width, dtype=np.int64), ids.shape).copy(),
            "flat": np.array([t for row, _, _ in encoded for t in row], np.int64),
            "offsets": np.cumsum([0, *lengths[:-1]], dtype=np.int64),
        }
        return {name: made[role].astype(dtype) for name, role, dtype in self.roles}


def _name(group: tuple[int, ...]) -> str:
    return f"of line {group[0]}" if len(group) == 1 else f"of lines {group[0]}..{group[-1]}"


def _texts(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if not columns:
        yield from ((text,) for _, text in tables.lines(path))
    else:
        yield from (tuple(row[c] for c in columns) for _, row in tables.rows(path))


def _encoder(path: Path, max_length: int) -> Any:
    """A function from one or two texts to (ids, type ids, id of padding). Raises MissingExtraError, DataError."""
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        raise MissingExtraError("text data needs the package 'tokenizers'; install featherweight[text]") from e
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises plain Exception for whatever its file holds
        raise DataError(f"{path} is not a tokenizer.json ({e})") from e
    padding = tokenizer.padding
    candidates = (
        [padding["pad_id"]]
        if padding
        else [tokenizer.token_to_id(t) for t in ("[PAD]", "<pad>", "<|endoftext|>", "</s>")]
    )
    pad = next((c for c in candidates if c is not None), 0)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)

    def encode(row: tuple[str, ...]) -> tuple[list[int], list[int], int]:
        found = tokenizer.encode(row[0], row[1] if len(row) > 1 else None)
        return found.ids or [pad], found.type_ids or [0], pad

    return encode


def open_text(
    path: Path,
    inputs: Sequence[InputSpec],
    *,
    tokenizer: Path | None,
    batch_size: int = 1,
    labels: str | bool = True,
    columns: Mapping[str, str] | None = None,
    class_names: Sequence[str] | None = None,
    max_length: int = 128,
) -> Dataset:
    """The dataset of a `.tsv`, `.csv` or `.txt` file (one text a line).

    `columns` maps text, text2, label, score or split to the file's column names. Raises DataError: no
    tokenizer, missing columns,
    bytes that are not UTF-8, inputs that text cannot fill; MissingExtraError without the package tokenizers.
    """
    if tokenizer is None:
        raise DataError(f"{path} is text, which needs the model's tokenizer: give the path of its tokenizer.json")
    if max_length < 1:
        raise DataError(f"max_length must be >= 1 token, but got {max_length}")
    named = dict(columns or {})
    notes: list[Note] = []
    roles, pad_to = _roles(inputs)
    found = _Columns.of(path, named, labels)
    words, tags, n = _scan(path, found)
    if n == 0:
        raise DataError(f"calibration data is empty: {path} has no rows")
    separate = len(found.texts) == 2 and found.scored
    if len(found.texts) == 2:
        kind = (
            "two rows of the batch each (a score follows)"
            if separate
            else "one row each, as a classifier of pairs takes them"
        )
        notes.append(Note(str(path), f"pairs of {found.texts[0]!r} and {found.texts[1]!r} are {kind}"))
    rows = inputs[0].rows if not any(role == "flat" for _, role, _ in roles) else None
    if separate and rows is not None and rows % 2:
        raise DataError(
            f"pairs need an even number of rows a call, but the model takes {rows}; export it with an open batch axis"
        )
    classes = None if words is None else number_labels(words, class_names, str(path), notes)
    size = (rows // 2 if separate else rows) if rows is not None else batch_size
    _encoder(tokenizer, max_length)  # fails now rather than after other work
    origin = TextTable(
        str(path),
        str(tokenizer),
        roles,
        found.texts,
        separate,
        classes,
        tags,
        n,
        min(max_length, pad_to or max_length),
        pad_to,
    )
    groups = tagged_groups(n, tags, size, full=rows is not None, where=str(path), notes=notes)
    return Dataset(origin, groups, size, rows is not None, tuple((i.name, i.dtype) for i in inputs), tuple(notes))


def _roles(inputs: Sequence[InputSpec]) -> tuple[tuple[tuple[str, str, np.dtype[np.generic]], ...], int | None]:
    """What fills each input, and the length if the model fixes it. Raises DataError for inputs that text
    cannot fill.
    """
    roles = []
    for spec in inputs:
        plain = spec.name.lower().split(":")[0].split(".")[-1]
        role = next((r for r, names in _ROLES.items() if plain in names), None)
        if role is None and len(inputs) == 1 and spec.dtype.kind in "iu":
            role = "ids"
        if role is None:
            known = ", ".join(names[0] for names in _ROLES.values())
            raise DataError(
                f"text cannot fill the model's input {spec.name!r} (known: {known}); give an .npz or a function instead"
            )
        roles.append((spec.name, role, spec.dtype))
    if any(r == "offsets" for _, r, _ in roles):
        roles = [(n, "flat" if r == "ids" else r, d) for n, r, d in roles]
        return tuple(roles), None
    shape = next((i.shape for i, (_, r, _) in zip(inputs, roles, strict=True) if r == "ids"), None)
    if shape is not None and len(shape) != 2:
        raise DataError(
            f"text needs ids of rank 2 (batch, length), but the model's have shape {shape}; give an "
            ".npz or a function instead"
        )
    length = shape[1] if shape else None
    return tuple(roles), length if isinstance(length, int) else None


@dataclass(frozen=True)
class _Columns:
    """Which columns of the table are used."""

    texts: tuple[str, ...]
    label: str | None
    split: str | None
    scored: bool

    @classmethod
    def of(cls, path: Path, named: Mapping[str, str], labels: str | bool) -> _Columns:
        if path.suffix.lower() == ".txt":
            return cls((), None, None, False)
        header = tables.header(path)
        for column in named.values():
            tables.column(header, (column,), path)
        if "text" in named:
            texts = (named["text"], named["text2"]) if "text2" in named else (named["text"],)
        else:
            pair = next((p for p in PAIR_COLUMNS if set(p) <= set(header)), None)
            texts = pair or (
                tables.column(header, TEXT_COLUMNS[:1] if not set(TEXT_COLUMNS) & set(header) else TEXT_COLUMNS, path),
            )
        usual = (
            (named["score"],)
            if "score" in named
            else (named["label"],)
            if "label" in named
            else (*SCORE_COLUMNS, *LABEL_COLUMNS)
        )
        label = tables.labels_column(header, usual, labels, path)
        scored = label is not None and (label in SCORE_COLUMNS or label == named.get("score"))
        split = named.get("split") or next((c for c in SPLIT_COLUMNS if c in header), None)
        return cls(texts, label, split, scored)


def _scan(path: Path, found: _Columns) -> tuple[list[str] | None, tuple[str, ...] | None, int]:
    """Labels, split tags and the number of rows; one pass."""
    if not found.texts:
        return None, None, sum(1 for _ in tables.lines(path))
    words: list[str] = []
    tags: list[str] = []
    n = 0
    for line, row in tables.rows(path):
        n += 1
        if found.label is not None:
            word = row[found.label].strip()
            if not word:
                raise DataError(f"{path} line {line}: {found.label!r} is empty; fill it, or give labels=False")
            words.append(word)
        if found.split is not None:
            tag = tag_of(row[found.split])
            if tag is None:
                raise DataError(f"{path} line {line}: {found.split} is {row[found.split]!r}; use {split_words()}")
            tags.append(tag)
    return words if found.label is not None else None, tuple(tags) if found.split is not None else None, n
