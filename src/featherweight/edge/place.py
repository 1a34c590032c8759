"""Where a model should run: every option side by side, with time, energy, money, privacy and what rules it breaks.

Options are one or more forms of the model (original, compressed) times places: the device, servers on the site, servers
of one's own, clouds by the hour or by use, and for each server the best split with the device. The question "is there
a placement within the rules" is answered with proof: all options are looked at, and a split is ruled out only by a
bound that holds for every cut.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from featherweight.core import Profile
from featherweight.edge import _compute, _splits, prices
from featherweight.edge._compute import Times, Work
from featherweight.edge.mincut import Cut
from featherweight.edge.placement import Goal, Load, Place, Placement, Question, Row, Rules, Zone
from featherweight.edge.prices import HOURS_A_MONTH, Money
from featherweight.edge.queueing import servers_needed, waiting

__all__ = ["Goal", "Load", "Place", "Placement", "Question", "Row", "Rules", "Zone", "all_rows", "decide", "place"]

_OUTAGE_OF_P95 = 0.05


def place(question: Question) -> Placement:
    """Look at every option. Raises DataError where a profile can neither predict nor was measured."""
    return decide(question, all_rows(question))


def decide(question: Question, rows: Sequence[Row]) -> Placement:
    """The answer to rows already made."""
    ordered = tuple(sorted(rows, key=lambda r: (bool(r.breaks), *_key(r, question.goal))))
    best = next((r for r in ordered if not r.breaks), None)
    if best is not None:
        kept = sum(not r.breaks for r in ordered)
        return Placement(
            ordered, "yes", f"{kept} of {len(rows)} options keep the rules; best at {question.goal}: {best.option}",
            best, question.goal,
        )  # fmt: skip
    open_rows = [r for r in ordered if not r.proved]
    if not open_rows:
        why = f"each of the {len(rows)} options breaks a rule, and so does every other cut of the models"
        return Placement(ordered, "no, proved", why, None, question.goal)
    why = f"none found: {open_rows[0].option} is not ruled out for every cut, but no cut that was tried keeps the rules"
    return Placement(ordered, "not found", why, None, question.goal)


def _key(row: Row, goal: Goal) -> tuple[float, ...]:
    energy = math.inf if row.energy_j is None else row.energy_j
    order = {
        "latency": (row.p95_ms, row.cost, energy),
        "cost": (row.cost, row.p95_ms, energy),
        "energy": (energy, row.p95_ms, row.cost),
    }
    return order[goal]


def all_rows(question: Question) -> list[Row]:
    """Every option in the order device, servers, splits."""
    rows = [_on_device(question, w) for w in question.works]
    for place_ in question.places:
        rows += [_on_server(question, w, place_) for w in question.works]
    if question.splits:
        for place_ in question.places:
            rows += [r for w in question.works if (r := _split(question, w, place_)) is not None]
    return rows


def times_on(question: Question, work: Work, name: str, profile: Profile) -> Times:
    """Times of a model at a place, measured ones first."""
    measured = question.measured_ms.get((name, work.name), question.measured_ms.get((name, "")))
    key = ("times", name, work.name, profile.name, measured)
    if key not in question.memo:
        question.memo[key] = _compute.times(work, profile, measured)
    found: Times = question.memo[key]
    return found


def _on_device(question: Question, work: Work) -> Row:
    done = times_on(question, work, "device", question.device)
    return _row(question, work, None, None, done, None)


def _on_server(question: Question, work: Work, place_: Place) -> Row:
    done = times_on(question, work, place_.name, place_.offer.profile)
    return _row(question, work, place_, None, None, done)


def _split(question: Question, work: Work, place_: Place) -> Row | None:
    """The best cut between device and place; None for a model that cannot be cut."""
    here = times_on(question, work, "device", question.device)
    there = times_on(question, work, place_.name, place_.offer.profile)
    keeps = _raw_must_stay(question.rules, place_.zone)
    key = ("cuts", work.name, place_.name, place_.link, question.wire, keeps)
    if key not in question.memo:
        question.memo[key] = _splits.candidates(
            work.graph, here, there, place_.link, wire=question.wire, raw_stays=keeps, not_private=question.not_private
        )
    tried: _splits.Tried = question.memo[key]
    rows = [(_row(question, work, place_, cut, here, there), cut) for cut in tried.cuts]
    if not rows:
        return None
    best, _ = min(rows, key=lambda rc: (bool(rc[0].breaks), len(rc[0].breaks), *_key(rc[0], question.goal)))
    return dataclasses.replace(best, proved=_proved(question, best, place_, tried, here, there))


def _proved(
    question: Question, row: Row, place_: Place, tried: _splits.Tried, here: Times, there: Times
) -> bool:  # fmt: skip
    """True if the rules a split breaks are broken by every cut: by where it goes, or by a bound below all cuts."""
    rules, limit = question.rules, question.rules.max_latency_ms
    if place_breaks(rules, place_.zone) or (rules.features_stay and _raw_must_stay(rules, place_.zone)):
        return True
    if math.isinf(tried.least_ms):
        return True  # each cut sends something that must stay
    fastest = tried.least_ms * (1 - 1e-4) + place_.link.rtt_p95_ms + here.call_ms + there.call_ms
    if limit is not None and fastest > limit:
        return True
    least = prices.month(
        place_.offer, requests=question.load.requests_a_month, busy_ms=0.0, down_bytes=0.0, servers=1,
        per_kwh=question.per_kwh,
    ).total  # fmt: skip
    return rules.max_cost is not None and least > rules.max_cost and bool(row.breaks)


def _row(
    question: Question, work: Work, place_: Place | None, cut: Cut | None, here: Times | None, there: Times | None
) -> Row:
    """All figures of one option: on the device (no place), on a server (no cut), or split."""
    on_device, on_server = _shares(work, cut, here, there)
    up_bytes, down_bytes = _bytes(question, work, place_, cut)
    load = question.load
    peak_per_second = load.per_second * load.peak
    money, servers, busy, queue_ms, queue_p95 = Money(), 0, 0.0, 0.0, 0.0
    up_ms = down_ms = network = network_p95 = 0.0
    if place_ is not None:
        offer, link = place_.offer, place_.link
        up_ms, down_ms = link.up_ms(up_bytes), link.down_ms(down_bytes)
        network = link.rtt_ms + link.resend_ms(up_bytes, down_bytes)
        network_p95 = link.rtt_p95_ms + link.resend_ms(up_bytes, down_bytes, p95=True)
        if offer.kind == "serverless":
            cold = prices.cold_share(offer, load.per_second)
            queue_ms, queue_p95 = cold * offer.cold_ms, offer.cold_ms if cold > _OUTAGE_OF_P95 else 0.0
        else:
            servers = servers_needed(peak_per_second, on_server, offer.workers, load.most_utilisation)
            queue = waiting(servers * offer.workers, peak_per_second, on_server)
            busy, queue_ms, queue_p95 = queue.utilisation, queue.mean_ms, queue.p95_ms
        money = prices.month(
            offer, requests=load.requests_a_month, busy_ms=on_server, down_bytes=down_bytes, servers=servers,
            per_kwh=question.per_kwh,
        )  # fmt: skip
    still = on_device + up_ms + down_ms + on_server
    p95 = still + network_p95 + queue_p95
    if place_ is not None and place_.link.outage > _OUTAGE_OF_P95:
        p95 = math.inf
    energy = _energy(question.device, place_, on_device, still - on_device + network + queue_ms, up_bytes, down_bytes)
    row = Row(
        option=_option(work, place_, cut), model=work.name, place="device" if place_ is None else place_.name,
        kind="device" if place_ is None else "server" if cut is None else "split",
        device_ms=on_device, up_ms=up_ms, network_ms=network, queue_ms=queue_ms, server_ms=on_server, down_ms=down_ms,
        mean_ms=still + network + queue_ms, p95_ms=p95, up_bytes=up_bytes, down_bytes=down_bytes, energy_j=energy,
        money=with_devices(question, money, energy), servers=servers, utilisation=busy,
        availability=1.0 if place_ is None else 1.0 - place_.link.outage,
        leaves="device" if place_ is None else place_.zone, data=_data(work, place_, cut, question.not_private),
        offline="yes" if place_ is None else "no" if place_.link.public else "without internet",
        breaks=(), proved=True, source=_sources(here, there),
        after=() if cut is None else _after(work, cut),
        wire=() if cut is None else tuple(work.graph.tensors[t].name for t in cut.wire),
        head=() if cut is None else tuple(work.graph.blocks[i].name for i in sorted(cut.head)),
    )  # fmt: skip
    return dataclasses.replace(row, breaks=tuple(_breaks(question, work, row, place_, cut)))


def _shares(work: Work, cut: Cut | None, here: Times | None, there: Times | None) -> tuple[float, float]:
    """Milliseconds on the device and on the server."""
    if cut is None or here is None or there is None:
        return (0.0 if here is None else here.total_ms), (0.0 if there is None else there.total_ms)
    tail = [i for i in work.graph.proper if i not in cut.head]
    return (
        here.call_ms + sum(here.blocks[i] for i in cut.here),
        there.call_ms + sum(there.blocks[i] for i in (*tail, *cut.rerun)),
    )


def _bytes(question: Question, work: Work, place_: Place | None, cut: Cut | None) -> tuple[int, int]:
    """Bytes up and down of one call."""
    if place_ is None:
        return 0, 0
    if cut is None:
        return work.upload_bytes, work.output_bytes
    tensors = [work.graph.tensors[t] for t in cut.wire]
    up = sum(t.wire_bytes if question.wire == "int8" and not t.is_input else t.nbytes for t in tensors)
    late = [
        t for t, v in enumerate(work.graph.tensors) if v.is_output and work.graph.maker.get(t, -1) not in cut.here
        and t in work.graph.maker
    ]  # fmt: skip
    return up, sum(work.graph.tensors[t].nbytes for t in late)


def _energy(
    device: Profile, place_: Place | None, busy_ms: float, waits_ms: float, up_bytes: int, down_bytes: int
) -> float | None:
    """Joules of one call on the device: computing, waiting, radio. None where its power is not known."""
    if device.busy_w is None:
        return None
    radio = 0.0 if place_ is None else place_.link.radio_j(up_bytes, down_bytes)
    waiting_j = 0.0 if place_ is None else (device.idle_w or 0.0) * waits_ms / 1e3
    return device.busy_w * busy_ms / 1e3 + waiting_j + radio


def with_devices(question: Question, money: Money, energy: float | None) -> Money:
    """The month with the devices, where they are one's own."""
    load = question.load
    if not load.own_devices:
        return money
    hardware = load.devices * (question.device.price or 0.0) / load.device_life_months
    idle = load.devices * (question.device.idle_w or 0.0) / 1e3 * HOURS_A_MONTH
    used = (energy or 0.0) * load.requests_a_month / 3.6e6
    return dataclasses.replace(
        money, hardware=money.hardware + hardware, power=money.power + (idle + used) * question.per_kwh
    )


