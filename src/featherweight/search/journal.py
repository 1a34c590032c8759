"""The run's memory: an SQLite file that survives kill -9, so that `--resume` repeats nothing already measured.

Tables: `meta` (what was asked; a resumed run must ask the same), `phases` (finished steps and their results as
JSON), `attempts` (every candidate built and measured, keyed by the hash of its plan). Format: docs/formats.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from featherweight.core import Attempt, Interval, Measurement, Plan
from featherweight.errors import OutputError, PlanError

SCHEMA = 1


class Journal:
    """Opened with `Journal(path, asked, resume=...)`; every write is one committed transaction."""

    def __init__(self, path: Path, asked: Mapping[str, Any], *, resume: bool) -> None:
        """Open or create. Raises OutputError if the run folder holds another run, or an unreadable journal."""
        self.path = path
        if path.exists() and not resume:
            raise OutputError(f"{path.parent} already holds a run; continue it with --resume, or name another folder")
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            for table in ("meta", "phases"):
                self._db.execute(f"CREATE TABLE IF NOT EXISTS {table} (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS attempts (plan_sha256 TEXT PRIMARY KEY, number INTEGER, plan TEXT NOT NULL,"
                " measured TEXT, error TEXT NOT NULL, seconds REAL NOT NULL)"
            )
            self._check_asked(asked)
        except sqlite3.Error as e:
            raise OutputError(f"the journal {path} cannot be used ({e}); delete the folder or name another one") from e

    def _check_asked(self, asked: Mapping[str, Any]) -> None:
        """Record what this run was asked, or compare with what the interrupted run was asked."""
        wanted = json.dumps({"schema": SCHEMA, **asked}, sort_keys=True)
        row = self._db.execute("SELECT value FROM meta WHERE key='asked'").fetchone()
        if row is None:
            self._db.execute("INSERT INTO meta VALUES ('asked', ?)", (wanted,))
            return
        before, now = json.loads(row[0]), json.loads(wanted)
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        if changed:
            what = "; ".join(f"{k}: was {before.get(k)!r}, now {now.get(k)!r}" for k in changed)
            raise OutputError(
                f"--resume needs the same request as the interrupted run in {self.path.parent}, but {what}"
            )

    def phase(self, name: str, compute: Callable[[], Any]) -> Any:
        """Result of a named step, JSON-able: read back if it finished before, else computed and recorded."""
        row = self._db.execute("SELECT value FROM phases WHERE key=?", (name,)).fetchone()
        if row is not None:
            return json.loads(row[0])
        value = compute()
        text = json.dumps(value)
        self._db.execute("INSERT OR REPLACE INTO phases VALUES (?, ?)", (name, text))
        return json.loads(text)

    def finished(self, name: str) -> bool:
        """True if the named step was recorded."""
        return self._db.execute("SELECT 1 FROM phases WHERE key=?", (name,)).fetchone() is not None

    def record(self, attempt: Attempt) -> None:
        """Add one attempt (replacing an earlier one of the same plan)."""
        text = attempt.plan.to_json()
        measured = None if attempt.measured is None else json.dumps(dataclasses.asdict(attempt.measured))
        row = (plan_key(attempt.plan), attempt.index, text, measured, attempt.error, attempt.seconds)
        self._db.execute("INSERT OR REPLACE INTO attempts VALUES (?, ?, ?, ?, ?, ?)", row)

    def find(self, plan: Plan) -> Attempt | None:
        """The attempt already made with this plan's decisions, or None."""
        query = "SELECT number, plan, measured, error, seconds FROM attempts WHERE plan_sha256=?"
        row = self._db.execute(query, (plan_key(plan),)).fetchone()
        return None if row is None else _attempt(row)

    def attempts(self) -> list[Attempt]:
        """All attempts in the order they were made."""
        rows = self._db.execute("SELECT number, plan, measured, error, seconds FROM attempts ORDER BY number")
        return [_attempt(row) for row in rows.fetchall()]

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def plan_key(plan: Plan) -> str:
    """Hash of the decisions alone: predictions may differ, the model built is the same."""
    bare = dataclasses.replace(plan, predicted=type(plan.predicted)(), gap=None, bound_bytes=None)
    return hashlib.sha256(bare.to_json().encode()).hexdigest()


def measurement_from(raw: Mapping[str, Any]) -> Measurement:
    """Read back a Measurement written as a plain dict. Raises PlanError on unknown or missing fields."""
    fields = dict(raw)
    if fields.get("drop_interval") is not None:
        fields["drop_interval"] = Interval(**fields["drop_interval"])
    try:
        return Measurement(**fields)
    except TypeError as e:
        raise PlanError(f"a recorded measurement is malformed: {e}") from e


def _attempt(row: tuple[int, str, str | None, str, float]) -> Attempt:
    number, plan, measured, error, seconds = row
    m = None if measured is None else measurement_from(json.loads(measured))
    return Attempt(number, Plan.from_json(plan), m, error, seconds)
