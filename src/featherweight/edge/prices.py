"""What servers cost: tables with a source and a date for every figure, and the money of one month.

Shipped tables lie in `tables/`; a user's file of the same form adds offers and replaces those of the same name. A month
is 730 hours. Prices are list prices without tax, commitment discounts or support; the format is in docs/place.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from featherweight.core import Profile
from featherweight.edge import _checked
from featherweight.edge._checked import Fields, Source
from featherweight.errors import DataError
from featherweight.runtime.profile_files import profile_from_json
from featherweight.runtime.targets import load_profile

PRICES_SCHEMA = 1
HOURS_A_MONTH = 730.0
SECONDS_A_MONTH = HOURS_A_MONTH * 3600.0
Kind = Literal["instance", "serverless", "owned"]
KINDS: tuple[Kind, ...] = ("instance", "serverless", "owned")


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to get a server. Money in `currency`; `workers` requests run at once, each at the profile's speed.

    instance: `per_hour`. serverless: `per_gb_s`, `per_vcpu_s`, `per_million_requests` with their free shares a month,
    duration rounded up to `round_ms`; after `keep_warm_s` without a request the next waits `cold_ms`. owned: `price`
    over `life_months`, power of profile's idle and busy watts times `pue`, `upkeep` a month for a person and a place.
    Egress: `egress_per_gb` after `egress_free_gb` a month for answers; what is sent in costs nothing.
    """

    name: str
    kind: Kind
    label: str
    profile: Profile
    workers: int = 1
    currency: str = "USD"
    per_hour: float = 0.0
    per_gb_s: float = 0.0
    per_vcpu_s: float = 0.0
    per_million_requests: float = 0.0
    memory_gb: float = 0.0
    vcpus: float = 0.0
    free_gb_s: float = 0.0
    free_vcpu_s: float = 0.0
    free_requests: float = 0.0
    round_ms: float = 1.0
    cold_ms: float = 0.0
    keep_warm_s: float = 600.0
    price: float = 0.0
    life_months: float = 48.0
    idle_w: float = 0.0
    busy_w: float = 0.0
    pue: float = 1.0
    upkeep: float = 0.0
    egress_per_gb: float = 0.0
    egress_free_gb: float = 0.0
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class Money:
    """Money of one month by what it is for."""

    compute: float = 0.0
    hardware: float = 0.0
    power: float = 0.0
    requests: float = 0.0
    egress: float = 0.0
    upkeep: float = 0.0

    @property
    def total(self) -> float:
        """The month's sum."""
        return self.compute + self.hardware + self.power + self.requests + self.egress + self.upkeep


@dataclass(frozen=True)
class PriceTable:
    """Offers by name, and what a kilowatt-hour costs where owned hardware stands."""

    offers: dict[str, Offer]
    per_kwh: float
    currency: str
    sources: tuple[Source, ...]

    def get(self, name: str) -> Offer:
        """An offer. Raises DataError naming those there are."""
        if name not in self.offers:
            raise DataError(f"an offer must be one of {', '.join(sorted(self.offers))}, but got {name!r}")
        return self.offers[name]


def month(offer: Offer, *, requests: float, busy_ms: float, down_bytes: float, servers: int, per_kwh: float) -> Money:
    """Money of one month of `requests` calls that keep a worker busy for `busy_ms` each and answer `down_bytes`.

    `servers` machines of an instance or owned offer run all month, whether asked or not; serverless is paid by use.
    """
    gigabytes = requests * down_bytes / 1e9
    egress = max(gigabytes - offer.egress_free_gb, 0.0) * offer.egress_per_gb
    if offer.kind == "instance":
        return Money(compute=servers * offer.per_hour * HOURS_A_MONTH, egress=egress)
    if offer.kind == "serverless":
        seconds = requests * math.ceil(busy_ms / offer.round_ms - 1e-9) * offer.round_ms / 1e3
        memory = max(seconds * offer.memory_gb - offer.free_gb_s, 0.0) * offer.per_gb_s
        cpu = max(seconds * offer.vcpus - offer.free_vcpu_s, 0.0) * offer.per_vcpu_s
        calls = max(requests - offer.free_requests, 0.0) * offer.per_million_requests / 1e6
        return Money(compute=memory + cpu, requests=calls, egress=egress)
    share = min(requests * busy_ms / 1e3 / (SECONDS_A_MONTH * servers * offer.workers), 1.0)
    watts = servers * (offer.idle_w + (offer.busy_w - offer.idle_w) * share) * offer.pue
    return Money(
        hardware=servers * offer.price / offer.life_months,
        power=watts / 1e3 * HOURS_A_MONTH * per_kwh,
        upkeep=servers * offer.upkeep,
        egress=egress,
    )


def without_free(offer: Offer) -> Offer:
    """The same offer without the free shares of a month: for who uses them up elsewhere."""
    return dataclasses.replace(offer, free_gb_s=0.0, free_vcpu_s=0.0, free_requests=0.0, egress_free_gb=0.0)


