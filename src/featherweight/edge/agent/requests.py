"""What a client asks of the agent, read strictly: every field known, of its type, within its bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from featherweight.edge.agent.store import SHA256
from featherweight.edge.http import RequestError

Kind = Literal["outputs", "latency", "memory", "score"]
METRICS = ("accuracy", "top5", "agreement", "cosine", "kl", "sqnr")
MAX_FEEDS, MAX_BESIDE, MAX_NAMES, MAX_THREADS = 256, 64, 256, 1024
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. +=@,-]{0,199}")
_ID = re.compile(r"[0-9a-f]{32}")
_FIELDS: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "outputs": (("model", "feeds"), ("outputs",)),
    "latency": (("original", "candidate", "feeds"), ("time_limit_s",)),
    "memory": (("model", "feeds"), ()),
    "score": (("model", "data", "metric"), ("original",)),
}
_COMMON = ("id", "threads", "timeout_s")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model file, and the files with its weights by the names it calls them."""

    file: str
    beside: tuple[tuple[str, str], ...] = ()

    def hashes(self) -> tuple[str, ...]:
        """Of all files."""
        return (self.file, *(sha256 for _, sha256 in self.beside))


@dataclass(frozen=True, slots=True)
class Asked:
    """One job as asked for."""

    kind: Kind
    models: tuple[tuple[str, ModelFiles], ...]
    feeds: tuple[str, ...]
    threads: int
    timeout_s: float
    id: str | None = None
    outputs: tuple[str, ...] | None = None
    time_limit_s: float = 20.0
    metric: str = ""

    def hashes(self) -> tuple[str, ...]:
        """Of all files the job needs."""
        return (*(h for _, model in self.models for h in model.hashes()), *self.feeds)


def read_job(raw: Any, *, max_seconds: float) -> Asked:
    """The job in a JSON value. Raises RequestError(422) naming the field, what it must be, and what it is."""
    if not isinstance(raw, dict):
        raise _wrong("the body", "an object", raw)
    kind: Any = raw.get("kind")
    if kind not in get_args(Kind):
        raise _wrong("kind", f"one of {', '.join(get_args(Kind))}", kind)
    needed, optional = _FIELDS[kind]
    unknown = sorted(set(raw) - {"kind", *needed, *optional, *_COMMON})
    if unknown:
        raise RequestError(422, f"a job of kind {kind} has no field {str(unknown[0])[:80]!r}")
    for name in needed:
        if name not in raw:
            raise RequestError(422, f"a job of kind {kind} needs the field {name!r}")
    models = tuple((n, _model(n, raw[n])) for n in ("model", "original", "candidate") if n in raw)
    feeds = (_hash("data", raw["data"]),) if kind == "score" else _list("feeds", raw["feeds"], MAX_FEEDS, _hash)
    return Asked(
        kind,
        models,
        feeds,
        threads=_whole("threads", raw.get("threads", 1), MAX_THREADS),
        timeout_s=_seconds("timeout_s", raw.get("timeout_s", max_seconds), max_seconds),
        id=_matching("id", raw["id"], _ID, "32 hexadecimal digits") if "id" in raw else None,
        outputs=_list("outputs", raw["outputs"], MAX_NAMES, _text) if "outputs" in raw else None,
        time_limit_s=_seconds("time_limit_s", raw.get("time_limit_s", min(20.0, max_seconds)), max_seconds),
        metric=_metric(raw["metric"]) if kind == "score" else "",
    )


def _model(field: str, raw: Any) -> ModelFiles:
    if not isinstance(raw, dict) or not {"file"} <= set(raw) <= {"file", "beside"}:
        raise _wrong(field, "an object with 'file' and perhaps 'beside'", raw)
    beside = raw.get("beside", {})
    if not isinstance(beside, dict) or len(beside) > MAX_BESIDE:
        raise _wrong(f"{field}.beside", f"an object of at most {MAX_BESIDE} file names and hashes", beside)
    files = tuple((_safe_name(f"{field}.beside", name), _hash(f"{field}.beside", h)) for name, h in beside.items())
    return ModelFiles(_hash(f"{field}.file", raw["file"]), files)


def _safe_name(field: str, name: str) -> str:
    """A relative name that stays in its folder and is not the model's own."""
    parts = name.split("/")
    if len(parts) > 4 or name == "model.onnx" or not all(_NAME.fullmatch(part) for part in parts):
        raise _wrong(field, "plain file names, at most three folders deep, without leading dots", name)
    return name


def _hash(field: str, value: Any) -> str:
    return _matching(field, value, SHA256, "a SHA-256 in 64 lower-case hexadecimal digits")


def _matching(field: str, value: Any, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _wrong(field, what, value)
    return value


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 1000:
        raise _wrong(field, "names of 1 to 1000 characters", value)
    return value


def _metric(value: Any) -> str:
    """Built-in ones only: a `module:function` would run code of the device's."""
    if value not in METRICS:
        raise _wrong("metric", f"one of {', '.join(METRICS)}", value)
    return str(value)


def _list(field: str, value: Any, most: int, read: Callable[[str, Any], str]) -> tuple[str, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= most:
        raise _wrong(field, f"a list of 1 to {most}", value)
    return tuple(read(field, v) for v in value)


def _whole(field: str, value: Any, most: int) -> int:
    if isinstance(value, float) and value.is_integer():  # 2.0 is a whole number in JSON
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise _wrong(field, f"a whole number from 1 to {most}", value)
    return value


def _seconds(field: str, value: Any, most: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 < value <= most
    if not good:
        raise _wrong(field, f"seconds, more than 0 and at most {most:g}", value)
    return float(value)


def _wrong(field: str, law: str, value: Any) -> RequestError:
    shown = f"an object of {len(value)}" if isinstance(value, Mapping) else repr(value)[:80]
    return RequestError(422, f"{field} must be {law}, but is {shown}")