def _option(work: Work, place_: Place | None, cut: Cut | None) -> str:
    if place_ is None:
        return f"{work.name}: device"
    return f"{work.name}: {place_.name}" if cut is None else f"{work.name}: device + {place_.name}"


def _after(work: Work, cut: Cut) -> tuple[str, ...]:
    read = {p for i in cut.head for p in work.graph.parents[i]}
    return tuple(work.graph.blocks[i].name for i in sorted(cut.head - read))


def _sources(here: Times | None, there: Times | None) -> str:
    return "+".join(sorted({t.source for t in (here, there) if t is not None}))


def raw_names(work: Work, cut: Cut, not_private: frozenset[str]) -> list[str]:
    """Tensors on the wire that show a private input at a glance."""
    sent = (work.graph.tensors[t] for t in cut.wire)
    return [t.name for t in sent if t.raw and t.name not in not_private]


def _data(work: Work, place_: Place | None, cut: Cut | None, not_private: frozenset[str]) -> str:
    """What leaves the device, in words."""
    if place_ is None:
        return "nothing leaves the device"
    goal = "to the site" if place_.zone == "site" else "out of the site"
    raw = [] if cut is None else raw_names(work, cut, not_private)
    return f"input goes {goal}" if cut is None or raw else f"features go {goal}"


