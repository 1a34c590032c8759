"""Profiles as JSON text: every field checked, each refusal says which and what it must be (docs/formats.md)."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from featherweight.device import Kernel, Profile, Source
from featherweight.errors import DataError

PROFILE_SCHEMA = 2
OLDEST_SCHEMA = 1
PRECISIONS = ("float32", "float16", "int8", "int4")
MAX_KERNELS = 20_000
LEAST_US = 1e-6
KERNEL_DIMS = {"matmul": 3, "conv1x1": 3, "conv": 5, "conv_first": 5, "conv_plain": 5, "depthwise": 4, "attention": 4,
               "lstm": 4, "gru": 4, "softmax": 2, "layernorm": 2, "gather": 2}  # fmt: skip
"""Kinds of kernels with several dims; all others have one, the elements."""
_SCHEMA_1 = ("name", "arch", "threads", "memory_bytes", "int8_dot", "cpu_flags", "provider", "measured")
_REQUIRED = ("name", "arch", "threads", "memory_bytes", "int8_dot")


def to_json(profile: Profile) -> str:
    """Canonical JSON text of a profile, a kernel a line, without what is not known; `profile_from_json` reads it."""
    raw: dict[str, Any] = {"schema": PROFILE_SCHEMA}
    for f in fields(Profile):
        value = getattr(profile, f.name)
        if f.name in _SCHEMA_1 or value not in (None, "", (), {}):
            raw[f.name] = dict(value) if isinstance(value, Mapping) else value
    lists = {name: raw.pop(name) for name in ("kernels", "sources") if name in raw}
    text = json.dumps(raw, indent=1, sort_keys=True)
    for name, rows in lists.items():
        inner = ",\n  ".join(json.dumps(row) for row in rows)
        text = f'{text[:-2]},\n "{name}": [\n  {inner}\n ]\n}}'
    return text + "\n"


def profile_from_json(text: str, *, where: str = "the profile") -> Profile:
    """Read `to_json`'s text, of this schema or an older one.

    Raises DataError naming `where`, the field and what it must be.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where} must be JSON, but is not: {e}") from e
    if not isinstance(raw, dict):
        raise DataError(f"{where} must be a JSON object, but is a {type(raw).__name__}")
    schema = raw.get("schema")
    if isinstance(schema, bool) or not isinstance(schema, int) or not OLDEST_SCHEMA <= schema <= PROFILE_SCHEMA:
        raise DataError(f"{where}: schema must be {OLDEST_SCHEMA} to {PROFILE_SCHEMA}, but got {schema!r}")
    known = _SCHEMA_1 if schema == 1 else tuple(f.name for f in fields(Profile))
    values = {k: v for k, v in raw.items() if k != "schema"}
    unknown = sorted(set(values) - set(known))
    missing = [name for name in _REQUIRED if name not in values]
    if unknown or missing:
        raise DataError(f"{where}: fields must be {sorted(known)}, but {unknown=} and {missing=}")
    profile = Profile(**{name: _read(where, name, value) for name, value in values.items()})
    for kernel in profile.kernels:
        count = KERNEL_DIMS.get(kernel.kind, 1)
        if len(kernel.dims) != count:
            raise DataError(f"{where}: a kernel of kind {kernel.kind} has {count} dims, but got {list(kernel.dims)}")
    return profile


def _read(where: str, name: str, value: Any) -> Any:
    """The field's value in the form Profile holds it."""
    good, words, make = _FIELDS[name]
    if not good(value):
        shown = repr(value)
        raise DataError(
            f"{where}: {name} must be {words}, but got {shown if len(shown) < 200 else shown[:200] + '...'}"
        )
    return make(value)


def _number(value: Any, least: float = 0.0, *, above: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e18:
        return False
    return math.isfinite(value) and (value > least if above else value >= least)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 60


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _date(value: Any) -> bool:
    if not isinstance(value, str) or len(value) != 10:
        return False
    try:
        datetime.date.fromisoformat(value)
    except ValueError:
        return False
    return True


def _rates(value: Any) -> bool:
    return isinstance(value, dict) and all(k in PRECISIONS and _number(v, above=True) for k, v in value.items())


def _scaling(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(p, list) and len(p) == 2 and _whole(p[0]) and _number(p[1], above=True) for p in value
    )


def _kernels(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_KERNELS and all(map(_kernel, value))


def _kernel(row: Any) -> bool:
    return (
        isinstance(row, list)
        and len(row) == 4
        and _text(row[0])
        and _text(row[1])
        and isinstance(row[2], list)
        and 1 <= len(row[2]) <= 8
        and all(map(_whole, row[2]))
        and _number(row[3], LEAST_US)
    )


def _sources(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(s, list) and len(s) == 3 and all(map(_text, s)) and _date(s[2]) for s in value
    )


_Field = tuple[Callable[[Any], bool], str, Callable[[Any], Any]]


def _same(value: Any) -> Any:
    return value


_TEXT: _Field = (_text, "a text", _same)
_WHOLE: _Field = (_whole, "a whole number >= 1", _same)
_BOOL: _Field = (lambda v: isinstance(v, bool), "true or false", _same)
_DATE: _Field = (_date, "a date YYYY-MM-DD", _same)
_NOT_NEGATIVE: _Field = (_number, "a number >= 0", float)
_POSITIVE: _Field = (lambda v: _number(v, above=True), "a number > 0", float)
_FIELDS: dict[str, _Field] = {
    **dict.fromkeys(("name", "arch", "provider", "description", "cpu", "currency"), _TEXT),
    **dict.fromkeys(("threads", "memory_bytes", "cores", "storage_bytes", "runtime_bytes"), _WHOLE),
    **dict.fromkeys(("int8_dot", "measured", "onnxruntime"), _BOOL),
    **dict.fromkeys(("call_us", "node_us", "idle_w", "busy_w", "price"), _NOT_NEGATIVE),
    **dict.fromkeys(("price_date", "date"), _DATE),
    "memory_gb_per_s": _POSITIVE,
    "cpu_flags": (lambda v: isinstance(v, list) and all(map(_text, v)), "a list of texts", tuple),
    "rates": (
        _rates,
        f"an object of numbers > 0 (GMAC/s) for {', '.join(PRECISIONS)}",
        lambda v: {k: float(r) for k, r in v.items()},
    ),
    "thread_scaling": (
        _scaling,
        "a list of pairs [threads >= 1, speed > 0]",
        lambda v: tuple((int(n), float(s)) for n, s in v),
    ),
    "kernels": (
        _kernels,
        f"a list of at most {MAX_KERNELS} rows [kind, precision, [dims >= 1], us >= {LEAST_US:g}]",
        lambda v: tuple(Kernel(k, p, tuple(d), float(us)) for k, p, d, us in v),
    ),
    "sources": (_sources, "a list of rows [keys, where, YYYY-MM-DD]", lambda v: tuple(Source(*s) for s in v)),
}