def cold_share(offer: Offer, per_second: float) -> float:
    """Share of requests that find a serverless function cold: Poisson gaps longer than `keep_warm_s`."""
    if offer.kind != "serverless" or offer.cold_ms <= 0:
        return 0.0
    return math.exp(-per_second * offer.keep_warm_s)


@cache
def shipped() -> PriceTable:
    """The tables that come with the package, as one."""
    folder = resources.files("featherweight.edge") / "tables"
    names = sorted(p.name for p in folder.iterdir() if p.name.startswith("prices-"))
    return merged([_parse((folder / n).read_text(encoding="utf-8"), f"the shipped table {n}") for n in names])


def load(paths: Iterable[Path] = ()) -> PriceTable:
    """The shipped table with the user's files over it, later ones winning. Raises DataError naming what is wrong."""
    read = [_read(_checked.read_object(p, what="a table of prices"), str(p)) for p in paths]
    return merged([shipped(), *read])


def merged(tables: Sequence[PriceTable]) -> PriceTable:
    """Tables as one. Raises DataError where currencies differ: no rate of exchange is guessed."""
    currencies = sorted({t.currency for t in tables})
    if len(currencies) > 1:
        raise DataError(
            f"all prices must be in one currency, but got {' and '.join(currencies)}; give all offers you compare in "
            "one, and name each with --offer"
        )
    offers = {name: offer for t in tables for name, offer in t.offers.items()}
    named = [t for t in tables if t.per_kwh >= 0]
    if not named:
        raise DataError("a table must say electricity_per_kwh, but none does")
    sources = tuple(s for t in tables for s in t.sources)
    return PriceTable(offers, named[-1].per_kwh, currencies[0], sources)


def _parse(text: str, where: str) -> PriceTable:
    return _read(_checked.parse_object(text, where=where), where)


def _read(raw: dict[str, Any], where: str) -> PriceTable:
    top = Fields(raw, where)
    top.schema("prices", PRICES_SCHEMA)
    currency = top.text("currency")
    per_kwh = top.number("electricity_per_kwh", most=1e4) if top.has("electricity_per_kwh") else -1.0
    rows = top.raw("offers", [])
    top.text("note", "")
    sources = top.sources()
    top.done()
    if not isinstance(rows, list) or len(rows) > 10_000:
        raise DataError(f"{where}: offers must be a list of at most 10000, but is a {type(rows).__name__}")
    offers: dict[str, Offer] = {}
    for i, row in enumerate(rows):
        offer = _offer(row, f"{where}, offer {i + 1}", currency)
        if offer.name in offers:
            raise DataError(f"{where}: each offer must have its own name, but {offer.name!r} is there twice")
        offers[offer.name] = offer
    return PriceTable(offers, per_kwh, currency, sources)


_MONEY = {
    "instance": ("per_hour",),
    "serverless": (
        "per_gb_s", "per_vcpu_s", "per_million_requests", "memory_gb", "vcpus", "free_gb_s", "free_vcpu_s",
        "free_requests", "cold_ms",
    ),
    "owned": ("price", "idle_w", "busy_w", "upkeep"),
}  # fmt: skip
_POSITIVE = {"instance": (), "serverless": ("round_ms", "keep_warm_s"), "owned": ("life_months", "pue")}
_NEEDED = {"instance": {"per_hour"}, "serverless": {"memory_gb"}, "owned": {"price"}}
NUMBERS = frozenset(n for names in (*_MONEY.values(), *_POSITIVE.values()) for n in names) | {
    "egress_per_gb", "egress_free_gb",
}  # fmt: skip


def _offer(raw: Any, where: str, currency: str) -> Offer:
    f = Fields(raw, where)
    kind: Any = f.text("kind", among=KINDS)
    values: dict[str, Any] = {}
    for name in (*_MONEY[kind], "egress_per_gb", "egress_free_gb"):
        if f.has(name) or name in _NEEDED[kind]:
            values[name] = f.number(name)
    for name in _POSITIVE[kind]:
        if f.has(name):
            values[name] = f.positive(name)
    offer = Offer(
        name=f.text("name"), kind=kind, label=f.text("label", ""), profile=_profile(f.raw("profile"), where),
        workers=f.whole("workers", 1), currency=currency, sources=f.sources(), **values,
    )  # fmt: skip
    f.done()
    if offer.busy_w < offer.idle_w:
        raise DataError(f"{where}: busy_w must be at least idle_w {offer.idle_w:g}, but got {offer.busy_w:g}")
    return dataclasses.replace(offer, label=offer.label or offer.name)


def _profile(raw: Any, where: str) -> Profile:
    """A profile in the table, or the name of a shipped one."""
    if isinstance(raw, str):
        return load_profile(raw)
    if not isinstance(raw, dict):
        raise DataError(f"{where}: profile must be a name or an object, but is a {type(raw).__name__}")
    return profile_from_json(json.dumps({"schema": 2, **raw}), where=f"{where}, profile")
