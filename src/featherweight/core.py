"""The data types everything else speaks in. Frozen, data only; imports nothing of featherweight but errors and device.

An `Effect` or `Prediction` is an estimate; a `Measurement` never is. They share no type on purpose.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from featherweight.device import Profile as Profile
from featherweight.errors import BudgetError, PlanError

Scalar = str | int | float | bool
Stage = Literal["structure", "recover", "numeric"]
SiteKind = Literal["weight", "channel_group", "activation", "model"]
Objective = Literal["size", "latency", "memory", "drop"]
Answer = Literal["yes", "no, proved", "not found"]

STAGES: tuple[Stage, ...] = ("structure", "recover", "numeric")
PLAN_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Site:
    """A place where one choice is made.

    `name` is stable for one normalised model: for a weight site the name of its tensor. `nodes` are the
    names of the nodes that read it (dotted path inside sub-graphs), `size_bytes` what it costs now.
    """

    name: str
    kind: SiteKind
    tensors: tuple[str, ...]
    nodes: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Action:
    """One technique with its parameters; hashable and JSON-able."""

    technique: str
    params: tuple[tuple[str, Scalar], ...] = ()

    @classmethod
    def of(cls, technique: str, **params: Scalar) -> Action:
        """Build an action; parameter order does not matter."""
        return cls(technique, tuple(sorted(params.items())))

    def get(self, name: str, default: Scalar | None = None) -> Any:
        """Value of one parameter, or `default`."""
        return dict(self.params).get(name, default)

    def __str__(self) -> str:
        return f"{self.technique}({', '.join(f'{k}={v}' for k, v in self.params)})"

    def to_json(self) -> dict[str, Any]:
        """Plain dict for JSON."""
        return {"technique": self.technique, "params": dict(self.params)}

    @classmethod
    def from_json(cls, raw: Any) -> Action:
        """Read `to_json`'s form. Raises PlanError on anything else."""
        if not isinstance(raw, dict) or not isinstance(raw.get("technique"), str):
            raise PlanError(f"an action must be an object with a 'technique' string, but got {raw!r}")
        params = raw.get("params", {})
        if not isinstance(params, dict) or not all(isinstance(v, Scalar) for v in params.values()):
            raise PlanError(f"the params of action {raw['technique']!r} must be scalars, but got {params!r}")
        return cls.of(raw["technique"], **params)


@dataclass(frozen=True, slots=True)
class Decision:
    """The chain of actions chosen at one site; an empty chain keeps the site as it is."""

    site: str
    actions: tuple[Action, ...] = ()

    @property
    def keeps(self) -> bool:
        """True if nothing is done here."""
        return not self.actions

    def __str__(self) -> str:
        return " -> ".join(map(str, self.actions)) or "keep"


@dataclass(frozen=True, slots=True)
class Effect:
    """Predicted change against the baseline of one decision applied alone (or of a plan, summed).

    `size_bytes`, `latency_ms`, `peak_bytes`: result minus baseline, so negative is a gain.
    `loss`: predicted output noise, >= 0, in the unit of the search (not the user's metric).
    `macs`: multiply-accumulates of one call.
    """

    size_bytes: int = 0
    latency_ms: float = 0.0
    peak_bytes: int = 0
    loss: float = 0.0
    macs: int = 0


