"""Reports as JSON: report.json of a run folder, and what every command prints with --json. See docs/formats.md.

Numbers that are not finite become null: JSON has no word for them, and readers differ in what they make of NaN.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from featherweight.core import Attempt, Budget, Interval, Measurement, Note, Plan, Report
from featherweight.errors import PlanError
from featherweight.whole import write_text

SCHEMA = 1


def plain(value: Any) -> Any:
    """`value` as JSON-able objects: dataclasses become objects, tuples lists, numpy scalars and arrays plain numbers.

    Raises:
        TypeError: a value of another kind; never turned into its repr.
    """
    if isinstance(value, Plan):
        return json.loads(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy, without importing it
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form here: {value!r}")


def document(kind: str, content: Mapping[str, Any]) -> str:
    """One JSON document with its schema, kind and the version that wrote it."""
    head = {"schema": SCHEMA, "kind": kind, "featherweight": _version()}
    return json.dumps({**head, **plain(content)}, indent=1, allow_nan=False) + "\n"


def to_json(report: Report) -> str:
    """Text of report.json."""
    derived = {"ok": report.ok, "size_ratio": report.size_ratio, "violations": report.violations}
    fields = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    return document("report", {**derived, **fields})


def from_json(text: str) -> Report:
    """Read `to_json`'s text; facts and layers come back as plain objects. Raises PlanError naming what is wrong."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise PlanError(f"the report is not JSON: {e}") from e
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA or raw.get("kind") != "report":
        found = (raw.get("kind"), raw.get("schema")) if isinstance(raw, dict) else type(raw).__name__
        raise PlanError(f"a report must have kind 'report' and schema {SCHEMA}, but got {found!r}")
    try:
        return Report(
            Budget(**raw["budget"]),
            raw["answer"],
            raw["outcome"],
            raw["reason"],
            _plan(raw["plan"]),
            _measurement(raw["baseline"]),
            _measurement(raw["result"]),
            tuple(_attempt(a) for a in raw["attempts"]),
            tuple(_attempt(a) for a in raw["front"]),
            tuple(Note(**n) for n in raw["notes"]),
            tuple(raw["layers"]),
            raw["facts"],
        )
    except (KeyError, TypeError, AttributeError) as e:
        raise PlanError(f"the report is malformed: {type(e).__name__} {e}") from e


def write(report: Report, path: Path) -> None:
    """Write report.json whole or not at all. Raises OutputError."""
    write_text(to_json(report), path)


def read(path: Path) -> Report:
    """Read report.json. Raises PlanError if it cannot be read or is malformed."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise PlanError(f"the report {path} cannot be read: {e}") from e


def _measurement(raw: Mapping[str, Any]) -> Measurement:
    fields = dict(raw)
    interval = fields.pop("drop_interval", None)
    return Measurement(**fields, drop_interval=None if interval is None else Interval(**interval))


def _attempt(raw: Mapping[str, Any]) -> Attempt:
    measured = None if raw["measured"] is None else _measurement(raw["measured"])
    return Attempt(raw["index"], _plan(raw["plan"]), measured, raw["error"], raw["seconds"])


def _plan(raw: Any) -> Plan:
    return Plan.from_json(json.dumps(raw))


def _version() -> str:
    try:
        return version("featherweight")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