def _raw_must_stay(rules: Rules, zone: Zone) -> bool:
    return (rules.data_stays == "device" and zone != "device") or (rules.data_stays == "site" and zone == "outside")


def place_breaks(rules: Rules, zone: Zone) -> bool:
    """True if the place alone breaks the rule on networks."""
    return (rules.offline == "any" and zone != "device") or (rules.offline == "internet" and zone == "outside")


def _breaks(question: Question, work: Work, row: Row, place_: Place | None, cut: Cut | None) -> list[str]:
    """The rules an option breaks, each with its value."""
    rules, zone = question.rules, row.leaves
    found = _misfits(question, work, row, place_, cut)
    if _raw_must_stay(rules, zone) and place_ is not None:
        raw = ["its input"] if cut is None else raw_names(work, cut, question.not_private)
        if raw or rules.features_stay:
            what = ", ".join(raw[:3]) if raw else "features"
            found.append(f"data stays on the {rules.data_stays}: {what} would leave over {place_.link.name}")
    if place_breaks(rules, zone) and place_ is not None:
        need = "any network" if rules.offline == "any" else "the internet"
        found.append(f"works without {need}: needs {place_.link.name}")
    if rules.max_latency_ms is not None and row.p95_ms > rules.max_latency_ms:
        why = f"p95 {row.p95_ms:.4g} ms"
        if math.isinf(row.p95_ms):
            outage = place_.link.outage if place_ is not None else 0.0
            why = "more load than it can serve" if outage <= _OUTAGE_OF_P95 else f"the link is down {outage:.0%}"
        found.append(f"latency at most {rules.max_latency_ms:.4g} ms: {why}")
    if rules.max_cost is not None and row.cost > rules.max_cost:
        found.append(f"cost at most {rules.max_cost:.6g} a month: {row.cost:.6g}")
    return found