@dataclass(frozen=True, slots=True)
class Budget:
    """The user's limits, each optional, and what to minimise under them.

    Latency may be given in ms or as a ratio to the original; both hold if both are given. `max_drop` is in
    units of the metric (0.01 = one point of accuracy). `max_macs`: multiply-accumulates of one call at the data's
    shapes, which are exact and the same on every device.
    """

    max_size_bytes: int | None = None
    max_latency_ms: float | None = None
    max_latency_ratio: float | None = None
    max_peak_bytes: int | None = None
    max_drop: float | None = None
    minimize: Objective = "size"
    max_macs: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_size_bytes", "max_latency_ms", "max_latency_ratio", "max_peak_bytes", "max_macs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BudgetError(f"{name} must be > 0, but got {value}")
        if self.max_drop is not None and not self.max_drop >= 0:
            raise BudgetError(f"max_drop must be >= 0, but got {self.max_drop}")

    @property
    def limited(self) -> bool:
        """True if any limit is set."""
        return any(
            v is not None
            for v in (
                self.max_size_bytes,
                self.max_latency_ms,
                self.max_latency_ratio,
                self.max_peak_bytes,
                self.max_drop,
                self.max_macs,
            )
        )

    @property
    def asks_for_work(self) -> bool:
        """True if fewer operations or smaller activations may help to meet the limits or the objective."""
        limits = (self.max_latency_ms, self.max_latency_ratio, self.max_peak_bytes, self.max_macs)
        return self.minimize in ("latency", "memory") or any(limit is not None for limit in limits)

    def violations(self, m: Measurement) -> list[str]:
        """What `m` breaks, in words with both values; empty if nothing."""
        said = "" if m.latency_from == "measured" else f"{m.latency_from} "
        checks: tuple[tuple[str, float | None, float | None, str], ...] = (
            ("size", m.size_bytes, self.max_size_bytes, "B"),
            (f"{said}latency", m.latency_ms, self.max_latency_ms, "ms"),
            (f"{said}latency ratio", m.latency_ratio, self.max_latency_ratio, "of the original"),
            ("peak memory", m.peak_bytes, self.max_peak_bytes, "B"),
            ("drop", m.drop, self.max_drop, f"({m.metric_name})"),
            ("MACs", m.macs, self.max_macs, "a call"),
        )
        return [
            f"{what} is over the limit of {_plain(limit)}: it was not measured"
            if value is None
            else f"{what} {_plain(value)} {unit} is over the limit of {_plain(limit)}"
            for what, value, limit, unit in checks
            if limit is not None and (value is None or value > limit)
        ]


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval of level `level` (two-sided)."""

    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured on a saved, reloaded file in a child process. Never an estimate.

    One exception says so: for a device that is not here latency is predicted, and `latency_from` is "predicted" then.

    `latency_ms` (median) and `p95_ms` are per call at the batch size of the data; `latency_ratio` is the median of
    candidate over original, interleaved. `drop` is baseline metric minus this one in the metric's unit
    (positive is worse). `macs`: multiply-accumulates of one call, counted on the built graph at the data's shapes.
    None where a quantity was not measured. `changed`: share of answers that are not the original's; `likely_drop`: what
    the drop is on other data, judged from both; None but for accuracy with one class a sample,
    and for rank correlations, where it is judged from how far both models' scores agree.
    """

    size_bytes: int
    metric_name: str = ""
    metric: float | None = None
    drop: float | None = None
    drop_interval: Interval | None = None
    p_value: float | None = None
    n_samples: int = 0
    latency_ms: float | None = None
    p95_ms: float | None = None
    latency_ratio: float | None = None
    peak_bytes: int | None = None
    load_ms: float | None = None
    runtime: str = ""
    host: str = ""
    seed: int = 0
    macs: int | None = None
    latency_from: str = "measured"
    changed: float | None = None
    likely_drop: float | None = None

    @property
    def judged_drop(self) -> float | None:
        """The drop that a search goes by: the likely one where there is one."""
        return self.drop if self.likely_drop is None else self.likely_drop


