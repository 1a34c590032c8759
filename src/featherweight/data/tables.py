"""Comma- and tab-separated tables, read row by row as UTF-8."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from featherweight.errors import DataError


def _reader(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each row. `.csv` may quote; `.tsv` is cut at tabs and never quotes; `.txt` is
    one field a line.
    """
    suffix = path.suffix.lower()
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as f:
            if suffix == ".csv":
                reader = csv.reader(f, strict=True)
                for row in reader:
                    line = reader.line_num
                    if row:
                        yield line, row
            else:
                for line, text in enumerate(f, start=1):
                    text = text.rstrip("\n")
                    if text.strip():
                        yield line, text.split("\t") if suffix == ".tsv" else [text]
    except UnicodeDecodeError as e:
        raise DataError(
            f"{path} is not UTF-8 (byte {e.object[e.start]:#04x} after line {line}); convert it, e.g. "
            "iconv -f LATIN1 -t UTF-8"
        ) from e
    except (csv.Error, OSError) as e:
        raise DataError(f"{path} cannot be read after line {line} ({e})") from e


def header(path: Path) -> list[str]:
    """Column names. Raises DataError if there are none or one is there twice."""
    first = next(_reader(path), None)
    if first is None:
        raise DataError(f"calibration data is empty: {path} has no lines")
    names = [c.strip() for c in first[1]]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise DataError(f"{path} has the column {twice!r} twice; rename one")
    return names


def rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, {column: text}) of each row after the header. Raises DataError where a row has another width."""
    names = header(path)
    reader = _reader(path)
    next(reader)
    for line, fields in reader:
        if len(fields) != len(names):
            raise DataError(
                f"{path} line {line} has {len(fields)} fields, but the header has {len(names)}; mend the line"
            )
        yield line, dict(zip(names, fields, strict=True))


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of each line that is not empty."""
    for line, fields in _reader(path):
        yield line, fields[0]


def column(header: Sequence[str], names: Sequence[str], path: Path) -> str:
    """The first of `names` that is a column. Raises DataError with the columns there are and a near match."""
    found = next((n for n in names if n in header), None)
    if found is not None:
        return found
    near = [m for n in names for m in difflib.get_close_matches(n, header, n=1, cutoff=0.6)]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"{path} has no column {' or '.join(names)}; its columns are {list(header)}{hint}")


def labels_column(header: Sequence[str], usual: Sequence[str], labels: str | bool, path: Path) -> str | None:
    """The column of labels: a given one, the first usual one, or None."""
    if labels is False:
        return None
    if labels is True:
        return next((n for n in usual if n in header), None)
    return column(header, (labels,), path)
