"""Fields of JSON files from strangers, read one by one; each refusal names the file, the field and the law."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from featherweight.errors import DataError

MAX_FILE_BYTES = 1 << 20
_LARGEST = 1e15


class Source(NamedTuple):
    """Where figures are from: the `fields` (space between), an address or "assumed: why", and when it was read."""

    fields: str
    where: str
    date: str


def read_object(path: Path, *, what: str) -> dict[str, Any]:
    """The JSON object in a file. Raises DataError where it is missing, too large, not JSON or not an object."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{what} must be at most {MAX_FILE_BYTES} B, but {path} has {path.stat().st_size} B")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{what} {path} cannot be read: {e}") from e
    return parse_object(text, where=str(path))


def parse_object(text: str, *, where: str) -> dict[str, Any]:
    """The JSON object in a text. Raises DataError."""
    try:
        raw = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where} must be JSON, but is not: {e}") from e
    if not isinstance(raw, dict):
        raise DataError(f"{where} must be a JSON object, but is a {type(raw).__name__}")
    return raw


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


class Fields:
    """One object being read; `done` refuses what was not asked for."""

    def __init__(self, raw: Any, where: str) -> None:
        """`where` begins each message."""
        if not isinstance(raw, Mapping):
            raise DataError(f"{where} must be an object, but is {_short(raw)}")
        self._raw = dict(raw)
        self._where = where
        self._asked: set[str] = set()

    def has(self, name: str) -> bool:
        """True if the field is there."""
        return name in self._raw

    def _get(self, name: str, default: Any) -> Any:
        self._asked.add(name)
        if name in self._raw:
            return self._raw[name]
        if default is _NEEDED:
            raise DataError(f"{self._where}: {name} is needed, but absent")
        return default

    def number(self, name: str, default: Any = ..., *, least: float = 0.0, most: float = _LARGEST) -> float:
        """A finite number from `least` to `most`."""
        value = self._get(name, _NEEDED if default is ... else default)
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not least <= value <= most:
            raise DataError(
                f"{self._where}: {name} must be a number from {least:g} to {most:g}, but got {_short(value)}"
            )
        return float(value)

    def positive(self, name: str, default: Any = ...) -> float:
        """A finite number above 0."""
        value = self.number(name, default)
        if not value > 0:
            raise DataError(f"{self._where}: {name} must be a number above 0, but got {_short(value)}")
        return value

    def whole(self, name: str, default: Any = ...) -> int:
        """A whole number, at least 1."""
        value = self._get(name, _NEEDED if default is ... else default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 40:
            raise DataError(f"{self._where}: {name} must be a whole number >= 1, but got {_short(value)}")
        return value

    def text(self, name: str, default: Any = ..., *, among: Iterable[str] = ()) -> str:
        """A text, one of `among` if given."""
        value = self._get(name, _NEEDED if default is ... else default)
        allowed = sorted(among)
        if not isinstance(value, str) or len(value) > 500 or (allowed and value not in allowed):
            law = f"one of {', '.join(allowed)}" if allowed else "a text"
            raise DataError(f"{self._where}: {name} must be {law}, but got {_short(value)}")
        return value

    def flag(self, name: str, default: Any = ...) -> bool:
        """True or false."""
        value = self._get(name, _NEEDED if default is ... else default)
        if not isinstance(value, bool):
            raise DataError(f"{self._where}: {name} must be true or false, but got {_short(value)}")
        return value

    def raw(self, name: str, default: Any = ...) -> Any:
        """The value as it is."""
        return self._get(name, _NEEDED if default is ... else default)

    def sources(self) -> tuple[Source, ...]:
        """The rows [fields, where, date]."""
        rows = self._get("sources", [])
        if not isinstance(rows, list) or not all(map(_is_source, rows)):
            raise DataError(
                f"{self._where}: sources must be a list of rows [fields, where, YYYY-MM-DD], but got {_short(rows)}"
            )
        return tuple(Source(*row) for row in rows)

    def schema(self, kind: str, version: int) -> None:
        """Refuse a file of another kind or version."""
        found = (self._get("kind", None), self._get("schema", None))
        if found != (kind, version):
            raise DataError(f"{self._where}: kind and schema must be {kind!r} and {version}, but got {found}")

    def done(self) -> None:
        """Refuse fields nobody asked for: a misspelt name would else be a silent default."""
        unknown = sorted(set(self._raw) - self._asked)
        if unknown:
            raise DataError(f"{self._where}: fields must be among {sorted(self._asked)}, but got {unknown}")


_NEEDED: Any = object()


def _is_source(row: Any) -> bool:
    if not (isinstance(row, list) and len(row) == 3 and all(isinstance(v, str) for v in row)):
        return False
    try:
        datetime.date.fromisoformat(row[2])
    except ValueError:
        return False
    return True


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