@dataclass(frozen=True, slots=True)
class Plan:
    """The decisions chosen by the solver, replayable without search."""

    decisions: tuple[Decision, ...]
    predicted: Effect = Effect()
    gap: float | None = None
    bound_bytes: int | None = None
    model_sha256: str = ""
    options: tuple[tuple[str, Scalar], ...] = ()
    schema: int = PLAN_SCHEMA

    def by_site(self) -> dict[str, Decision]:
        """Decisions by site name."""
        return {d.site: d for d in self.decisions}

    def changed(self) -> tuple[Decision, ...]:
        """Decisions that do something."""
        return tuple(d for d in self.decisions if not d.keeps)

    def to_json(self) -> str:
        """Canonical JSON text; equal plans give equal bytes."""
        raw = {
            "schema": self.schema,
            "model_sha256": self.model_sha256,
            "options": dict(self.options),
            "decisions": [{"site": d.site, "actions": [a.to_json() for a in d.actions]} for d in self.decisions],
            "predicted": dataclasses.asdict(self.predicted),
            "gap": self.gap,
            "bound_bytes": self.bound_bytes,
        }
        return json.dumps(raw, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read `to_json`'s text. Raises PlanError naming what is wrong."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise PlanError(f"the plan is not JSON: {e}") from e
        if not isinstance(raw, dict) or raw.get("schema") != PLAN_SCHEMA:
            found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
            raise PlanError(f"the plan's schema must be {PLAN_SCHEMA}, but got {found!r}")
        items = raw.get("decisions")
        if not isinstance(items, list):
            raise PlanError(f"the plan's 'decisions' must be a list, but got {type(items).__name__}")
        decisions = []
        for item in items:
            if not isinstance(item, dict) or not isinstance(item.get("site"), str):
                raise PlanError(f"a decision must be an object with a 'site' string, but got {item!r}")
            decisions.append(Decision(item["site"], tuple(Action.from_json(a) for a in item.get("actions", []))))
        try:
            predicted = Effect(**raw.get("predicted", {}))
        except TypeError as e:
            raise PlanError(f"the plan's 'predicted' is malformed: {e}") from e
        options = raw.get("options", {})
        return cls(
            tuple(decisions),
            predicted,
            raw.get("gap"),
            raw.get("bound_bytes"),
            str(raw.get("model_sha256", "")),
            tuple(sorted(options.items())),
        )


@dataclass(frozen=True, slots=True)
class Note:
    """Something the user should know about one place: why it was left alone, or what was assumed."""

    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """One candidate that was really built and measured, or the error that stopped it."""

    index: int
    plan: Plan
    measured: Measurement | None
    error: str = ""
    seconds: float = 0.0

    @property
    def judged_drop(self) -> float:
        """The drop that a search goes by; infinite where none was measured."""
        drop = None if self.measured is None else self.measured.judged_drop
        return math.inf if drop is None else drop


@dataclass(frozen=True)
class Report:
    """What was asked, what came out, what was tried. `outcome` is the one word; `reason` the sentence behind it."""

    budget: Budget
    answer: Answer
    outcome: str
    reason: str
    plan: Plan
    baseline: Measurement
    result: Measurement
    attempts: tuple[Attempt, ...] = ()
    front: tuple[Attempt, ...] = ()
    notes: tuple[Note, ...] = ()
    layers: tuple[Mapping[str, Any], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True if the budget is met by measurement."""
        return self.answer == "yes"

    @property
    def violations(self) -> list[str]:
        """What the result breaks; empty if `ok`."""
        return self.budget.violations(self.result)

    @property
    def size_ratio(self) -> float:
        """Result over baseline, so smaller is better."""
        return self.result.size_bytes / self.baseline.size_bytes


def _plain(number: float) -> str:
    """Bytes in full, other numbers to six digits."""
    return str(number) if isinstance(number, int) else f"{number:.6g}"


def total(effects: Iterable[Effect]) -> Effect:
    """Sum of effects; the first approximation the search corrects by measuring."""
    size, latency, peak, loss, macs = 0, 0.0, 0, 0.0, 0
    for e in effects:
        size, latency, peak, loss = size + e.size_bytes, latency + e.latency_ms, peak + e.peak_bytes, loss + e.loss
        macs += e.macs
    return Effect(size, latency, peak, loss, macs)


class Progress(Protocol):
    """Where long work reports itself; the terminal shows it as bars, the library default is silence."""

    def start(self, phase: str, total: int | None = None) -> None:
        """A phase begins, of `total` steps if known; the phase before it has ended."""
        ...

    def advance(self, steps: int = 1) -> None:
        """Some steps of the current phase are done."""
        ...

    def trying(self, what: str) -> None:
        """What is being tried now, in a few words."""
        ...

    def best(self, what: str) -> None:
        """The best result so far, in a few words."""
        ...


class Silent:
    """The Progress that shows nothing."""

    def start(self, phase: str, total: int | None = None) -> None:
        """Show nothing."""

    def advance(self, steps: int = 1) -> None:
        """Show nothing."""

    def trying(self, what: str) -> None:
        """Show nothing."""

    def best(self, what: str) -> None:
        """Show nothing."""
