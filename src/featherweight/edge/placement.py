"""What is asked of a placement and what is answered: data only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from featherweight.core import Answer, Profile
from featherweight.edge._compute import Work
from featherweight.edge.links import Link
from featherweight.edge.prices import SECONDS_A_MONTH, Money, Offer
from featherweight.errors import BudgetError

Zone = Literal["device", "site", "outside"]
Goal = Literal["latency", "cost", "energy"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What must hold. Latency is the 95th percentile of a call, cost is of one month.

    `data_stays`: the input (and what shows it at a glance) does not leave the device, or the site; with
    `features_stay` nothing computed from it does either. `offline`: "internet" must not be needed, or "any" network.
    """

    data_stays: Literal["", "device", "site"] = ""
    features_stay: bool = False
    offline: Literal["", "internet", "any"] = ""
    max_latency_ms: float | None = None
    max_cost: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked. `peak` is the busiest rate over the mean; servers are bought for the peak.

    `devices` share the requests. `own_devices`: their price over `device_life_months` and their power count as money.
    """

    requests_a_month: float
    peak: float = 3.0
    devices: int = 1
    most_utilisation: float = 0.7
    own_devices: bool = False
    device_life_months: float = 36.0

    def __post_init__(self) -> None:
        laws = (
            ("requests_a_month", self.requests_a_month, self.requests_a_month > 0, "above 0"),
            ("peak", self.peak, self.peak >= 1, "at least 1"),
            ("devices", self.devices, self.devices >= 1, "at least 1"),
            ("most_utilisation", self.most_utilisation, 0 < self.most_utilisation < 1, "between 0 and 1"),
            ("device_life_months", self.device_life_months, self.device_life_months > 0, "above 0"),
        )
        for name, value, holds, law in laws:
            if not holds or not math.isfinite(value):
                raise BudgetError(f"{name} must be {law}, but got {value:g}")

    @property
    def per_second(self) -> float:
        """Requests a second in the mean."""
        return self.requests_a_month / SECONDS_A_MONTH


@dataclass(frozen=True, slots=True)
class Place:
    """A server the model may run on, and the link to it. `name` is unique among the places."""

    name: str
    offer: Offer
    link: Link

    @property
    def zone(self) -> Zone:
        """Where the data goes: to the site over its own network, else outside."""
        return "outside" if self.link.public else "site"


@dataclass(frozen=True)
class Question:
    """Everything asked. `wire` "int8": floats computed by the device are sent in 8 bits."""

    works: Sequence[Work]
    device: Profile
    places: Sequence[Place]
    load: Load
    rules: Rules = Rules()
    goal: Goal = "latency"
    per_kwh: float = 0.0
    wire: Literal["float", "int8"] = "float"
    measured_ms: Mapping[tuple[str, str], float] = field(default_factory=dict)
    not_private: frozenset[str] = frozenset()
    splits: bool = True
    memo: dict[tuple[object, ...], Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One option. Milliseconds of one call at the peak rate; `p95_ms` adds up each part's 95th percentile.

    `breaks` says which rules it breaks and by what; `proved`: no other cut of this model at this place keeps them.
    `data`: what leaves the device. `leaves` is the farthest zone it reaches. `energy_j` None: power not known.
    """

    option: str
    model: str
    place: str
    kind: Literal["device", "server", "split"]
    device_ms: float
    up_ms: float
    network_ms: float
    queue_ms: float
    server_ms: float
    down_ms: float
    mean_ms: float
    p95_ms: float
    up_bytes: int
    down_bytes: int
    energy_j: float | None
    money: Money
    servers: int
    utilisation: float
    availability: float
    leaves: Zone
    data: str
    offline: Literal["yes", "without internet", "no"]
    breaks: tuple[str, ...]
    proved: bool
    source: str
    after: tuple[str, ...] = ()
    wire: tuple[str, ...] = ()
    head: tuple[str, ...] = ()

    @property
    def cost(self) -> float:
        """Money a month."""
        return self.money.total


@dataclass(frozen=True)
class Placement:
    """All options, best first, and the answer. `best` is the option that keeps the rules and is best at the goal."""

    rows: tuple[Row, ...]
    answer: Answer
    reason: str
    best: Row | None
    goal: Goal
