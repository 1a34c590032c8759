"""Networks between device and server: presets, what people write for one, and how long a transfer takes.

One call on an open connection takes  rtt + up + down, each of up and down being the time to push the bytes through:
a window of 10 segments (RFC 6928) doubles each round trip until it fills the link (slow start, as after idling), from
then on the link's rate holds. A transfer so long that a loss is to be expected goes at no more than what losses leave,
1.22 * segment / (rtt * sqrt(loss))  (Mathis 1997). A call with a lost segment waits one round trip more. Outages are no
latency: they are calls that get no answer.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from featherweight.edge import _checked
from featherweight.edge._checked import Fields, Source
from featherweight.errors import DataError

LINKS_SCHEMA = 1
SEGMENT_BYTES = 1460
FIRST_WINDOW = 10 * SEGMENT_BYTES
_MATHIS = math.sqrt(1.5)


@dataclass(frozen=True, slots=True)
class Link:
    """A network between a device and a server.

    Megabits a second up (to the server) and down; round trip in the mean and at its 95th percentile; `loss` the share
    of segments, `outage` the share of time without connection. `public`: the data leaves the site. The radio's power
    is  watts + watts_per_mbit_up * rate  while sending, likewise down (Huang 2012); 0 for a wire.
    """

    name: str
    up_mbit_s: float
    down_mbit_s: float
    rtt_ms: float
    rtt_p95_ms: float
    loss: float = 0.0
    outage: float = 0.0
    public: bool = True
    radio_w: float = 0.0
    radio_w_per_mbit_up: float = 0.0
    radio_w_per_mbit_down: float = 0.0
    sources: tuple[Source, ...] = ()

    def up_ms(self, nbytes: float) -> float:
        """Milliseconds to push bytes to the server, without the round trip of the call."""
        return push_ms(nbytes, self.up_mbit_s, self.rtt_ms, self.loss)

    def down_ms(self, nbytes: float) -> float:
        """Milliseconds to push bytes to the device, without the round trip of the call."""
        return push_ms(nbytes, self.down_mbit_s, self.rtt_ms, self.loss)

    def resend_ms(self, up_bytes: float, down_bytes: float, *, p95: bool = False) -> float:
        """Waiting for lost segments: in the mean, or what one call in twenty waits at least."""
        segments = sum(math.ceil(b / SEGMENT_BYTES) for b in (up_bytes, down_bytes))
        share = 1.0 - (1.0 - self.loss) ** segments
        if p95:
            return self.rtt_p95_ms if share > 0.05 else 0.0
        return share * self.rtt_ms

    def radio_j(self, up_bytes: float, down_bytes: float) -> float:
        """Joules of the device's radio for one call, while bytes move."""
        up_s, down_s = (8e-6 * up_bytes / self.up_mbit_s, 8e-6 * down_bytes / self.down_mbit_s)
        sending = self.radio_w + self.radio_w_per_mbit_up * self.up_mbit_s
        receiving = self.radio_w + self.radio_w_per_mbit_down * self.down_mbit_s
        return (sending * up_s if self.radio_w else 0.0) + (receiving * down_s if self.radio_w else 0.0)


def push_ms(nbytes: float, mbit_s: float, rtt_ms: float, loss: float = 0.0) -> float:
    """Milliseconds until the last byte is sent, see the module's text."""
    per_ms = mbit_s * 125.0
    if rtt_ms > 0 and nbytes * loss >= SEGMENT_BYTES:
        per_ms = min(per_ms, _MATHIS * SEGMENT_BYTES / (rtt_ms * math.sqrt(loss)))
    left, window, spent = float(nbytes), float(FIRST_WINDOW), 0.0
    while left > window and window < per_ms * rtt_ms:
        left -= window
        window *= 2.0
        spent += rtt_ms
    return spent + left / per_ms


@cache
def presets() -> dict[str, Link]:
    """The shipped links by name."""
    text = (resources.files("featherweight.edge") / "tables" / "links.json").read_text(encoding="utf-8")
    return _read(_checked.parse_object(text, where="the shipped links"), "the shipped links")


def read_links(path: Path) -> dict[str, Link]:
    """Links of a file of the user, by name. Raises DataError naming what is wrong."""
    return _read(_checked.read_object(path, what="a file of links"), str(path))


def _read(raw: dict[str, Any], where: str) -> dict[str, Link]:
    top = Fields(raw, where)
    top.schema("links", LINKS_SCHEMA)
    rows = top.raw("links")
    top.done()
    if not isinstance(rows, list):
        raise DataError(f"{where}: links must be a list, but is a {type(rows).__name__}")
    found = [_link(row, f"{where}, link {i + 1}") for i, row in enumerate(rows)]
    return {link.name: link for link in found}