def _misfits(question: Question, work: Work, row: Row, place_: Place | None, cut: Cut | None) -> list[str]:
    """Memory and speed of the devices themselves."""
    found = []
    weights = sum(work.graph.blocks[i].weight_bytes for i in cut.here) if cut is not None else work.file_bytes
    if cut is not None or place_ is None:
        need = weights + work.activation_bytes + (question.device.runtime_bytes or 0)
        if need > question.device.memory_bytes:
            found.append(f"fits the device: needs {need} B of memory, has {question.device.memory_bytes} B")
        stored = question.device.storage_bytes
        if stored is not None and weights > stored:
            found.append(f"fits the device: needs {weights} B of storage, has {stored} B")
    if place_ is not None:
        need = work.file_bytes + work.activation_bytes + (place_.offer.profile.runtime_bytes or 0)
        if need > place_.offer.profile.memory_bytes:
            found.append(f"fits the server: needs {need} B, has {place_.offer.profile.memory_bytes} B")
    if not question.device.onnxruntime and (cut is not None or place_ is None):
        found.append(f"runs on the device: ONNX Runtime does not run on {question.device.name}")
    share = question.load.per_second * question.load.peak / question.load.devices * row.device_ms / 1e3
    if share >= 1:
        found.append(f"the device keeps up: busy {share:.0%} of the peak hour; use more devices or a faster one")
    return found


def models(
    paths: Mapping[str, Path], *, input_shapes: Mapping[str, tuple[int, ...]], upload_bytes: int | None = None
) -> list[Work]:
    """The forms of the model by name, read. Raises ModelError."""
    return [
        _compute.read_work(name, path, input_shapes=input_shapes, upload_bytes=upload_bytes)
        for name, path in paths.items()
    ]