def _link(raw: Any, where: str) -> Link:
    f = Fields(raw, where)
    rtt = f.number("rtt_ms", most=1e5)
    link = Link(
        name=f.text("name"),
        up_mbit_s=f.positive("up_mbit_s"),
        down_mbit_s=f.positive("down_mbit_s"),
        rtt_ms=rtt,
        rtt_p95_ms=f.number("rtt_p95_ms", 2 * rtt, least=rtt, most=1e6),
        loss=f.number("loss", 0.0, most=0.5),
        outage=f.number("outage", 0.0, most=1.0),
        public=f.flag("public", True),
        radio_w=f.number("radio_w", 0.0, most=1e3),
        radio_w_per_mbit_up=f.number("radio_w_per_mbit_up", 0.0, most=1e3),
        radio_w_per_mbit_down=f.number("radio_w_per_mbit_down", 0.0, most=1e3),
        sources=f.sources(),
    )
    f.done()
    return link


_RATE = re.compile(r"([\d.]+)\s*(k|m|g)?bit(?:/s)?|([\d.]+)\s*(k|m|g)bps", re.IGNORECASE)
_TIME = re.compile(r"([\d.]+)\s*(us|ms|s)", re.IGNORECASE)
_SHARE = re.compile(r"([\d.]+)\s*%?")


def parse_link(text: str, extra: dict[str, Link] | None = None) -> Link:
    """'4g', '4g,rtt=80ms,outage=2%', 'up=5Mbit,down=20Mbit,rtt=40ms', or a .json file with one link.

    Keys: up, down (bit/s with k, M, G), rtt, p95 (of the round trip), loss, outage (shares). Raises DataError.
    """
    parts = [p.strip() for p in text.split(",") if p.strip()]
    known = {**presets(), **(extra or {})}
    if len(parts) == 1 and parts[0].endswith(".json"):
        found = read_links(Path(parts[0]))
        if len(found) != 1:
            raise DataError(f"a file given as a link must hold one link, but {parts[0]} holds {len(found)}")
        return next(iter(found.values()))
    base = None
    if parts and "=" not in parts[0]:
        base = known.get(parts[0].lower())
        if base is None:
            raise DataError(
                f"a link must be one of {', '.join(sorted(known))} or key=value pairs, but got {parts[0]!r}"
            )
        parts = parts[1:]
    changes: dict[str, Any] = {}
    for part in parts:
        key, _, value = part.partition("=")
        name, read = _KEYS.get(key.strip().lower(), ("", _share))
        if not name:
            raise DataError(f"a link's keys are {', '.join(_KEYS)}, but got {key.strip()!r} in {text!r}")
        changes[name] = read(value.strip(), part)
    if "rtt_ms" in changes and "rtt_p95_ms" not in changes:
        changes["rtt_p95_ms"] = 2 * changes["rtt_ms"] if base is None else max(
            changes["rtt_ms"] * base.rtt_p95_ms / max(base.rtt_ms, 1e-9), changes["rtt_ms"]
        )  # fmt: skip
    if base is not None:
        return dataclasses.replace(base, name=text, **changes) if changes else base
    missing = [k for k, n in (("up", "up_mbit_s"), ("down", "down_mbit_s"), ("rtt", "rtt_ms")) if n not in changes]
    if missing:
        raise DataError(f"a link without a preset needs up, down and rtt, but {text!r} lacks {', '.join(missing)}")
    return Link(name=text, **changes)


def _rate(value: str, part: str) -> float:
    match = _RATE.fullmatch(value)
    number = float(match.group(1) or match.group(3)) if match and _is_number(match.group(1) or match.group(3)) else 0.0
    if match is None or not 0 < number < 1e9:
        raise DataError(f"a rate is written like 20Mbit, above 0, but got {part!r}")
    unit = (match.group(2) or match.group(4) or "").lower()
    return number * {"": 1e-6, "k": 1e-3, "m": 1.0, "g": 1e3}[unit]


def _time(value: str, part: str) -> float:
    match = _TIME.fullmatch(value)
    if match is None or not _is_number(match.group(1)) or not 0 <= float(match.group(1)) < 1e6:
        raise DataError(f"a time of a link is written like 40ms, but got {part!r}")
    return float(match.group(1)) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[match.group(2).lower()]


def _share(value: str, part: str) -> float:
    match = _SHARE.fullmatch(value)
    share = float(match.group(1)) / (100 if value.endswith("%") else 1) if match and _is_number(match.group(1)) else 2.0
    if not 0 <= share <= 1:
        raise DataError(f"a share is written like 2% or 0.02, from 0 to 1, but got {part!r}")
    return share


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d+\.?\d*|\.\d+", text) is not None


_KEYS: dict[str, tuple[str, Any]] = {
    "up": ("up_mbit_s", _rate),
    "down": ("down_mbit_s", _rate),
    "rtt": ("rtt_ms", _time),
    "p95": ("rtt_p95_ms", _time),
    "loss": ("loss", _share),
    "outage": ("outage", _share),
}
